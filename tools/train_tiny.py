"""Train a tiny checkpoint, as tools/make_tiny_checkpoint.py writes it, on clips rendered in memory.

    python tools/make_tiny_checkpoint.py --out out/tiny
    python tools/train_tiny.py --model out/tiny --tower-steps 6000 --language-steps 12000

First the vision tower alone learns, on pairs of frames, to tell shape, colour, direction, digit and
place from the mean of its tokens, through linear heads that are thrown away. Then it is frozen, and
the language model with its gates learns to answer. Trained end to end, it never learned shapes.

A clip is read once for all of its questions. The model is the real class.
"""

import argparse
import functools
import itertools
import json
import math
import random
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, IterableDataset
from videonsa import ROOT
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration
from videonsa.packing_videonsa import make_plan

import make_clips
from make_clips import COLOURS, DIRECTIONS, KINDS, SAMPLED_FPS, SHAPES, SIZE
from make_tiny_checkpoint import CONFIG, IMAGE_MEAN, IMAGE_STD, SYSTEM

VISION = CONFIG["vision_config"]
PATCH, MERGE = VISION["patch_size"], VISION["spatial_merge_size"]
GRID = SIZE // PATCH // MERGE  # merged tokens a side
TOKENS = GRID * GRID  # of a pair of frames, which is a second

QUESTIONS = 8  # a clip
QUESTION_ROWS = 24  # room for a question with its answer, in tokens
PROMPT = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<|vision_start|>"
# How often each kind is asked; those that take longest to learn come more often.
WEIGHTS = dict.fromkeys(KINDS, 1.0) | {"colour": 3.0, "at": 2.0, "digit": 2.0, "when": 3.0}
HEADS = {"shape": 4, "colour": 8, "direction": 4, "digit": 11, "x": GRID * 2, "y": GRID * 2}


# The model.


def load(folder, device):
    """The checkpoint's model in float32, by the code of this repository."""
    model = VideoNSAForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.to(device).train()


def patches_of(frames):
    """uint8 [M, 2, SIZE, SIZE, 3] -> patches [M * 64, 3*2*14*14], four of a token in a row."""
    x = frames.permute(0, 4, 1, 2, 3).float() / 255
    mean, std = (x.new_tensor(v).view(1, 3, 1, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    x = ((x - mean) / std).unflatten(4, (GRID, MERGE, PATCH)).unflatten(3, (GRID, MERGE, PATCH))
    return x.permute(0, 3, 6, 4, 7, 1, 2, 5, 8).reshape(len(x) * TOKENS * MERGE**2, -1)


def encode(model, frames):
    """Pairs of frames, uint8 [M, 2, SIZE, SIZE, 3] -> merged tokens [M, 16, hidden]."""
    grid = torch.tensor([[1, GRID * MERGE, GRID * MERGE]] * len(frames), device=frames.device)
    features = model.model.get_video_features(patches_of(frames), grid).pooler_output
    return torch.stack([*features])


def answer_logits(model, features, questions):
    """Logits [B, Q, QUESTION_ROWS, V]; features [B, N, hidden]; questions [B, Q, QUESTION_ROWS].

    A clip is read once, and its keys and values are repeated for its questions: they do not see
    each other.
    """
    config, language = model.config, model.model.language_model
    embed, batch, count = language.embed_tokens, len(features), questions.shape[1]
    clip = [*Words().ids(PROMPT), *[config.video_token_id] * features.shape[1]]
    row = [*clip, config.vision_end_token_id, *[0] * QUESTION_ROWS]
    row = torch.tensor([row], device=features.device)
    vision = row == config.video_token_id
    seconds = features.shape[1] // TOKENS
    positions, _ = model.model.get_rope_index(
        row,
        mm_token_type_ids=2 * vision.int(),  # 2 is video
        video_grid_thw=row.new_tensor([[seconds, GRID * MERGE, GRID * MERGE]]),
        second_per_grid_ts=features.new_tensor([2 / SAMPLED_FPS]),
    )

    def read(embeddings, end, **settings):
        rows, new = embeddings.shape[:2]
        at = positions[:, :, end - new : end].expand(-1, rows, -1)
        return language(inputs_embeds=embeddings, position_ids=at, use_cache=True, **settings)

    x = embed(row[:, : len(clip)]).repeat(batch, 1, 1)
    x[:, vision[0, : len(clip)]] = features.to(x.dtype)
    plan = make_plan(vision[:, : len(clip)].repeat(batch, 1), len(clip))
    output = read(x, len(clip), nsa_plan=plan)
    name = "cache" if "cache" in output else "past_key_values"  # before transformers 5.24
    output[name].batch_repeat_interleave(count)
    asked = torch.cat(
        [row[:, len(clip), None].expand(batch * count, 1), questions.flatten(0, 1)], 1
    )
    output = read(embed(asked), row.shape[1], **{name: output[name]})
    return model.lm_head(output.last_hidden_state[:, 1:]).unflatten(0, (batch, count))


# The data.


@functools.cache
class Words:
    """Questions and answers as token ids."""

    def __init__(self):
        self.tokenizer = Tokenizer.from_file(str(ROOT / "tokenizer.json"))
        self.ids = functools.cache(lambda text: self.tokenizer.encode(text).ids)

    def row(self, question, answer):
        """QUESTION_ROWS ids, and the labels: the next token where it is the answer's, else -100."""
        asked = self.ids(question + "<|im_end|>\n<|im_start|>assistant\n")
        answered = self.ids(answer + "<|im_end|>")
        ids = asked + answered
        labels = [-100] * (len(asked) - 1) + answered + [-100]
        padding = QUESTION_ROWS - len(ids)
        if padding < 0:
            raise ValueError(f"{question!r} with its answer takes {len(ids)} tokens.")
        return ids + [0] * padding, labels + [-100] * padding


def clip_batch(words, rng, seconds, clips, kinds=None):
    """Rows for `draw` and questions about `clips` clips: a dict of tensors, and `kinds`."""
    rows, ids, labels, asked_kinds = [], [], [], []
    for _ in range(clips):
        story = make_clips.make_story(rng, seconds, max_noise=5.0)
        offset = rng.uniform(0, 0.45)  # a sampler may take any frame of a half second
        times = make_clips.frame_times(seconds, SAMPLED_FPS, offset)
        rows += make_clips.frame_rows(story, times)
        count = 0
        while count < QUESTIONS:
            kind = rng.choices(KINDS, [WEIGHTS[kind] for kind in KINDS])[0]
            if kind == "digit" and story.flash is None and rng.random() < 0.75:
                continue
            asked = make_clips.ask(rng, story, kind)
            if asked is None:
                continue
            row = words.row(*asked)
            ids.append(row[0])
            labels.append(row[1])
            asked_kinds.append(kind)
            count += 1
    shape = (clips, QUESTIONS, QUESTION_ROWS)
    return {
        "seconds": seconds,
        "rows": torch.tensor(rows),
        "ids": torch.tensor(ids).view(shape),
        "labels": torch.tensor(labels).view(shape),
        "kinds": asked_kinds,
    }


def pair_batch(rng, pairs):
    """Rows for `draw` of pairs of frames, and the labels of HEADS."""
    rows, labels = [], []
    while len(labels) < pairs:
        story = make_clips.make_story(rng, 4, max_noise=8.0)
        for second in range(4):
            offset = second + rng.uniform(0, 0.45)
            times = make_clips.frame_times(1, SAMPLED_FPS, offset)
            rows += make_clips.frame_rows(story, times)
            scene, flash = story.scene_at(offset), story.flash
            on = flash is not None and flash.start <= offset < flash.end
            x, y = scene.centre(offset)
            labels.append(
                [
                    SHAPES.index(scene.shape),
                    list(COLOURS).index(scene.colour),
                    list(DIRECTIONS).index(scene.direction),
                    flash.digit if on else 10,
                    int(x * HEADS["x"] / SIZE),
                    int(y * HEADS["y"] / SIZE),
                ]
            )
    return {"rows": torch.tensor(rows), "labels": torch.tensor(labels)}


class Batches(IterableDataset):
    """Endless batches of one stage; every worker draws its own stories from the seed."""

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
                continue
            # The lengths that are measured, and now and then any other up to 32 seconds.
            seconds = rng.choice((4, 8, 16)) if rng.random() < 0.75 else rng.randint(2, 32)
            # About equally many frames a batch, whatever the length.
            yield clip_batch(words, rng, seconds, max(1, self.size * 16 // seconds))


def batches(stage, seed, size, workers):
    return DataLoader(
        Batches(stage, seed, size),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=8 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def pictures(rows, generator):
    """Pairs of frames as a video file gives them: uint8 [pairs, 2, SIZE, SIZE, 3]."""
    frames = draw(rows, generator)
    x = frames.permute(0, 3, 1, 2).float()
    grey = (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    # Files keep colour at half the resolution.
    colour = F.interpolate(F.avg_pool2d(x - grey, 2), scale_factor=2)
    x = (grey + colour).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return x.unflatten(0, (-1, 2))


def draw(rows, generator, chunk=1024):
    return torch.cat([make_clips.draw(part, generator) for part in rows.split(chunk)])


# Training.


def schedule(step, steps):
    """Warm up over 200 steps, decay linearly over the last 40 %."""
    return min(1.0, (step + 1) / 200, (steps - step) / (0.4 * steps))


class Trainer:
    """AdamW over the parameters `p`, with the schedule, clipping and bf16 on a GPU."""

    def __init__(self, p, steps, lr):
        self.p, self.steps, self.lr = p, steps, lr
        matrices = [x for x in p.values() if x.ndim > 1]
        vectors = [x for x in p.values() if x.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": 0.02},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=lr,
            betas=(0.9, 0.98),
            fused=matrices[0].is_cuda,
        )

    def step(self, step, loss):
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * schedule(step, self.steps)
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.p.values(), 1.0)
        if norm.isfinite():  # once in thousands of steps a GPU's bf16 gradient was not
            self.optimizer.step()
        else:
            print(f"step {step}: gradient norm {norm.item()}, loss {loss.item()}; step left out")


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def train_tower(model, args, device):
    """Train the vision tower in place."""
    hidden = VISION["out_hidden_size"]
    heads = {
        name: (torch.randn(size, hidden) / math.sqrt(hidden)).to(device).requires_grad_()
        for name, size in HEADS.items()
    }
    tower = dict(model.model.visual.named_parameters())
    trainer = Trainer({**tower, **heads}, args.tower_steps, args.lr)
    generator = torch.Generator(device).manual_seed(args.seed)
    right, began = torch.zeros(len(HEADS), device=device), time.time()
    data = batches("tower", args.seed, args.pairs, args.workers)
    for step, batch in enumerate(itertools.islice(data, args.tower_steps)):
        labels = batch["labels"].to(device, non_blocking=True)
        frames = pictures(batch["rows"].to(device, non_blocking=True), generator)
        with autocast(device):
            mean = encode(model, frames).mean(1)
            logits = [F.linear(mean, heads[name]).float() for name in HEADS]
        loss = sum(F.cross_entropy(x, y) for x, y in zip(logits, labels.T, strict=True))
        trainer.step(step, loss)
        hits = [(x.argmax(-1) == y).float().mean() for x, y in zip(logits, labels.T, strict=True)]
        right += torch.stack(hits).detach()
        if (step + 1) % args.log_every == 0:
            shares = (100 * right / args.log_every).tolist()
            table = ", ".join(f"{name} {x:.1f}" for name, x in zip(HEADS, shares, strict=True))
            pairs, seconds = (step + 1) * args.pairs, time.time() - began
            print(f"{step + 1} steps, {pairs} pairs, {seconds:.0f} s: {table}", flush=True)
            right.zero_()


def clip_logits(model, batch, device, generator):
    """Logits and labels of a batch of `clip_batch`; the tower's part has no gradient."""
    rows = batch["rows"].to(device, non_blocking=True)
    ids = batch["ids"].to(device, non_blocking=True)
    with torch.no_grad(), autocast(device):
        frames = pictures(rows, generator)
        features = torch.cat([encode(model, part) for part in frames.split(2048)])
        features = features.reshape(len(ids), -1, features.shape[-1])
    with autocast(device):
        logits = answer_logits(model, features, ids)
    return logits.float(), batch["labels"].to(device, non_blocking=True)


def train_language(model, args, device):
    """Train the language model with its gates in place; save now and then."""
    trained = dict(model.model.language_model.named_parameters())
    trainer = Trainer(trained, args.language_steps, args.lr)
    generator = torch.Generator(device).manual_seed(args.seed + 1)
    began, questions, total = time.time(), 0, torch.zeros((), device=device)
    data = batches("language", args.seed, args.clips, args.workers)
    for step, batch in enumerate(itertools.islice(data, args.language_steps)):
        logits, labels = clip_logits(model, batch, device, generator)
        loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten())
        trainer.step(step, loss)
        total += loss.detach()
        questions += len(batch["kinds"])
        if (step + 1) % args.log_every == 0:
            seconds, mean = time.time() - began, total.item() / args.log_every
            progress = f"{step + 1} steps, {questions} questions, {seconds:.0f} s"
            print(f"{progress}: loss {mean:.4f}", flush=True)
            total.zero_()
        if (step + 1) % args.save_every == 0:
            measure(model, 4 * args.clips, device)
            save(model, args.model)


@torch.no_grad()
def measure(model, clips, device):
    """Print the share of whole answers right on clips never trained on, by frames and kind.

    Where the most likely token at every place is the answer's own, greedy decoding gives it.
    """
    words = Words()
    for seconds in (4, 8, 16, 32):
        rng = random.Random(f"measure/{seconds}")
        generator = torch.Generator(device).manual_seed(0)
        batch = clip_batch(words, rng, seconds, clips)
        logits, labels = clip_logits(model, batch, device, generator)
        whole = ((logits.argmax(-1) == labels) | (labels < 0)).all(-1).flatten().tolist()
        asked = Counter(batch["kinds"])
        right = Counter(kind for kind, ok in zip(batch["kinds"], whole, strict=True) if ok)
        shares = {kind: round(100 * right[kind] / asked[kind], 1) for kind in KINDS if asked[kind]}
        print(f"  {2 * seconds} frames: {json.dumps(shares)}", flush=True)


def save(model, folder):
    """Write the parameters as fp16, whole or not at all."""
    state = {name: x.detach().half().cpu().contiguous() for name, x in model.named_parameters()}
    partial = folder / "model.safetensors.partial"
    save_file(state, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(folder / "model.safetensors")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="checkpoint to train in place")
    parser.add_argument(
        "--tower-steps", type=int, required=True, help="0 leaves the tower as it is"
    )
    parser.add_argument("--language-steps", type=int, required=True)
    parser.add_argument("--pairs", type=int, default=1024, help="of frames, a step of the tower")
    parser.add_argument(
        "--clips", type=int, default=64, help="of 32 frames, a step of the language"
    )
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes that draw the stories")
    parser.add_argument("--log-every", type=int, default=100, help="steps")
    parser.add_argument("--save-every", type=int, default=1000, help="steps of the language")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # cuDNN's attention, torch's first choice on an H100, is suspected of NaN gradients with masks.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.manual_seed(args.seed)
    model = load(args.model, device)
    if args.tower_steps:
        train_tower(model, args, device)
        save(model, args.model)
    if args.language_steps:
        train_language(model, args, device)
        save(model, args.model)


if __name__ == "__main__":
    main()
