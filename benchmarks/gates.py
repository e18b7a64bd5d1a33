"""How a converted checkpoint starts: even or random gates, before and after a short fine-tuning.

    python benchmarks/gates.py --model .

The tiny checkpoint's language model is first tuned with dense attention, without its gates, as a
Qwen2.5-VL would be. convert_checkpoint.py then gives it gates in both ways. Loss and whole answers
are measured on clips of 32 frames that were never trained on, with dense attention, right after
conversion, and after fine-tuning on a few questions.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from videonsa import ROOT  # noqa: E402

import tiny_batches  # noqa: E402
import train_tiny  # noqa: E402
from convert_checkpoint import convert  # noqa: E402

SECONDS = 16  # 32 frames
CLIP_QUESTIONS = 5  # about as many go into a row of tiny_batches.py
DEVICE = torch.device("cpu")


def load(folder, sparse):
    model = train_tiny.load(folder, DEVICE)
    model.config.text_config.nsa_enabled = sparse
    return model


def tune(model, steps, *, clips, lr, seed):
    """Train the language model in place, on clips of every length."""
    words, rng = tiny_batches.Words(), random.Random(f"gates/{seed}")
    generator = torch.Generator().manual_seed(seed)
    trained = [*model.model.language_model.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        seconds = (rng.choice((4, 8, SECONDS)),)
        batch = tiny_batches.conversation_batch(words, rng, seconds, clips)
        logits, labels = train_tiny.logits_of(model, batch, DEVICE, generator)
        loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten())
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 10, 2 * (1 - step / steps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()


@torch.no_grad()
def measure(model, clips):
    """(loss of the answers' tokens, percent of whole answers right)."""
    words, rng = tiny_batches.Words(), random.Random("gates/measure")
    generator, losses, right = torch.Generator().manual_seed(0), [], []
    for _ in range(clips // 4):
        batch = tiny_batches.conversation_batch(words, rng, (SECONDS,), 4)
        logits, labels = train_tiny.logits_of(model, batch, DEVICE, generator)
        losses.append(F.cross_entropy(logits.flatten(0, -2), labels.flatten()).item())
        right += train_tiny.whole_answers(batch, logits)
    return sum(losses) / len(losses), 100 * sum(right) / len(right)


def save_stock(model, folder):
    """The parameters without gates as a Qwen2.5-VL checkpoint, with the root's other files."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / name, folder)
    for name in ("generation_config.json", "preprocessor_config.json"):
        shutil.copy(ROOT / name, folder)
    config = json.loads((ROOT / "config.json").read_text())
    del config["auto_map"]
    config |= {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    text = config["text_config"]
    config["text_config"] = {k: v for k, v in text.items() if not k.startswith("nsa_")}
    config["text_config"]["model_type"] = "qwen2_5_vl_text"
    (folder / "config.json").write_text(json.dumps(config))
    weights = {
        name: x.detach().clone() for name, x in model.named_parameters() if ".g_proj_" not in name
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT, help="a trained tiny checkpoint")
    parser.add_argument("--dense-steps", type=int, default=300, help="of 2 clips each")
    parser.add_argument("--questions", type=int, nargs="+", default=[320, 1280])
    parser.add_argument("--clips", type=int, default=64, help="to measure on")
    parser.add_argument("--lr", type=float, default=5e-4)
    args = parser.parse_args()
    torch.manual_seed(0)

    def show(name, model):
        loss, right = measure(model, args.clips)
        print(f"{name:40} loss {loss:.4f}, {right:5.1f} % right", flush=True)

    began = time.time()
    model = load(args.model, sparse=False)
    tune(model, args.dense_steps, clips=2, lr=args.lr, seed=1)
    show("dense", model)
    with tempfile.TemporaryDirectory() as place:
        save_stock(model, Path(place, "dense"))
        for gates in ("even", "random"):
            convert(Path(place, "dense"), Path(place, gates), gates=gates)
            for questions in (0, *args.questions):
                model = load(Path(place, gates), sparse=True)
                tune(model, questions // (4 * CLIP_QUESTIONS), clips=4, lr=args.lr, seed=2)
                show(f"{gates} gates, {questions} questions", model)
    print(f"{time.time() - began:.0f} s on a CPU with {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
