"""What a tiny checkpoint is trained on: conversations about clips, as tensors, made in memory.

A row is one conversation in the chat template's words: the system's turn, a clip, as many
questions with their answers as there is room for, and, in some rows, a second clip with more. All
rows of a batch show clips of the same lengths, which are the batch's `seconds`, so that they are of
one length. Only answers are learned. What follows a row's last answer fills it up and is read by
nothing.

Stories are made in worker processes; `pictures` draws them where the model runs.
"""

import functools
import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, IterableDataset
from videonsa import ROOT
from videonsa.configuration_videonsa import VideoNSAConfig
from videonsa.positions_videonsa import rope_index

import make_clips
from make_clips import COLOURS, DIRECTIONS, SAMPLED_FPS, SHAPES, SIZE, TRAINED_KINDS
from make_tiny_checkpoint import CONFIG, SYSTEM

VISION = CONFIG["vision_config"]
PATCH, MERGE = VISION["patch_size"], VISION["spatial_merge_size"]
GRID = SIZE // PATCH // MERGE  # merged tokens a side
TOKENS = GRID * GRID  # of a pair of frames, which is a second

SYSTEM_TURN = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
QUESTION_START = "<|im_start|>user\n"
ANSWER_START = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
TURN_ROOM = 136  # tokens of the questions and answers about one clip: six turns or so

# How often clips of these lengths are drawn, one or two to a conversation.
LENGTHS = {
    **{(4,): 4, (8,): 4, (16,): 5, (32,): 8},
    **{(2,): 1, (6,): 1, (12,): 1, (24,): 2},
    **{(4, 4): 2, (8, 8): 2, (4, 16): 1, (16, 8): 1},
}
# How often each kind is asked. What is asked in fewer than some 4 of 100 questions may not begin to
# be learned at all; what takes longest comes more often.
WEIGHTS = dict.fromkeys(TRAINED_KINDS, 1.0)
WEIGHTS |= {"shape": 1.5, "direction": 1.5, "at": 2.0, "digit": 2.0, "when": 3.0, "starts": 1.5}
WEIGHTS |= {"colour_of": 1.5, "each_of": 1.5, "unknown": 0.4}
# What the tower's heads tell of a pair of frames, how many values it has, and its loss's weight. No
# place: no question asks for it, and it would take two thirds of the features' variance.
HEADS = {"shape": (4, 3.0), "colour": (8, 1.0), "direction": (4, 1.0), "digit": (11, 1.0)}


class Answer(NamedTuple):
    """Where an answer's tokens are predicted: in `row`, from `start` to `end`."""

    kind: str
    turn: int  # of the turns about its clip, from 0
    clip: int  # of the conversation's clips, from 0
    row: int
    start: int
    end: int


@functools.cache
class Words:
    """Text as token ids, by the repository's own tokenizer and configuration."""

    def __init__(self):
        self.tokenizer = Tokenizer.from_file(str(ROOT / "tokenizer.json"))
        self.ids = functools.cache(lambda text: self.tokenizer.encode(text).ids)
        self.video = self.tokenizer.token_to_id("<|video_pad|>")
        self.padding = self.tokenizer.token_to_id("<|endoftext|>")
        self.config = VideoNSAConfig.from_pretrained(ROOT)


def rows_of(seconds, tokens):
    """How many conversations about clips of these lengths make a batch of about `tokens`."""
    return max(1, tokens // (sum(seconds) * TOKENS + len(seconds) * TURN_ROOM))


def next_question(rng, story, asked):
    """(kind, question, answer) of a kind that was not `asked` yet, by WEIGHTS."""
    while True:
        kinds = [kind for kind in TRAINED_KINDS if kind not in asked]
        kind = rng.choices(kinds, [WEIGHTS[kind] for kind in kinds])[0]
        if kind == "digit" and story.flash is None and rng.random() < 0.75:
            continue
        pair = make_clips.ask(rng, story, kind)
        if pair is not None:
            return kind, *pair


def turns(words, rng, story, most, turn_room):
    """At most `most` questions and answers about a story, as far as `turn_room` tokens go.

    Returns their ids, without what closes the last answer's line, and (kind, start, end) of each
    answer with the token that ends it.
    """
    ids, answers, asked = [], [], set()
    while len(answers) != most:
        kind, question, answer = next_question(rng, story, asked)
        opening = words.ids("\n" + QUESTION_START) if ids else []
        prompt = [*opening, *words.ids(question + ANSWER_START)]
        answered = words.ids(answer + END)
        if len(ids) + len(prompt) + len(answered) > turn_room:
            if not ids:
                raise ValueError(f"{question!r} with its answer takes more than {turn_room} tokens")
            return ids, answers
        start = len(ids) + len(prompt)
        ids += [*prompt, *answered]
        answers.append((kind, start, start + len(answered)))
        asked.add(kind)
    return ids, answers


def conversation(words, rng, stories):
    """Token ids of one row, and its answers as (kind, turn, clip, start, end)."""
    ids, answers, room = [*words.ids(SYSTEM_TURN)], [], len(stories) * TURN_ROOM
    for clip, story in enumerate(stories):
        opening = words.ids("\n" + QUESTION_START) if clip else words.ids(QUESTION_START)
        ids += [*opening, *words.ids("<|vision_start|>")]
        ids += [words.video] * (story.seconds * TOKENS) + words.ids("<|vision_end|>")
        # Before another clip any number, so that it comes anywhere. A story has 12 kinds at least.
        later = len(stories) - 1 - clip
        most = rng.randint(1, 6) if later else 8
        asked, found = turns(words, rng, story, most, room - later * TURN_ROOM)
        room -= len(asked)
        answers += [
            (kind, turn, clip, len(ids) + start, len(ids) + end)
            for turn, (kind, start, end) in enumerate(found)
        ]
        ids += asked
    return ids, answers


def row_length(words, seconds):
    """Tokens of a row about clips of these lengths."""
    opening = len(words.ids("\n" + QUESTION_START)) + 2  # with a vision token on either side
    clips = sum(second * TOKENS + opening + TURN_ROOM for second in seconds)
    return len(words.ids(SYSTEM_TURN)) + clips


def conversation_batch(words, rng, seconds, rows):
    """`rows` conversations about clips of `seconds` lengths; a dict of tensors, and `answers`.

    frames float32 [clips * seconds * 2, 17] as `draw` takes them; ids and labels int64 [B, L],
    labels -100 where nothing is learned, else the next token; positions int64 [3, B, L].
    """
    frames, length = [], row_length(words, seconds)
    ids = torch.full((rows, length), words.padding)
    labels = torch.full((rows, length), -100)
    answers = []
    for row in range(rows):
        stories = [make_clips.make_story(rng, second, max_noise=5.0) for second in seconds]
        for story in stories:
            offset = rng.uniform(0, 0.45)  # a sampler may take any frame of a half second
            times = make_clips.frame_times(story.seconds, SAMPLED_FPS, offset)
            frames += make_clips.frame_rows(story, times)
        said, found = conversation(words, rng, stories)
        said = torch.tensor(said)
        ids[row, : len(said)] = said
        for kind, turn, clip, start, end in found:
            labels[row, start - 1 : end - 1] = said[start:end]
            answers.append(Answer(kind, turn, clip, row, start - 1, end - 1))
    return {
        "seconds": seconds,
        "frames": torch.tensor(frames),
        "ids": ids,
        "labels": labels,
        "positions": positions(words, ids, seconds),
        "answers": answers,
    }


def positions(words, ids, seconds):
    """The model's own positions of rows about clips of `seconds`: int64 [3, B, L]."""
    alike = len(seconds) == 1  # the clip stands at the same place in all rows
    rows = ids[:1] if alike else ids
    grids = torch.tensor([[second, GRID * MERGE, GRID * MERGE] for second in seconds])
    found, _ = rope_index(
        words.config,
        rows,
        video_grid_thw=grids.repeat(len(rows), 1),
        second_per_grid_ts=[2 / SAMPLED_FPS] * (len(seconds) * len(rows)),
    )
    return found.expand(-1, len(ids), -1).contiguous()


def pair_batch(rng, pairs):
    """Rows for `draw` of pairs of frames, and the labels of HEADS.

    Of a story the seconds that show a digit, and as many others: digits are learned slowest.
    """
    frames, labels = [], []
    while len(labels) < pairs:
        story = make_clips.make_story(rng, 4, max_noise=8.0)
        flash, others = story.flash, [*range(4)]
        shown = [] if flash is None else [*range(flash.start, flash.end)]
        others = [second for second in others if second not in shown]
        for second in [*shown, *rng.sample(others, max(1, len(shown)))][: pairs - len(labels)]:
            offset = second + rng.uniform(0, 0.45)
            times = make_clips.frame_times(1, SAMPLED_FPS, offset)
            frames += make_clips.frame_rows(story, times)
            scene = story.scene_at(offset)
            labels.append(
                [
                    SHAPES.index(scene.shape),
                    list(COLOURS).index(scene.colour),
                    list(DIRECTIONS).index(scene.direction),
                    flash.digit if second in shown else 10,
                ]
            )
    return {"frames": torch.tensor(frames), "labels": torch.tensor(labels)}


class Batches(IterableDataset):
    """Endless batches of a stage; every worker draws its own stories from the seed.

    size: pairs of frames of the tower's batches, tokens of the language model's.
    """

    def __init__(self, stage, seed, size):
        self.stage, self.seed, self.size = stage, seed, size

    def __iter__(self):
        torch.set_num_threads(1)
        info = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.stage}/{self.seed}/{info.id if info else 0}")
        words = Words()
        while True:
            if self.stage == "tower":
                yield pair_batch(rng, self.size)
            else:
                seconds = rng.choices(list(LENGTHS), list(LENGTHS.values()))[0]
                batch = conversation_batch(words, rng, seconds, rows_of(seconds, self.size))
                yield {**batch, "answers": len(batch["answers"])}


def batches(stage, seed, size, workers):
    """A loader of `Batches`."""
    return DataLoader(
        Batches(stage, seed, size),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def _as_it_is(batch):
    return batch


def pictures(frames, generator=None, chunk=1024):
    """Rows of `draw` to frames as a video file gives them: uint8 [pairs, 2, SIZE, SIZE, 3]."""
    return torch.cat([_as_in_a_file(part, generator) for part in frames.split(chunk)])


def _as_in_a_file(frames, generator):
    x = make_clips.draw(frames, generator).permute(0, 3, 1, 2).float()
    grey = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
    # Files keep colour at half the resolution.
    colour = F.interpolate(F.avg_pool2d(x - grey, 2), scale_factor=2)
    x = (grey + colour).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return x.unflatten(0, (-1, 2))
