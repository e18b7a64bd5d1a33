"""Fine-tunes a model of 7B's width and few layers over several GPUs, and resumes it: FSDP2.

    python benchmarks/fsdp.py --out out/fsdp
    python benchmarks/fsdp.py --out out/fsdp --tokens 36000 --layers 8 --processes 4
    python benchmarks/fsdp.py --out out/fsdp --no-resume --sequence_parallel_size 2
    python benchmarks/fsdp.py --out out/qlora --recipe qlora --processes 1 --layers 2

Makes a checkpoint with random weights and conversations about noise (pictures as frames, so that no
video file has to be decoded), half of a process's batches longer than the other's and one without
any video. Then finetune.py runs with a recipe of examples/recipes, once through and once resumed
from its middle (--no-resume: once, without a save on the way). Prints the losses of both, tokens a
second and the peak memory of one GPU. Further flags go to finetune.py.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from videonsa import ROOT  # noqa: E402

SIDE, TOKENS = 224, 64  # pixels a side of a frame, tokens of two frames


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for everything")
    parser.add_argument("--recipe", default="fsdp2_lora")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4, help="of the language model")
    parser.add_argument("--vision_layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192, help="of the longest conversation")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--model", type=Path, help="use this checkpoint, make none")
    args, given = parser.parse_known_args()

    args.out.mkdir(parents=True, exist_ok=True)
    model = args.model or args.out / "model"
    if not (model / "config.json").exists():
        make_model(model, args)
    lengths = [0 if n % 5 == 4 else args.tokens // (1 + n % 2) for n in range(20)]
    data = make_data(args.out, lengths)
    middle = args.steps // 2
    flags = [
        *("--model_name_or_path", model, "--data", data, "--max_steps", args.steps),
        *(("--save_steps", middle) if args.resume else ("--save_strategy", "no")),
        *("--logging_steps", 1, "--gradient_accumulation_steps", 1),
        *("--lr_scheduler_type", "constant", "--warmup_steps", 0, "--disable_tqdm", "true"),
        *given,
    ]
    whole = finetune(args, "whole", flags)
    resumed = whole
    if args.resume:
        checkpoint = args.out / "whole" / f"checkpoint-{middle}"
        resumed = finetune(args, "resumed", [*flags, "--resume_from_checkpoint", checkpoint])
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"{args.processes} x {name}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; {args.recipe}, {args.layers} layers, {args.tokens} tokens "
        f"{' '.join(given)}"
    )
    print(f"{'step':>4s} {'loss':>9s} {'resumed':>9s} {'tokens/s':>9s} {'GiB':>6s}")
    for step, (one, two) in enumerate(zip(whole, resumed, strict=True), start=1):
        print(
            f"{step:4d} {one['loss']:9.5f} {two['loss']:9.5f} {one['tokens_per_second']:9.0f} "
            f"{one.get('peak_memory_gib', float('nan')):6.2f}"
        )
    apart = max(abs(one["loss"] - two["loss"]) for one, two in zip(whole, resumed, strict=True))
    print(f"Largest difference after resuming: {apart:.1e}. Saved: {saved(args.out / 'whole')}")


def make_model(folder, args):
    """A VideoNSA with 7B's widths and random weights, in bfloat16."""
    base = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    ids = {name: value for name, value in base.to_dict().items() if name.endswith("_token_id")}
    text = {"num_hidden_layers": args.layers, "max_window_layers": args.layers}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    vision = {"depth": args.vision_layers, "hidden_size": 1280, "out_hidden_size": 3584}
    vision |= {"intermediate_size": 3420, "num_heads": 16, "tokens_per_second": 2}
    vision |= {"fullatt_block_indexes": [args.vision_layers - 1]}
    config = type(base)(text_config=text, vision_config=vision, **ids)
    config.auto_map, config.name_or_path = base.auto_map, str(ROOT)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForImageTextToText.from_config(
            config, trust_remote_code=True, dtype=torch.bfloat16
        )
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(ROOT, trust_remote_code=True).save_pretrained(folder)


def make_data(out, lengths):
    """Conversations about frames of noise, of so many tokens each; 0: of text alone."""
    (out / "frames").mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    names = [f"frames/{number:02d}.png" for number in range(16)]
    for name in names:
        pixels = torch.randint(256, (SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(out / name)
    rows = []
    for number, tokens in enumerate(lengths):
        question = {"role": "user", "content": f"<video>What is in video {number}?"}
        row = {"videos": [[names[i % len(names)] for i in range(2 * (tokens // TOKENS))]]}
        if not tokens:
            question, row = {"role": "user", "content": "What is noise?"}, {}
        rows.append(row | {"messages": [question, {"role": "assistant", "content": "Noise."}]})
    path = out / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def finetune(args, name, flags):
    """Runs finetune.py; returns its log, a dict a step."""
    command = [sys.executable]
    if args.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", args.processes]
    command += [ROOT / "finetune.py", ROOT / "examples" / "recipes" / f"{args.recipe}.yaml"]
    command += ["--output_dir", args.out / name, *flags]
    subprocess.run([str(part) for part in command], check=True)
    history = json.loads((args.out / name / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def saved(folder):
    """The weights in a folder, and their sizes."""
    files = sorted(folder.glob("*.safetensors"))
    return ", ".join(f"{file.name} {file.stat().st_size / 2**20:.0f} MiB" for file in files)


if __name__ == "__main__":
    main()
