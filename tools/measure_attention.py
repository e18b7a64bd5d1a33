"""The VideoNSA paper's analyses over a set of clips, as tables: gates, heads, sinks, budgets.

    python tools/measure_attention.py --data examples/clips/clips.jsonl

Asks every question in the files (the layout that finetune.py reads, first turns only), and prints
means over the videos, by layer; and by kind of question how far the answer's attention to the video
is from even. Vision tokens never see the question, so of questions about one video the first stands
for its gates, heads, sinks and budgets. The layers' numbers are those of `AttentionRecord`.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from transformers import AutoProcessor
from transformers.utils import logging
from videonsa import ROOT  # noqa: F401

from commands.attention_sinks import SINK_BRANCHES
from commands.attention_view import WatchedConversation
from commands.model_loading import prepare_model
from commands.options import add_options, video_settings
from nsa_rules import BRANCHES


def read_questions(files):
    """(video, question, kind) of every row of JSON lines."""
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            question = row["conversations"][0]["value"].replace("<video>", "").strip()
            yield str(file.parent / row["video"]), question, row.get("kind", "all")


def watch(options):
    """(records, one a video; most-read shares over even ones, a list by kind of question)."""
    model = prepare_model(
        options.model,
        options.device,
        options.backend,
        options.attention,
        options.load_in,
    )
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    loaded, records, peaks = model.load(), {}, defaultdict(list)
    for video, question, kind in read_questions(options.data):
        conversation = WatchedConversation(
            processor,
            lambda: loaded,
            model.forecast_memory,
            max_position_embeddings=model.config.text_config.max_position_embeddings,
            settings=video_settings(options),
            max_tokens=options.max_tokens,
            max_new_tokens=options.max_new_tokens,
        )
        conversation.sinks = video not in records
        view = conversation.view([video], question, report=lambda line: None)
        records.setdefault(video, view.record)
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
    return [*((layer, *row) for layer, row in enumerate(values)), ("mean", *values.mean(0))]


def between_heads(square):
    """Means over all pairs of different heads of [..., H, H]; NaN of heads that never differ."""
    heads = square.shape[-1]
    return np.nanmean(square[..., ~np.eye(heads, dtype=bool)], -1)


def print_all(records, peaks):
    means, spreads = (
        np.mean(x, 0) for x in zip(*(r.gate_statistics() for r in records), strict=True)
    )
    print_table("Gates, mean", ["layer", *BRANCHES], by_layer(means), "{:.2f}")
    print_table("Gates, standard deviation", ["layer", *BRANCHES], by_layer(spreads), "{:.2f}")
    alike = np.mean([between_heads(r.gate_correlations) for r in records], 0)
    common = np.nanmean([between_heads(r.overlaps()) for r in records], 0)
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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="JSON lines")
    add_options(parser)
    options = parser.parse_args()
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
