"""Train a tiny checkpoint, as tools/make_tiny_checkpoint.py writes it, on clips rendered in memory.

    python tools/make_tiny_checkpoint.py --out out/tiny
    python tools/train_tiny.py --model out/tiny --tower-steps 6000 --language-steps 12000

First the vision tower alone learns, on pairs of frames, to tell shape, colour, direction, digit and
place from the mean of its tokens, through linear heads that are thrown away. Then it is frozen, and
the language model with its gates learns to answer. Trained end to end, it never learned shapes.

The forward pass here is the model's, written for one fixed layout: a prompt, one clip, and several
questions in one row that do not see each other. A test holds it to the real class.
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
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, IterableDataset
from videonsa.nsa_reference import is_complete

import make_clips
from make_clips import COLOURS, DIRECTIONS, KINDS, SAMPLED_FPS, SHAPES, SIZE
from make_tiny_checkpoint import CONFIG, ROOT, SYSTEM

TEXT, VISION = CONFIG["text_config"], CONFIG["vision_config"]
PATCH, MERGE = VISION["patch_size"], VISION["spatial_merge_size"]
GRID = SIZE // PATCH // MERGE  # merged tokens a side
TOKENS = GRID * GRID  # of a pair of frames, which is a second
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

QUESTIONS = 8  # a clip
QUESTION_ROWS = 24  # room for a question with its answer, in tokens
PROMPT = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<|vision_start|>"
# How often each kind is asked; those that take longest to learn come more often.
WEIGHTS = dict.fromkeys(KINDS, 1.0) | {"colour": 3.0, "at": 2.0, "digit": 2.0, "when": 3.0}
HEADS = {"shape": 4, "colour": 8, "direction": 4, "digit": 11, "x": GRID * 2, "y": GRID * 2}


# The model. `p` holds its parameters by their names in the checkpoint.


def linear(p, name, x):
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def rms_norm(p, name, x):
    return F.rms_norm(x.float(), x.shape[-1:], p[f"{name}.weight"].float(), 1e-6).to(x.dtype)


def gated_mlp(p, name, x):
    gate = F.silu(linear(p, f"{name}.gate_proj", x))
    return linear(p, f"{name}.down_proj", gate * linear(p, f"{name}.up_proj", x))


def rotate(x, angles):
    """Rotary embedding of x [..., rows, D] by angles [rows, D/2]."""
    angles = torch.cat([angles, angles], -1)
    first, second = x.chunk(2, -1)
    return (x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()).to(x.dtype)


def patches_of(frames):
    """uint8 [M, 2, SIZE, SIZE, 3] -> patches [M, 64, 3*2*14*14], four of a token in a row."""
    x = frames.permute(0, 4, 1, 2, 3).float() / 255
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1, 1) for v in (MEAN, STD))
    x = ((x - mean) / std).unflatten(4, (GRID, MERGE, PATCH)).unflatten(3, (GRID, MERGE, PATCH))
    return x.permute(0, 3, 6, 4, 7, 1, 2, 5, 8).reshape(len(x), TOKENS * MERGE**2, -1)


def encode(p, frames):
    """Pairs of frames, uint8 [M, 2, SIZE, SIZE, 3] -> merged tokens [M, 16, hidden].

    A picture of 112x112 is one window, so every block attends within its pair of frames.
    """
    name, heads = "model.visual", VISION["num_heads"]
    x = F.linear(patches_of(frames), p[f"{name}.patch_embed.proj.weight"].flatten(1))
    side = torch.arange(GRID * MERGE, device=x.device).view(GRID, MERGE)
    h = side[:, None, :, None].expand(GRID, GRID, MERGE, MERGE).flatten()
    w = side[None, :, None, :].expand(GRID, GRID, MERGE, MERGE).flatten()
    dim = VISION["hidden_size"] // heads // 2
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, device=x.device) / dim)
    angles = torch.cat([h[:, None] * frequency, w[:, None] * frequency], -1)
    for layer in range(VISION["depth"]):
        block = f"{name}.blocks.{layer}"
        qkv = linear(p, f"{block}.attn.qkv", rms_norm(p, f"{block}.norm1", x))
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(rotate(q, angles), rotate(k, angles), v)
        x = x + linear(p, f"{block}.attn.proj", o.transpose(1, 2).flatten(2))
        x = x + gated_mlp(p, f"{block}.mlp", rms_norm(p, f"{block}.norm2", x))
    x = rms_norm(p, f"{name}.merger.ln_q", x).unflatten(1, (TOKENS, MERGE**2)).flatten(2)
    return linear(p, f"{name}.merger.mlp.2", F.gelu(linear(p, f"{name}.merger.mlp.0", x)))


def sparse_attention(q, k, v, gates):
    """The three gated branches over whole blocks, by masks: q [B, H, N, D]; k, v [B, K, N, D]."""
    block, window = TEXT["nsa_block_size"], TEXT["nsa_window_size"]
    batch, heads, n, dim = q.shape
    groups = k.shape[1]
    j = torch.arange(n, device=q.device)
    i = torch.arange(n // block, device=q.device)

    kc, vc = (x.unflatten(2, (-1, block)).mean(3) for x in (k, v))
    scores = q.unflatten(1, (groups, -1)) @ kc[:, :, None].mT / math.sqrt(dim)
    complete = is_complete(len(i), j, block)  # [N, C]
    scores = scores.float().masked_fill(~complete, -math.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)  # [B, K, G, N, C]; no block visible: zeros
    compressed = (weights.to(v.dtype) @ vc[:, :, None]).flatten(1, 2)

    own = (i == j[:, None] // block).expand(batch, groups, -1, -1)
    past = i < j[:, None] // block
    importance = weights.detach().sum(2).masked_fill(~past, -1.0)
    most = min(TEXT["nsa_num_selected_blocks"] - 1, len(i))
    best, index = importance.topk(most, -1)
    chosen = own.scatter(-1, index, (best >= 0) | own.gather(-1, index))
    causal = j <= j[:, None]
    mask = chosen.repeat_interleave(block, -1) & causal
    mask = mask[:, :, None].expand(-1, -1, heads // groups, -1, -1).flatten(1, 2)
    k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
    selected = F.scaled_dot_product_attention(q, k, v, mask)
    near = causal & (j > j[:, None] - window)
    windowed = F.scaled_dot_product_attention(q, k, v, near)

    g = gates.permute(3, 0, 2, 1)[..., None]  # [branch, B, H, N, 1]
    return g[0] * compressed + g[1] * selected + g[2] * windowed


class Layout:
    """Rows of one prompt, one clip and the questions: positions [3, rows] and what text sees."""

    def __init__(self, prompt, seconds, questions, device):
        n = seconds * TOKENS
        self.vision = slice(prompt, prompt + n)
        self.answers = slice(prompt + n + 1, prompt + n + 1 + questions * QUESTION_ROWS)
        rows = self.answers.stop
        at = torch.arange(n)
        step = int(VISION["tokens_per_second"] * 2 / SAMPLED_FPS)
        vision = prompt + torch.stack(
            [at // TOKENS * step, at % TOKENS // GRID, at % GRID]  # time, height, width
        )
        end = int(vision.max()) + 1
        text = [torch.arange(prompt), torch.tensor([end])]
        text += [end + 1 + torch.arange(QUESTION_ROWS)] * questions
        position = torch.cat(
            [text[0].expand(3, -1), vision, torch.cat(text[1:]).expand(3, -1)], 1
        ).to(device)
        pairs = TEXT["hidden_size"] // TEXT["num_attention_heads"] // 2
        frequency = TEXT["rope_parameters"]["rope_theta"] ** (
            -torch.arange(pairs, device=device) / pairs
        )
        sections = torch.tensor(TEXT["rope_parameters"]["mrope_section"])
        axis = torch.arange(3).repeat_interleave(sections).to(device)
        self.angles = position[axis].T * frequency  # [rows, D/2]

        row = torch.arange(rows, device=device)
        question = (row - self.answers.start).div(QUESTION_ROWS, rounding_mode="floor")
        same = (question[:, None] == question) | (question < 0)
        self.is_text = torch.cat([row[: self.vision.start], row[self.vision.stop :]])
        self.dense_mask = (row <= row[:, None]) & same
        self.text_mask = self.dense_mask[self.is_text]


def hidden_states(p, layout, x, sparse=True):
    """The language model's last hidden states of embedded rows x [B, rows, hidden].

    With `sparse` false, vision attends densely to all before it, and the gates have no part.
    """
    heads, groups = TEXT["num_attention_heads"], TEXT["num_key_value_heads"]
    vision, text = layout.vision, layout.is_text
    for layer in range(TEXT["num_hidden_layers"]):
        name = f"model.language_model.layers.{layer}"
        h = rms_norm(p, f"{name}.input_layernorm", x)
        q, k, v = (
            linear(p, f"{name}.self_attn.{part}_proj", h).unflatten(-1, (count, -1)).transpose(1, 2)
            for part, count in (("q", heads), ("k", groups), ("v", groups))
        )
        q, k = rotate(q, layout.angles), rotate(k, layout.angles)
        every = [part.repeat_interleave(heads // groups, 1) for part in (k, v)]
        if sparse:
            gates = F.gelu(linear(p, f"{name}.self_attn.g_proj_1", h[:, vision]))
            gates = linear(p, f"{name}.self_attn.g_proj_2", gates) / TEXT["nsa_gate_temperature"]
            gates = gates.sigmoid().unflatten(-1, (heads, 3))
            o = torch.empty_like(q)
            o[:, :, vision] = sparse_attention(
                q[:, :, vision], k[:, :, vision], v[:, :, vision], gates
            ).to(o.dtype)
            o[:, :, text] = F.scaled_dot_product_attention(q[:, :, text], *every, layout.text_mask)
        else:
            o = F.scaled_dot_product_attention(q, *every, layout.dense_mask)
        x = x + linear(p, f"{name}.self_attn.o_proj", o.transpose(1, 2).flatten(2))
        x = x + gated_mlp(p, f"{name}.mlp", rms_norm(p, f"{name}.post_attention_layernorm", x))
    return rms_norm(p, "model.language_model.norm", x)


def answer_logits(p, layout, prompt, features, questions, sparse=True):
    """Logits [B, Q, QUESTION_ROWS, V]; features [B, N, hidden]; questions [B, Q, QUESTION_ROWS]."""
    table = p["model.language_model.embed_tokens.weight"]
    batch = len(features)
    end = prompt[-1:] + 1  # <|vision_end|> follows <|vision_start|> in the vocabulary
    x = [F.embedding(ids.expand(batch, -1), table) for ids in (prompt, end)]
    x = torch.cat(
        [x[0], features.to(table.dtype), x[1], F.embedding(questions.flatten(1), table)], 1
    )
    h = hidden_states(p, layout, x, sparse)[:, layout.answers]
    return F.linear(h, table).unflatten(1, questions.shape[1:])


# The data.


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


def train_tower(p, args, device):
    """Train the tower's parameters of `p` in place."""
    hidden = TEXT["hidden_size"]
    heads = {
        f"{name}.weight": (torch.randn(size, hidden) / math.sqrt(hidden))
        .to(device)
        .requires_grad_()
        for name, size in HEADS.items()
    }
    tower = {name: x for name, x in p.items() if name.startswith("model.visual.")}
    trainer = Trainer({**tower, **heads}, args.tower_steps, args.lr)
    generator = torch.Generator(device).manual_seed(args.seed)
    right, began = torch.zeros(len(HEADS), device=device), time.time()
    data = batches("tower", args.seed, args.pairs, args.workers)
    for step, batch in enumerate(itertools.islice(data, args.tower_steps)):
        labels = batch["labels"].to(device, non_blocking=True)
        frames = pictures(batch["rows"].to(device, non_blocking=True), generator)
        with autocast(device):
            mean = encode(p, frames).mean(1)
            logits = [linear(heads, name, mean).float() for name in HEADS]
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


def clip_logits(p, prompt, batch, device, generator, sparse=True):
    """Logits and labels of a batch of `clip_batch`; the tower's part has no gradient."""
    rows = batch["rows"].to(device, non_blocking=True)
    ids = batch["ids"].to(device, non_blocking=True)
    with torch.no_grad(), autocast(device):
        frames = pictures(rows, generator)
        features = torch.cat([encode(p, part) for part in frames.split(2048)])
        features = features.reshape(len(ids), -1, features.shape[-1])
    layout = make_layout(len(prompt), batch["seconds"], device)
    with autocast(device):
        logits = answer_logits(p, layout, prompt, features, ids, sparse)
    return logits.float(), batch["labels"].to(device, non_blocking=True)


@functools.cache
def make_layout(prompt, seconds, device):
    return Layout(prompt, seconds, QUESTIONS, device)


def train_language(p, args, device):
    """Train the parameters of `p` that are not the tower's in place; save now and then."""
    prompt = torch.tensor(Words().ids(PROMPT), device=device)
    trained = {name: x for name, x in p.items() if not name.startswith("model.visual.")}
    trainer = Trainer(trained, args.language_steps, args.lr)
    generator = torch.Generator(device).manual_seed(args.seed + 1)
    began, questions, total = time.time(), 0, torch.zeros((), device=device)
    data = batches("language", args.seed, args.clips, args.workers)
    for step, batch in enumerate(itertools.islice(data, args.language_steps)):
        logits, labels = clip_logits(p, prompt, batch, device, generator)
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
            measure(p, prompt, 4 * args.clips, device)
            save(p, args.model)


@torch.no_grad()
def measure(p, prompt, clips, device):
    """Print the share of whole answers right on clips never trained on, by frames and kind.

    Where the most likely token at every place is the answer's own, greedy decoding gives it.
    """
    words = Words()
    for seconds in (4, 8, 16, 32):
        rng = random.Random(f"measure/{seconds}")
        generator = torch.Generator(device).manual_seed(0)
        batch = clip_batch(words, rng, seconds, clips)
        logits, labels = clip_logits(p, prompt, batch, device, generator)
        whole = ((logits.argmax(-1) == labels) | (labels < 0)).all(-1).flatten().tolist()
        asked = Counter(batch["kinds"])
        right = Counter(kind for kind, ok in zip(batch["kinds"], whole, strict=True) if ok)
        shares = {kind: round(100 * right[kind] / asked[kind], 1) for kind in KINDS if asked[kind]}
        print(f"  {2 * seconds} frames: {json.dumps(shares)}", flush=True)


def load(folder, device):
    """The checkpoint's parameters by name, float32 leaves (the head is the embeddings')."""
    state = load_file(folder / "model.safetensors")
    return {name: x.to(device).float().requires_grad_() for name, x in state.items()}


def save(p, folder):
    """Write the parameters as fp16, whole or not at all."""
    state = {name: x.detach().half().cpu().contiguous() for name, x in p.items()}
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
    p = load(args.model, device)
    if args.tower_steps:
        train_tower(p, args, device)
        save(p, args.model)
    if args.language_steps:
        train_language(p, args, device)
        save(p, args.model)


if __name__ == "__main__":
    main()
