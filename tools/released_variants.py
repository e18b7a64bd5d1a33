"""Ask a checkpoint's weights which semantics they were trained with, by the loss on your captions.

    python tools/released_variants.py VideoNSA-released --data rows.jsonl
    python tools/released_variants.py VideoNSA-released --data rows.jsonl --rows 9 --max-tokens 8192

The original release leaves open which mask its training had and which blocks it forced
(configuration_videonsa.py). Weights predict their own kind of answers best under what they were
trained with: this prints the loss on the answers of the same rows under each variant and under the
paper's semantics, lowest first, and what to set. Rows are those of finetune.py (docs/training.md);
descriptions of videos, of the length that was trained on, tell more than short answers. Runs on a
CPU or a GPU; no weights are changed.
"""

import argparse
import itertools
import sys

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from videonsa import ROOT  # noqa: F401  (puts the repository's root on the path)
from videonsa.configuration_videonsa import RELEASED_FORCED, RELEASED_MASKS

from commands.finetuning_data import IGNORE, Collator, Conversations

VARIANTS = {
    "paper": {"nsa_semantics": "paper"},
    **{
        f"released, {mask}, {forced}": {
            "nsa_semantics": "released",
            "nsa_released_mask": mask,
            "nsa_released_forced": forced,
        }
        for mask, forced in itertools.product(RELEASED_MASKS, RELEASED_FORCED)
    },
}
CLEAR = 2.0  # standard errors by which a variant must be ahead of the next to be recommended


def configs_of(model):
    """The text configs that the model's parts read, each once."""
    text = model.model.language_model
    parts = [model.config.text_config, model.model.config.text_config, text.config]
    parts += [layer.self_attn.config for layer in text.layers]
    return {id(config): config for config in parts}.values()


def set_variant(model, fields):
    """Let the model run with other fields of its config; ValueError where they do not fit."""
    for config in configs_of(model):
        for name, value in fields.items():
            setattr(config, name, value)
        config.validate_nsa()


@torch.no_grad()
def loss_of(model, batch):
    """The sum of the loss of one row's batch over the tokens of its answers, and their number."""
    batch = {name: value for name, value in batch.items() if name not in ("labels", "stats")}
    batch = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in batch.items()}
    labels = batch.pop("shift_labels")
    logits = model(**batch).logits.float()
    loss = torch.nn.functional.cross_entropy(
        logits[0], labels[0], ignore_index=IGNORE, reduction="sum"
    )
    return float(loss), int((labels != IGNORE).sum())


def measure(model, rows, collator):
    """{variant: loss per answer token, float64 [rows]}, and the weights of the rows, by tokens."""
    names = [f"nsa_{name}" for name in ("semantics", "released_mask", "released_forced")]
    own = {name: getattr(model.config.text_config, name) for name in names}
    losses, tokens = {}, None
    for name, fields in VARIANTS.items():
        try:
            set_variant(model, fields)
        except ValueError as error:
            set_variant(model, own)
            print(f"{name}: left out: {error}", file=sys.stderr)
            continue
        sums = [loss_of(model, collator([row])) for row in rows]
        losses[name] = torch.tensor([total / count for total, count in sums], dtype=torch.float64)
        tokens = torch.tensor([count for _, count in sums], dtype=torch.float64)
    set_variant(model, own)
    return losses, tokens / tokens.sum()


def report(losses, weights):
    """Lines of a table, lowest loss first, and of a recommendation."""
    mean = {name: float((loss * weights).sum()) for name, loss in losses.items()}
    best, *others = sorted(mean, key=mean.get)
    yield "| semantics, mask, forced blocks | loss per token | above the lowest |"
    yield "| --- | --- | --- |"
    yield f"| {best} | {mean[best]:.4f} | |"
    errors = {}
    for name in others:
        apart = losses[name] - losses[best]
        ahead = mean[name] - mean[best]
        errors[name] = float((weights * (apart - ahead)).square().sum().sqrt())
        yield f"| {name} | {mean[name]:.4f} | {ahead:.4f} ± {errors[name]:.4f} |"
    close = [name for name in others if mean[name] - mean[best] <= CLEAR * errors[name]]
    yield ""
    if close:
        yield (
            f"Not decided: {best!r} is lowest, but {', '.join(map(repr, close))} within {CLEAR:g} "
            "standard errors of it. Give more or longer rows."
        )
        return
    fields = ", ".join(f"{name}={value!r}" for name, value in VARIANTS[best].items())
    yield f"These weights fit {best!r} best. Set in text_config of its config.json: {fields}"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="folder or Hub id")
    parser.add_argument("--data", required=True, help="rows, as finetune.py takes them")
    parser.add_argument("--rows", type=int, help="how many, from the first on (default: all)")
    parser.add_argument("--max-tokens", type=int, help="of a row; videos give up frames to meet it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(
        args.checkpoint, trust_remote_code=True, dtype=dtype, device_map=args.device
    ).eval()
    processor = AutoProcessor.from_pretrained(args.checkpoint, trust_remote_code=True)
    data = Conversations([args.data], processor, max_tokens=args.max_tokens)
    rows = [data[index] for index in range(min(len(data), args.rows or len(data)))]
    for line in report(*measure(model, rows, Collator(processor, model.config))):
        print(line)


if __name__ == "__main__":
    main()
