"""What finetune.py --dry_run prints: lengths of the data, steps, and a forecast of the memory.

Nothing trains and no weights are loaded; of each video no more than one frame is decoded.
"""

import math
import statistics
from collections import Counter

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoModelForImageTextToText

from commands.finetuning_data import DataReport
from commands.finetuning_model import PARTS, choose_trained, part_of, run_dtype


class Measured(Dataset):
    """The lengths of the items of `Conversations`."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data.measured(index)


def dry_run(data, config, model_args, args):
    """Goes through the data and prints its lengths and what training on it would take."""
    loader = DataLoader(
        Measured(data), batch_size=None, num_workers=args.dataloader_num_workers, shuffle=False
    )
    items = list(tqdm(loader, desc="Measuring", unit=" rows", disable=args.disable_tqdm))
    notes = [note for item in items for note in item["notes"]]
    usable = [item for item in items if "tokens" in item]
    report = DataReport(args.output_dir)
    report.clear()
    shown = report.add(notes)
    counts = Counter(what for what, _, _ in notes)
    print(f"{len(data):,} conversations in {', '.join(data.names)}")
    print(
        f"{counts['skipped']:,} would be skipped, {counts['shortened']:,} give up frames to meet "
        f"--max_tokens: see {report.path}"
    )
    for note in shown:
        print(f"  {note}")
    if not usable:
        raise SystemExit("No conversation can be used.")
    tokens = sorted(item["tokens"] for item in usable)
    vision, labels = (sum(item[name] for item in usable) for name in ("vision_tokens", "labels"))
    print(
        f"Tokens a conversation: {tokens[0]:,} to {tokens[-1]:,}, median "
        f"{statistics.median(tokens):,.0f}, 95 % up to {tokens[int(0.95 * (len(tokens) - 1))]:,}; "
        f"{sum(tokens):,} in all, {vision / sum(tokens):.1%} of them vision, {labels:,} labels"
    )
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
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
    forecast_memory(config, model_args, args, longest)


def forecast_memory(config, model_args, args, longest):
    """Prints parameters by part and an estimate of one device's memory, nothing being sharded."""
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
    text, width = config.text_config, run_dtype(args).itemsize
    tokens = longest["tokens"] * args.per_device_train_batch_size
    # A trained weight: itself, its gradient and AdamW's two moments, in float32.
    weights = 16 * trained.total() + width * (every.total() - trained.total())
    layer = tokens * width * (4 * text.intermediate_size + 16 * text.hidden_size) * 1.4
    if args.gradient_checkpointing:
        layer += tokens * width * text.hidden_size * text.num_hidden_layers
    else:
        layer *= text.num_hidden_layers
    logits = 10 * longest["labels"] * args.per_device_train_batch_size * text.vocab_size
    print(
        f"Memory for batches of the longest conversation, an estimate without sharding: "
        f"{(weights + layer + logits) / 2**30:.2f} GiB (weights and optimizer "
        f"{weights / 2**30:.2f}, activations {layer / 2**30:.2f}, logits {logits / 2**30:.2f})"
    )
