"""The VideoNSA paper's analyses over a set of clips, as tables: gates, heads, sinks, budgets.

    python tools/measure_attention.py --data examples/clips/clips.jsonl

Asks the first question of every row of a data set that finetune.py reads, and prints means over the
videos, by layer; and by the rows' "kind", if they have one, how far the answer's attention to the
video is from even. Vision tokens never see the question, so of questions about the same files the
first stands for their gates, heads, sinks and budgets. The numbers are those of `AttentionRecord`.
"""

import argparse
import warnings
from collections import defaultdict

import numpy as np
from transformers import AutoProcessor
from transformers.utils import logging
from videonsa import ROOT  # noqa: F401

from commands.attention_sinks import SINK_BRANCHES
from commands.attention_view import WatchedConversation
from commands.finetuning_rows import to_messages
from commands.finetuning_sets import read_rows
from commands.model_loading import prepare_model
from commands.options import add_options, conversation_options, model_options
from nsa_rules import BRANCHES


def read_questions(name):
    """(files, question, kind) of every row of a data set.

    Raises ValueError for a row with settings of its own; the options set all videos alike.
    """
    rows, folder = read_rows(name)
    for number, row in enumerate(rows):
        asked = next(turn for turn in to_messages(row, folder) if turn["role"] == "user")
        media = [part for part in asked["content"] if part["type"] != "text"]
        if any(len(part) > 2 for part in media):
            raise ValueError(
                f"row {number} of {name} has settings of its video; leave them out, and give what "
                "is to be taken of all videos as options."
            )
        text = "".join(part["text"] for part in asked["content"] if part["type"] == "text")
        yield tuple(part[part["type"]] for part in media), text.strip(), row.get("kind", "all")


def watch(options):
    """(records, one for the same files; most-read shares over even ones, by kind of question)."""
    model = prepare_model(options.model, **model_options(options))
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    loaded, records, peaks = model.load(), {}, defaultdict(list)
    for files, question, kind in read_questions(options.data):
        conversation = WatchedConversation(
            processor,
            lambda: loaded,
            model.forecast_memory,
            max_position_embeddings=model.config.text_config.max_position_embeddings,
            **conversation_options(options),
        )
        conversation.sinks = files not in records
        view = conversation.view(files, question, report=lambda line: None)
        records.setdefault(files, view.record)
        peaks[kind].append(view.most_read()[1] * view.record.layout.num_steps)
    return list(records.values()), peaks


def print_table(title, names, rows, form):
    """Rows of a label and numbers, as Markdown."""
    print(f"\n**{title}**\n")
    print("| " + " | ".join(names) + " |")
    print("| ---" * len(names) + " |")
    for label, *values in rows:
        print(f"| {label} | " + " | ".join(form.format(value) for value in values) + " |")


def by_layer(values):
    """values [Y, columns] as rows, with their means last."""
    return [*((layer, *row) for layer, row in enumerate(values)), ("mean", *known_mean(values, 0))]


def known_mean(values, axis):
    """The mean of what is not NaN; NaN where all is, as likeness of heads that never change is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice")
        return np.nanmean(values, axis)


def between_heads(square):
    """Means over all pairs of different heads of [..., H, H]; NaN of heads that never differ."""
    heads = square.shape[-1]
    return known_mean(square[..., ~np.eye(heads, dtype=bool)], -1)


def print_all(records, peaks):
    means, spreads = (
        np.mean(x, 0) for x in zip(*(r.gate_statistics() for r in records), strict=True)
    )
    print_table("Gates, mean", ["layer", *BRANCHES], by_layer(means), "{:.2f}")
    print_table("Gates, standard deviation", ["layer", *BRANCHES], by_layer(spreads), "{:.2f}")
    alike = known_mean([between_heads(r.gate_correlations) for r in records], 0)
    common = known_mean([between_heads(r.overlaps()) for r in records], 0)
    names = ["layer", *(f"gates, {branch}" for branch in BRANCHES), "blocks in common"]
    rows = by_layer(np.concatenate([alike, common[:, None]], 1))
    print_table("Likeness of two heads", names, rows, "{:.2f}")
    sinks = np.mean([100 * r.sink_ratios.mean(2) for r in records], 0)
    print_table("Attention sinks, % of keys", ["layer", *SINK_BRANCHES], by_layer(sinks), "{:.2f}")
    read = [r.keys_read() for r in records]
    dense = np.array([one["dense"] for one in read])
    rows = []
    for name, branches in [*((b, [b]) for b in BRANCHES), ("all three", BRANCHES)]:
        keys = np.array([sum(one[branch] for branch in branches) for one in read])
        rows.append((name, keys.mean(), 100 * (keys / dense).mean()))
    rows.append(("dense", dense.mean(), 100.0))
    print_table("Keys that a vision token reads", ["branch", "keys", "% of dense"], rows, "{:.1f}")
    rows = [(kind, np.mean(values), np.max(values)) for kind, values in peaks.items()]
    names = ["kind of question", "mean", "largest"]
    print_table("Attention of the answer at its most-read step, times even", names, rows, "{:.1f}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="file, folder or Hub id")
    add_options(parser)
    options = parser.parse_args(argv)
    logging.disable_progress_bar()
    records, peaks = watch(options)
    tokens = [len(record.layout.packed) for record in records]
    print(
        f"{len(records)} videos of {min(tokens)} to {max(tokens)} vision tokens, "
        f"{sum(map(len, peaks.values()))} questions"
    )
    print_all(records, peaks)


if __name__ == "__main__":
    main()
