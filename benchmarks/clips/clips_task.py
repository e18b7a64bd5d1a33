"""A benchmark of lmms-eval whose clips are drawn from a seed when they are needed.

Each task is one length. `dataset_kwargs` of its YAML says what it holds:

    frames: frames of a clip, at 2 a second
    per_kind: questions of each kind; needles: questions for each quarter of the clip
    seed: of the clips (tools/make_clips.py; the tiny checkpoint was trained on other seeds)
    scale: sides of the 112 pixels that a clip is drawn with are this many times as long
    options: whether the question lists options with letters, as for a model that was not trained
        on such clips

Kinds of question: colour, order, count and position (which way the shape moves); `at`, the colour
at a second; `moment`, when a digit flashes, which only the frames of that moment tell; `needle`,
which digit it is, for flashes in each quarter of the clip (depth_0 is its start).

Clips are kept under HF_HOME like other tasks' videos.
"""

import hashlib
import itertools
import os
import random
import sys
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableMessagesTask

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import videonsa  # noqa: E402, F401  (it puts the root on the path)

import make_clips  # noqa: E402
from commands.evaluation_answers import plain, read_answer  # noqa: E402

KINDS = {
    "colour": "colour",
    "order": "order",
    "count": "count",
    "position": "direction",
    "at": "at",
    "moment": "when",
}
DEPTHS = 4
LETTERS = "ABCD"
ASK_FOR_LETTER = "Answer with the option's letter from the given choices directly."


class ClipsTask(ConfigurableMessagesTask):
    def __init__(self, config):
        config = {key: value for key, value in config.items() if key != "class"}
        super().__init__(config=config)

    def download(self, dataset_kwargs=None):
        rows = Dataset.from_list(make_docs(**dataset_kwargs))
        self.dataset = DatasetDict({self.config.test_split: rows})
        self.dataset_no_image = self.dataset


def make_docs(frames, per_kind, needles, seed, scale, options):
    """The questions of one task, and what it takes to draw their clips."""
    seconds = frames // make_clips.SAMPLED_FPS
    wanted = {kind: per_kind for kind in KINDS}
    wanted |= {("needle", depth): needles for depth in range(DEPTHS)}
    docs = []
    for index in itertools.count():
        if not any(wanted.values()):
            return docs
        rng = random.Random(f"{seed}/{frames}/{index}")
        story = make_clips.make_story(rng, seconds)
        for kind in wanted:
            name, depth = kind if isinstance(kind, tuple) else (kind, None)
            asked = make_clips.ask(rng, story, KINDS.get(name, "digit"))
            if not wanted[kind] or asked is None or depth != _depth(story, name):
                continue
            if kind == "order" and len(story.scenes) < 2:
                continue
            wanted[kind] -= 1
            question, answer = asked
            choices = _choices(rng, story, name, answer)
            letter = LETTERS[choices.index(answer)]
            if options:
                listed = [f"{LETTERS[i]}. {choice}" for i, choice in enumerate(choices)]
                question = "\n".join([question, *listed, ASK_FOR_LETTER])
            docs.append(
                {
                    "kind": name,
                    "depth": -1 if depth is None else depth,
                    "question": question,
                    "choices": choices,
                    "answer": letter if options else answer,
                    "clip": f"{seed}/{frames}/{index}",
                    "seconds": seconds,
                    "scale": scale,
                }
            )
            if not any(wanted.values()):
                break


def _depth(story, kind):
    """The quarter of the clip a needle flashes in; None for other kinds, -1 without a flash."""
    if kind != "needle":
        return None
    return -1 if story.flash is None else story.flash.start * DEPTHS // story.seconds


def _choices(rng, story, kind, answer):
    """The right answer and up to three wrong ones, shuffled."""
    if kind in ("colour", "at"):
        others = list(make_clips.COLOURS)
    elif kind == "position":
        others = list(make_clips.DIRECTIONS)
    elif kind == "count":
        others = list("1234")
    elif kind == "needle":
        others = [str(digit) for digit in range(10)]
    elif kind == "moment":
        others = [f"at {second} s" for second in range(story.seconds)]
    else:  # the right colours in another order, and too few or too many of them
        colours = answer.split(", ")
        spare = [colour for colour in make_clips.COLOURS if colour not in colours]
        orders = itertools.islice(itertools.permutations(colours), 1, 4)
        others = [", ".join(order) for order in orders]
        others += [f"{answer}, {spare[0]}", f"{spare[1]}, {answer}", ", ".join([spare[2]])]
    others = [other for other in others if other != answer]
    choices = [answer, *rng.sample(others, min(3, len(others)))]
    rng.shuffle(choices)
    return choices


def doc_to_visual(doc):
    """The clip's path; draws it if nobody has."""
    home = Path(os.getenv("HF_HOME", "~/.cache/huggingface")).expanduser() / "videonsa_clips"
    drawing = hashlib.sha256(Path(make_clips.__file__).read_bytes()).hexdigest()[:12]
    path = home / drawing / f"{doc['clip'].replace('/', '-')}-x{doc['scale']}.mp4"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = random.Random(doc["clip"])
        story = make_clips.make_story(rng, doc["seconds"])
        frames = make_clips.render(story, make_clips.SAMPLED_FPS, seed=rng.getrandbits(32))
        for axis in (1, 2):
            frames = torch.repeat_interleave(frames, doc["scale"], dim=axis)
        unfinished = path.with_suffix(f".{os.getpid()}.mp4")
        make_clips.write_video(unfinished, frames, make_clips.SAMPLED_FPS)
        unfinished.rename(path)
    return [str(path)]


def process_results(doc, results):
    """1 or 0 for the question, for its kind and, of a needle, for its depth."""
    options = dict(zip(LETTERS, doc["choices"], strict=False))
    if doc["answer"] in options:
        score = float(read_answer(results[0], options) == doc["answer"])
    else:  # words were asked for, and only they count
        score = float(plain(results[0]) == plain(doc["answer"]))
    scores = {"accuracy": score, doc["kind"]: score}
    if doc["depth"] >= 0:
        scores[f"depth_{doc['depth']}"] = score
    return scores
