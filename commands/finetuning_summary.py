"""What finetune.py says before it trains, what training will take, and after it, what to do next.

`summarize` loads no weights and decodes no more than one frame of each video. --dry_run measures
all of the data, and a run a part of it, so that much data does not keep it from starting.
"""

import math
import random
import statistics
from collections import Counter
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoModelForImageTextToText

from commands.finetuning_data import DataReport
from commands.finetuning_model import PARTS, choose_trained, part_of, run_dtype
from commands.finetuning_rows import SHOWN_LAYOUTS
from commands.forecast import count_quantized
from commands.quantized_loading import bits_of, bytes_per_weight, skipped_modules

MEASURED = 200  # conversations that a run measures before it starts
COUNTED = ("tokens", "labels")  # of a conversation


class Measured(Dataset):
    """The lengths of some items of `Conversations`."""

    def __init__(self, data, indices):
        self.data, self.indices = data, indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return self.data.measured(self.indices[index])


def summarize(data, eval_data, config, model_args, args, at_most: int | None = MEASURED):
    """Prints the lengths of the data and what training on it will take.

    at_most: conversations of each data that are measured, drawn by the seed; None for all. Raises
    ValueError where none of them can be used.
    """
    usable = measure(data, args, at_most)
    if eval_data is not None:
        measure(eval_data, args, at_most)
    tokens = sorted(item["tokens"] for item in usable)
    vision, labels = (sum(item[name] for item in usable) for name in ("vision_tokens", "labels"))
    print(
        f"Tokens a conversation: {tokens[0]:,} to {tokens[-1]:,}, median "
        f"{statistics.median(tokens):,.0f}, 95 % up to {tokens[int(0.95 * (len(tokens) - 1))]:,}; "
        f"{sum(tokens):,} in all, {vision / sum(tokens):.1%} of them vision, {labels:,} labels"
    )
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    batch *= args.world_size // args.sequence_parallel_size
    steps = len(data) / batch
    steps = max(math.floor(steps), 1) if args.dataloader_drop_last else math.ceil(steps)
    epochs = args.num_train_epochs
    if args.max_steps > 0:
        epochs = args.max_steps / steps
    print(
        f"{math.ceil(steps * epochs):,} steps of {batch} conversations ({epochs:g} epochs), about "
        f"{sum(tokens) / len(usable) * len(data) * epochs:,.0f} tokens"
    )
    longest = max(usable, key=lambda item: item["tokens"])
    if not args.deepspeed or at_most is None:  # its models cannot be made by one process alone
        forecast_memory(config, model_args, args, longest)


def measure(data, args, at_most):
    """Prints how many conversations can be used; returns the lengths of those."""
    indices = range(len(data))
    if at_most is not None and len(data) > at_most:
        indices = sorted(random.Random(args.seed).sample(indices, at_most))
    loader = DataLoader(
        Measured(data, indices), batch_size=None, num_workers=args.dataloader_num_workers
    )
    items = list(tqdm(loader, desc="Measuring", unit=" rows", disable=args.disable_tqdm))
    notes = [note for item in items for note in item["notes"]]
    usable = [item for item in items if "tokens" in item]
    report = DataReport(args.output_dir)
    shown = report.add(notes)
    counts = Counter(what for what, _, _ in notes)
    some = f", of which {len(items):,} were measured" if len(items) < len(data) else ""
    print(f"{len(data):,} conversations in {', '.join(data.names)}{some}")
    print(
        f"{counts['skipped']:,} would be skipped, {counts['shortened']:,} give up frames to meet "
        "--max_tokens" + (f": see {report.path}" if notes else "")
    )
    for note in shown:
        print(f"  {note}")
    if any(item.get("refused") for item in items):
        print(SHOWN_LAYOUTS)
    if not usable:
        raise ValueError(
            f"none of {len(items):,} conversations can be used. The first, {notes[0][1]}: "
            f"{notes[0][2]}"
        )
    return usable


def forecast_memory(config, model_args, args, longest):
    """Prints parameters by part and an estimate of one device's memory."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
        model = choose_trained(model, model_args, args)
    every, trained = Counter(), Counter()
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue  # PEFT's frozen copy of what it trains whole
        every[part_of(name)] += parameter.numel()
        trained[part_of(name)] += parameter.numel() * parameter.requires_grad
    print("Trained: " + ", ".join(f"{trained[p]:,} of {every[p]:,} in {p}" for p in PARTS))
    width = run_dtype(args).itemsize
    # A trained weight: itself, its gradient and AdamW's two moments, in float32.
    weights = 16 * trained.total() + width * (every.total() - trained.total())
    quantization = getattr(config, "quantization_config", None)
    if model_args.load_in:
        quantization = bits_of(model_args.load_in)
    if quantization is not None:
        saved = width - bytes_per_weight(quantization, width)
        weights -= saved * count_quantized(config, skipped_modules(quantization))
    shards = args.world_size if args.fsdp or args.deepspeed else 1
    tokens, labels = (longest[name] * args.per_device_train_batch_size for name in COUNTED)
    layers = activations(config.text_config, args, tokens / args.sequence_parallel_size)
    logits = 10 * labels * config.text_config.vocab_size
    gib = [size / 2**30 for size in (weights / shards, layers, logits)]
    processes = f" of one of {args.world_size} processes" if args.world_size > 1 else ""
    in_shards = f" in {shards} shards" if shards > 1 else ""
    print(
        f"Memory{processes} for batches of the longest conversation, an estimate: {sum(gib):.2f} "
        f"GiB (weights and optimizer{in_shards} {gib[0]:.2f}, activations {gib[1]:.2f}, logits "
        f"{gib[2]:.2f})"
    )


def activations(text, args, tokens):
    """Bytes of the language model's activations for the tokens that one process has.

    text: its configuration.
    """
    width = run_dtype(args).itemsize
    layer = tokens * width * (4 * text.intermediate_size + 16 * text.hidden_size) * 1.4
    checkpointed = (args.fsdp_config or {}).get("activation_checkpointing")
    if args.gradient_checkpointing or checkpointed:
        return layer + tokens * width * text.hidden_size * text.num_hidden_layers
    return layer * text.num_hidden_layers


def print_next_steps(args, scores: dict):
    """Says where the result of a run is, how good it is, and what to do with it."""
    out = Path(args.output_dir)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(f"The result is in {out}, {size / 2**20:,.1f} MiB of weights.")
    if scores:
        exact = ""
        if "eval_exact_match" in scores:
            exact = f", exact match {scores['eval_exact_match']:.1%} of {scores['eval_answers']}"
        print(f"  on --eval_data: loss {scores['eval_loss']:.4g}{exact}")
    print(f'  ask it:         python ask.py --model {out} VIDEO "QUESTION"')
    print(f"  evaluate it:    python evaluation.py --model {out} --data SET")
    name = f"YOU/{out.resolve().name}"
    print(f"  publish it:     python tools/publish.py --model {out} --repo-id {name}", flush=True)
