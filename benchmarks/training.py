"""Times finetune.py over several GPUs: recipes of examples/recipes on a random model of 7B's size.

    torchrun --nproc_per_node 2 benchmarks/training.py fsdp2_lora fsdp2 --out out/training
    torchrun --nproc_per_node 2 benchmarks/training.py zero3 --layers 14 --out out/training
    torchrun --nproc_per_node 2 benchmarks/training.py fsdp2_lora --sequence_parallel_size 2 \
        --tokens 131072 --steps 3 --out out/training

The model is made on the GPUs, and nothing is saved. Conversations are about frames of noise
(pictures, so that no video file has to be decoded), equally long but for the second one, which is
text alone. For each step: its loss, its seconds, tokens a second of all GPUs with the wait for
data, and the first GPU's peak memory. Further flags go to finetune.py.
"""

import argparse
import contextlib
import datetime
import gc
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from fsdp import make_data
from prefill import make_config
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from videonsa import ROOT  # noqa: E402
from videonsa.configuration_videonsa import VideoNSAConfig  # noqa: E402

import finetune  # noqa: E402
from commands.checkpoint_files import copy_code  # noqa: E402
from commands.finetuning_model import choose_trained, run_dtype  # noqa: E402
from commands.processes import turn_off_multicast  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="+", help="names of files in examples/recipes")
    parser.add_argument("--out", type=Path, required=True, help="folder for model and data")
    parser.add_argument("--layers", type=int, default=28, help="of the language model")
    parser.add_argument("--tokens", type=int, default=36000, help="of a conversation")
    parser.add_argument("--steps", type=int, default=4)
    args, given = parser.parse_known_args()
    turn_off_multicast()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    timeout = datetime.timedelta(minutes=2)
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
    if dist.get_rank() == 0:
        make_checkpoint(args.out / "model", args.layers)
        count = args.steps * dist.get_world_size()
        make_data(args.out, [0 if n == 1 else args.tokens for n in range(count)])
    dist.barrier()
    finetune.load_model, finetune.summarize = make_model, lambda *args, **kwargs: None
    for recipe in args.recipes:
        if dist.get_rank() == 0:
            print(
                f"{recipe}: {dist.get_world_size()} x {torch.cuda.get_device_name()}, torch "
                f"{torch.__version__}, transformers {transformers.__version__}, {args.layers} "
                f"layers, {args.tokens} tokens {' '.join(given)}\n"
                f"{'step':>4s} {'loss':>9s} {'s':>7s} {'tokens/s':>9s} {'GiB':>6s}",
                flush=True,
            )
        train(recipe, args, given)
        gc.collect()
        torch.cuda.empty_cache()
    dist.destroy_process_group()


def train(recipe, args, given):
    flags = [
        *("--model_name_or_path", args.out / "model", "--data", args.out / "data.jsonl"),
        *("--output_dir", args.out / recipe, "--max_steps", args.steps, "--max_tokens", 2**20),
        *("--logging_steps", 1, "--gradient_accumulation_steps", 1, "--save_strategy", "no"),
        *("--lr_scheduler_type", "constant", "--warmup_steps", 0, "--report_to", "none"),
        *("--train_sampling_strategy", "sequential", "--disable_tqdm", "true"),
        *given,
    ]
    path = ROOT / "examples" / "recipes" / f"{recipe}.yaml"
    trainer, *_ = finetune.prepare([str(part) for part in (path, *flags)])
    trainer.add_callback(Report())
    trainer.train()


class Report(TrainerCallback):
    """Prints a line for each step as it ends."""

    def on_train_begin(self, args, state, control, **kwargs):
        torch.cuda.empty_cache()  # of the whole model, which is in shards by now

    def on_step_begin(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs and state.is_world_process_zero:
            seconds = time.perf_counter() - self.start
            print(
                f"{state.global_step:4d} {logs['loss']:9.5f} {seconds:7.2f} "
                f"{logs['tokens_per_second']:9.0f} {logs['peak_memory_gib']:6.1f}",
                flush=True,
            )


def make_checkpoint(folder, layers):
    """A checkpoint without weights: code, configuration and processor."""
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(VideoNSAConfig).to_dict()
    config["text_config"] |= {"num_hidden_layers": layers, "max_window_layers": layers}
    config["text_config"].pop("layer_types", None)
    config["auto_map"] = json.loads((ROOT / "config.json").read_text())["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    AutoProcessor.from_pretrained(ROOT, trust_remote_code=True).save_pretrained(folder)
    copy_code(folder)


def make_model(model_args, args):
    """In place of finetune.py's `load_model`: random weights, made where they are used."""
    name = model_args.model_name_or_path
    config = AutoConfig.from_pretrained(name, trust_remote_code=True)
    torch.manual_seed(0)
    with contextlib.nullcontext() if args.deepspeed else args.device:  # which has shards at once
        model = AutoModelForImageTextToText.from_config(
            config, trust_remote_code=True, dtype=run_dtype(args)
        )
    return choose_trained(model, model_args, args)


if __name__ == "__main__":
    main()
