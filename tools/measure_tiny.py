"""Measure a tiny checkpoint on clips that it has never seen, the way its users ask.

    python tools/measure_tiny.py --model . --seed 1000 --frames 16

renders --count clips into video files (tools/make_clips.py; any seed, training draws from others),
asks one question of every kind about each through the processor and `generate`, and prints the
share of answers, whole and exact, in percent.

`--attention dense` gives the same weights and positions, but lets vision tokens attend densely to
all that stands before them, as in Qwen2.5-VL.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from videonsa import ROOT

from commands.quantized_loading import TRAINABLE, loading_options
from make_clips import KINDS, NEW_KINDS, SAMPLED_FPS


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


@torch.no_grad()
def answers(model, processor, video, questions):
    """The model's answers about one video file, each question asked for itself."""
    conversations = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "video", "video": str(video)},
                    {"type": "text", "text": question},
                ],
            }
        ]
        for question in questions
    ]
    inputs = processor.apply_chat_template(
        conversations,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    ).to(model.device)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=24)
    return processor.batch_decode(
        tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )


def measure(model, processor, folder):
    """Accuracy in percent by kind over a folder that tools/make_clips.py wrote."""
    by_video = defaultdict(list)
    for line in (folder / "clips.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_video[row["video"]].append(row)
    right, asked = Counter(), Counter()
    for video, rows in by_video.items():
        questions = [row["conversations"][0]["value"].removeprefix("<video>") for row in rows]
        given = answers(model, processor, folder / video, questions)
        for row, answer in zip(rows, given, strict=True):
            asked[row["kind"]] += 1
            right[row["kind"]] += answer == row["conversations"][1]["value"]
    kinds = [kind for kind in KINDS + NEW_KINDS if asked[kind]]
    return {kind: round(100 * right[kind] / asked[kind], 1) for kind in kinds}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--seed", type=int, required=True, help="of the clips")
    parser.add_argument("--frames", type=int, required=True, help=f"at {SAMPLED_FPS} a second")
    parser.add_argument("--count", type=int, default=100, help="clips (default 100)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of question, comma-separated")
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
        accuracy = measure(model, processor, Path(folder))
    for kind, share in accuracy.items():
        print(f"{kind:10} {share:6.1f} %")
    if args.json:
        print(json.dumps({"accuracy": accuracy}))


if __name__ == "__main__":
    main()
