"""Measure a tiny checkpoint on clips that it has never seen, the way its users ask.

    python tools/measure_tiny.py --model . --seed 1000 --frames 16

renders --count clips into video files (tools/make_clips.py; any seed, training draws from others),
asks one question of every kind about each through the processor and `generate`, and prints the
share of answers, whole and exact, in percent.

`--turns 3` asks them three to a conversation, in random order, with the model's own answers before
them; `--second` ends each conversation with another clip and a question about that. The shares of
the turns and of the second clip are then printed, too.

`--attention dense` gives the same weights and positions, but lets vision tokens attend densely to
all that stands before them, as in Qwen2.5-VL.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from videonsa import ROOT

from commands.quantized_loading import TRAINABLE, loading_options
from make_clips import NEW_KINDS, SAMPLED_FPS, TRAINED_KINDS


def load(folder, attention, semantics=None, load_in=None):
    """The checkpoint's model and processor; load_in: the bits that its weights are rounded to."""
    fields = {} if semantics is None else {"nsa_semantics": semantics}
    fields |= loading_options(load_in)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **fields)
    if load_in is not None:
        model = model.dequantize()  # bitsandbytes' products in 4 bits do not take these widths
    model.eval()
    model.config.text_config.nsa_enabled = attention == "sparse"
    return model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def ask_next(conversation, video, question):
    """Add a user's turn to a conversation's messages: a file, or None, and a question."""
    content = [{"type": "video", "video": str(video)}] if video else []
    conversation.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})


@torch.no_grad()
def answer_all(model, processor, conversations):
    """The model's answer to each conversation's last question; it becomes the next message."""
    inputs = processor.apply_chat_template(
        conversations,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    ).to(model.device)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=24)
    given = processor.batch_decode(
        tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    for conversation, answer in zip(conversations, given, strict=True):
        conversation.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return given


def plan_conversations(rows, turns, others=None):
    """Rows about one video in conversations of `turns`: lists of (row, what it is counted as).

    others: rows about another video, of which each conversation ends with one.
    """
    rng = random.Random(rows[0]["video"])
    if turns > 1:
        rows = rng.sample(rows, len(rows))
    for first in range(0, len(rows), turns):
        talk = [
            (row, (row["kind"], f"turn {turn}"))
            for turn, row in enumerate(rows[first : first + turns], 1)
        ]
        if others:
            talk.append((rng.choice(others), ("second clip",)))
        yield talk


def measure(model, processor, folder, turns=1, second=False):
    """Accuracy in percent by kind over a folder that tools/make_clips.py wrote.

    In conversations also by turn, and of the second clip's questions.
    """
    by_video = defaultdict(list)
    for line in (folder / "clips.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_video[row["video"]].append(row)
    right, asked, videos = Counter(), Counter(), list(by_video)
    for index, video in enumerate(videos):
        others = by_video[videos[(index + 1) % len(videos)]] if second else None
        talks = list(plan_conversations(by_video[video], turns, others))
        conversations, shown = [[] for _ in talks], [None] * len(talks)
        for turn in range(max(map(len, talks))):
            now = [number for number, talk in enumerate(talks) if turn < len(talk)]
            for number in now:
                row, _ = talks[number][turn]
                new = row["video"] != shown[number]
                shown[number] = row["video"]
                question = row["conversations"][0]["value"].removeprefix("<video>")
                ask_next(conversations[number], folder / row["video"] if new else None, question)
            given = answer_all(model, processor, [conversations[number] for number in now])
            for number, answer in zip(now, given, strict=True):
                row, counted = talks[number][turn]
                for name in counted:
                    asked[name] += 1
                    right[name] += answer == row["conversations"][1]["value"]
    names = TRAINED_KINDS + NEW_KINDS
    if turns > 1:
        names += tuple(f"turn {turn}" for turn in range(1, turns + 1))
    names += ("second clip",)
    return {name: round(100 * right[name] / asked[name], 1) for name in names if asked[name]}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--seed", type=int, required=True, help="of the clips")
    parser.add_argument("--frames", type=int, required=True, help=f"at {SAMPLED_FPS} a second")
    parser.add_argument("--count", type=int, default=100, help="clips (default 100)")
    parser.add_argument("--kinds", default=",".join(TRAINED_KINDS), help="comma-separated")
    parser.add_argument("--turns", type=int, default=1, help="of a conversation (default 1)")
    parser.add_argument("--second", action="store_true", help="end it with a second clip")
    parser.add_argument("--attention", choices=("sparse", "dense"), default="sparse")
    parser.add_argument(
        "--semantics", choices=("paper", "released"), help="other than the checkpoint's own"
    )
    parser.add_argument("--load_in", choices=TRAINABLE, help="weights as so many bits round them")
    parser.add_argument("--json", action="store_true", help="print one line of JSON at the end")
    args = parser.parse_args()
    model, processor = load(args.model, args.attention, args.semantics, args.load_in)
    with tempfile.TemporaryDirectory() as folder:
        make = [sys.executable, ROOT / "tools" / "make_clips.py", "--out", folder]
        make += ["--seed", args.seed, "--count", args.count, "--frames", args.frames]
        make += ["--kinds", args.kinds]
        subprocess.run([str(part) for part in make], check=True, stdout=subprocess.DEVNULL)
        accuracy = measure(model, processor, Path(folder), args.turns, args.second)
    for name, share in accuracy.items():
        print(f"{name:12} {share:6.1f} %")
    if args.json:
        print(json.dumps({"accuracy": accuracy}))


if __name__ == "__main__":
    main()
