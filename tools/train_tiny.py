"""Make a tiny checkpoint: train the one that tools/make_tiny_checkpoint.py writes, from its seed.

    python tools/train_tiny.py --out out/tiny

First the vision tower alone learns, on pairs of frames, to tell shape, colour, direction and digit
from each of its tokens, through linear heads that are thrown away. Then it is frozen, and the
language model with its gates learns to answer in conversations about clips (tiny_batches.py).
Trained end to end, it never learned shapes.

The model is the real class, with its own kernels on a GPU. Weights are written every --save-every
steps and at the end, with the accuracy on clips that are never trained on; log.jsonl has all that
is printed. Where --minutes run out, the learning rate has reached zero all the same.
"""

import argparse
import functools
import itertools
import json
import math
import random
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from videonsa.library_videonsa import get_vision_position_ids
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration
from videonsa.packing_videonsa import make_plan
from videonsa.vision_videonsa import Layout, Sequences

import make_tiny_checkpoint
import tiny_batches
from make_clips import TRAINED_KINDS
from make_tiny_checkpoint import IMAGE_MEAN, IMAGE_STD
from tiny_batches import GRID, HEADS, MERGE, PATCH, TOKENS, VISION, Words

MEASURED = ((4,), (8,), (16,), (32,), (8, 8))  # seconds of the clips of a measured conversation
TOWER = "model.visual."


# The model.


def load(folder, device, dense=False):
    """The checkpoint's model in float32, by the code of this repository."""
    model = VideoNSAForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.config.text_config.nsa_enabled = not dense
    return model.to(device).train()


@functools.cache
def normalisation(device):
    """Mean and standard deviation of colours, on a device; a list's way there waits for it."""
    return tuple(
        torch.tensor(x, device=device).view(1, 3, 1, 1, 1) for x in (IMAGE_MEAN, IMAGE_STD)
    )


def patches_of(frames):
    """uint8 [M, 2, SIZE, SIZE, 3] -> patches [M * 64, 3*2*14*14], four of a token in a row."""
    x = frames.permute(0, 4, 1, 2, 3).float() / 255
    mean, std = normalisation(frames.device)
    x = ((x - mean) / std).unflatten(4, (GRID, MERGE, PATCH)).unflatten(3, (GRID, MERGE, PATCH))
    return x.permute(0, 3, 6, 4, 7, 1, 2, 5, 8).reshape(len(x) * TOKENS * MERGE**2, -1)


@functools.cache
def tower_layout(pairs, device):
    """Positions and `Layout` of so many pairs of frames, each of which is one window of the tower.

    What the tower's `forward` works out anew for every call, and sends to the GPU.
    """
    patches = TOKENS * MERGE**2
    order = torch.arange(pairs * TOKENS)
    alike = Sequences([(pairs, patches)], None, None)
    layout = Layout(order, order, order, {"window": alike, "frame": alike})
    grid = torch.tensor([[pairs, GRID * MERGE, GRID * MERGE]])
    return get_vision_position_ids(grid, MERGE, kwargs={}).to(device), layout.to(device)


def encode(model, frames):
    """Pairs of frames, uint8 [M, 2, SIZE, SIZE, 3] -> merged tokens [M, 16, hidden]."""
    positions, layout = tower_layout(len(frames), frames.device)
    _, merged = model.model.visual._encode(patches_of(frames), positions, layout, {})
    return merged.unflatten(0, (-1, TOKENS))


def features_of(model, frames, generator=None):
    """Merged tokens [clips' seconds * 16, hidden] of rows of `draw`, without a gradient."""
    with torch.no_grad(), autocast(frames.device):
        return encode(model, tiny_batches.pictures(frames, generator)).flatten(0, 1)


def row_logits(model, ids, positions, features, plan):
    """Logits [B, L, V] of whole conversations; features [vision tokens of all rows, hidden]."""
    language = model.model.language_model
    embeds = language.embed_tokens(ids)
    embeds[plan.vision_queries] = features.to(embeds.dtype)
    output = language(
        inputs_embeds=embeds,
        attention_mask={"full_attention": None},
        position_ids=positions,
        nsa_plan=plan,
        use_cache=False,
    )
    return model.lm_head(output.last_hidden_state)


def logits_of(model, batch, device, generator):
    """Logits and labels of a batch of `conversation_batch`; the tower's part has no gradient."""
    frames, ids, positions, labels = sent(batch, ("frames", "ids", "positions", "labels"), device)
    with autocast(device):
        features = features_of(model, frames, generator)
        logits = row_logits(model, ids, positions, features, plan_of(model, batch, device))
    return logits.float(), labels


def plan_of(model, batch, device):
    """Where the vision tokens of a batch's rows are."""
    vision = batch["ids"] == model.config.video_token_id
    return make_plan(vision, vision.shape[1], device=device)


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


# Training.


class Clock:
    """How far a stage is: by its steps or, if that is more, by the minutes that it may take."""

    def __init__(self, steps, minutes=None):
        self.steps, self.began = steps, time.time()
        self.seconds = math.inf if minutes is None else 60 * minutes

    def elapsed(self):
        return time.time() - self.began

    def progress(self, step):
        return max(step / self.steps, self.elapsed() / self.seconds)

    def is_over(self, step):
        return self.progress(step) >= 1


class Trainer:
    """AdamW over parameters, with clipping, and a rate that warms up, stays, and falls to zero.

    `update` may be recorded in a CUDA graph, `set_rate` is called outside of it.
    """

    def __init__(self, parameters, lr):
        self.parameters, self.lr = list(parameters), lr
        device = self.parameters[0].device
        matrices = [x for x in self.parameters if x.ndim > 1]
        vectors = [x for x in self.parameters if x.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": 0.02},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=torch.tensor(0.0, device=device),
            betas=(0.9, 0.98),
            fused=True,
            capturable=device.type == "cuda",
        )
        self.skipped = torch.zeros((), device=device)

    def set_rate(self, step, progress):
        """Warm up over 200 steps, decay linearly over the last 40 % of all progress."""
        rate = self.lr * min(1.0, (step + 1) / 200, max(0.0, 1 - progress) / 0.4)
        for group in self.optimizer.param_groups:
            group["lr"].fill_(rate)

    def update(self, loss):
        """One step. Once in thousands of steps a GPU's bf16 gradient is not finite: left out."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        # What torch.amp.GradScaler sets: with 1 the fused step changes nothing.
        self.optimizer.found_inf = (~norm.isfinite()).float()
        self.skipped += self.optimizer.found_inf
        self.optimizer.step()


class Log:
    """Prints a line of a stage, and writes it to a file of JSON lines."""

    def __init__(self, path):
        self.path, self.began = path, time.time()

    def __call__(self, **line):
        line = {"minutes": round((time.time() - self.began) / 60, 2), **line}
        print(json.dumps(line), flush=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class Steps:
    """Runs a step, `function(*inputs)`; on a GPU each kind of step is recorded and then replayed.

    A step of a model this small is some thousand kernels that take longer to launch than to run: a
    CUDA graph launches them together. All that the function reads must be an input or stay where it
    is, and it must not wait for the GPU.
    """

    WARM_UP = 2  # steps of a kind before it is recorded

    def __init__(self, function, trainer, recorded):
        self.function, self.trainer = function, trainer
        self.graphs, self.seen = {}, Counter()
        self.pool = torch.cuda.graph_pool_handle() if recorded else None

    def run(self, kind, *inputs):
        """A step whose inputs have the shapes of all of this kind."""
        self.seen[kind] += 1
        if self.pool is None or self.seen[kind] <= self.WARM_UP:
            self.function(*inputs)
            return
        if kind not in self.graphs:
            self.graphs[kind] = self._record(inputs)
        graph, places = self.graphs[kind]
        for place, x in zip(places, _tensors(inputs), strict=True):
            place.copy_(x, non_blocking=True)
        graph.replay()

    def _record(self, inputs):
        """The graph of a step, and the tensors that it reads."""
        own = _copied(inputs)
        self.trainer.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's thread may pin memory meanwhile.
        stream = torch.cuda.current_stream()
        mode = {"capture_error_mode": "thread_local"}
        with torch.cuda.graph(graph, pool=self.pool, stream=stream, **mode):
            self.function(*own)
        return graph, list(_tensors(own))


def _copied(x):
    """A step's input with tensors of its own."""
    if isinstance(x, torch.Tensor):
        return x.clone()
    if isinstance(x, tuple):
        parts = [_copied(part) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x


def _tensors(x):
    """The tensors of a step's inputs, those of its plan among them."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, tuple):
        for part in x:
            yield from _tensors(part)


def train_tower(model, args, device, log):
    """Train the vision tower in place."""
    hidden, clock = VISION["out_hidden_size"], Clock(args.tower_steps, args.tower_minutes)
    heads = {
        name: (torch.randn(size, hidden) / math.sqrt(hidden)).to(device).requires_grad_()
        for name, (size, _) in HEADS.items()
    }
    trainer = Trainer([*model.model.visual.parameters(), *heads.values()], args.tower_lr)
    right = torch.zeros(len(HEADS), device=device)

    def step_on(frames, labels):
        with torch.no_grad():
            pairs = tiny_batches.pictures(frames)
        with autocast(device):
            tokens = encode(model, pairs)
            logits = [F.linear(tokens, heads[name]).float() for name in HEADS]
        wanted = labels.T[:, :, None].expand(-1, -1, TOKENS)
        both = list(zip(logits, wanted, strict=True))
        losses = [F.cross_entropy(x.flatten(0, 1), y.flatten()) for x, y in both]
        weights = [weight for _, weight in HEADS.values()]
        trainer.update(sum(weight * x for weight, x in zip(weights, losses, strict=True)))
        right.add_(torch.stack([(x.argmax(-1) == y).float().mean() for x, y in both]))

    steps, speed = Steps(step_on, trainer, args.graphs and device.type == "cuda"), Speed(device)
    data = iter(tiny_batches.batches("tower", args.seed, args.pairs, args.workers))
    for step in itertools.takewhile(lambda step: not clock.is_over(step), itertools.count()):
        batch = speed.wait_for(data)
        trainer.set_rate(step, clock.progress(step))
        steps.run("pairs", *sent(batch, ("frames", "labels"), device))
        if (step + 1) % args.log_every == 0:
            line = speed.per_step(args.log_every)
            shares = (100 * right / args.log_every).tolist()
            table = {name: round(x, 1) for name, x in zip(HEADS, shares, strict=True)}
            log(stage="tower", step=step + 1, right=table, skipped=int(trainer.skipped), **line)
            right.zero_()


def train_language(model, args, device, log):
    """Train the language model with its gates in place; measure and save now and then."""
    model.model.visual.requires_grad_(False)
    trainer = Trainer(model.model.language_model.parameters(), args.lr)
    total = torch.zeros((), device=device)

    def step_on(frames, ids, labels, positions, plan):
        features = features_of(model, frames)
        with autocast(device):
            logits = row_logits(model, ids, positions, features, plan)
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        trainer.update(loss)
        total.add_(loss.detach())

    steps, plans = Steps(step_on, trainer, args.graphs and device.type == "cuda"), {}
    clock, answers, speed = Clock(args.language_steps, args.language_minutes), 0, Speed(device)
    data = iter(tiny_batches.batches("language", args.seed, args.tokens, args.workers))
    for step in itertools.takewhile(lambda step: not clock.is_over(step), itertools.count()):
        batch = speed.wait_for(data)
        seconds = tuple(batch["seconds"])
        if seconds not in plans or len(seconds) > 1:  # a first clip stands where it always does
            plans[seconds] = plan_of(model, batch, device)
        trainer.set_rate(step, clock.progress(step))
        inputs = sent(batch, ("frames", "ids", "labels", "positions"), device)
        steps.run(seconds, *inputs, plans[seconds])
        answers += batch["answers"]
        if (step + 1) % args.log_every == 0:
            line = speed.per_step(args.log_every)
            line |= {"answers": answers, "skipped": int(trainer.skipped)}
            loss = round(total.item() / args.log_every, 5)
            log(stage="language", step=step + 1, loss=loss, **line)
            total.zero_()
        if (step + 1) % args.save_every == 0:
            log(stage="measured", step=step + 1, **measure(model, args.measured_rows, device))
            save(model, args.out)
            speed = Speed(device)


def sent(batch, names, device):
    return [batch[name].to(device, non_blocking=True) for name in names]


class Speed:
    """What a step takes, since the last time it was asked for.

    ms: of all; of them data_ms waiting for a batch and gpu_ms until the GPU had done what it was
    given, which is where the host is the quicker one. gib: the peak of the GPU's memory.
    """

    def __init__(self, device):
        self.is_cuda, self.waited, self.began = device.type == "cuda", 0.0, time.time()

    def wait_for(self, data):
        began = time.time()
        batch = next(data)
        self.waited += time.time() - began
        return batch

    def per_step(self, steps):
        asked = time.time()
        if self.is_cuda:
            torch.cuda.synchronize()
        now = time.time()
        parts = {"ms": now - self.began, "data_ms": self.waited, "gpu_ms": now - asked}
        line = {name: round(1000 * x / steps, 2) for name, x in parts.items()}
        if self.is_cuda:
            line["gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.waited, self.began = 0.0, now
        return line


def whole_answers(batch, logits):
    """Of each of a batch's answers, whether all of its tokens are the most likely ones."""
    hits = logits.argmax(-1).cpu() == batch["labels"]
    return [bool(hits[x.row, x.start : x.end].all()) for x in batch["answers"]]


@torch.no_grad()
def measure(model, rows, device):
    """Percent of whole answers right in `rows` conversations never trained on, a length.

    By frames ("8", ... and "16+16" for what is asked after the second of two clips) and kind, and
    by the turn. Where the most likely token at every place is the answer's own, greedy decoding
    gives it; the earlier answers of the conversation are the right ones.
    """
    words, right, asked = Words(), defaultdict(Counter), defaultdict(Counter)
    for seconds in MEASURED:
        rng = random.Random(f"measure/{seconds}")
        generator = torch.Generator(device).manual_seed(0)
        name = "+".join(str(2 * second) for second in seconds)
        for first in range(0, rows, 25):
            batch = tiny_batches.conversation_batch(words, rng, seconds, min(25, rows - first))
            logits, _ = logits_of(model, batch, device, generator)
            for answer, whole in zip(batch["answers"], whole_answers(batch, logits), strict=True):
                if answer.clip != len(seconds) - 1:
                    continue
                for key in (answer.kind, f"turn {answer.turn + 1}", "all"):
                    asked[name][key] += 1
                    right[name][key] += whole
    order = [*TRAINED_KINDS, *(f"turn {turn}" for turn in range(1, 7)), "all"]
    return {
        name: {key: round(100 * right[name][key] / count[key], 1) for key in order if count[key]}
        for name, count in asked.items()
    }


def save(model, folder):
    """Write the parameters as fp16, whole or not at all."""
    state = {name: x.detach().half().cpu().contiguous() for name, x in model.named_parameters()}
    partial = folder / "model.safetensors.partial"
    save_file(state, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(folder / "model.safetensors")


def take_tower(model, folder):
    """Put the vision tower of a trained checkpoint in the model's place of it."""
    state = load_file(folder / "model.safetensors")
    tower = {name.removeprefix(TOWER): x for name, x in state.items() if name.startswith(TOWER)}
    model.model.visual.load_state_dict({name: x.float() for name, x in tower.items()})


def parse(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of weights, stories and noise")
    parser.add_argument("--tower", type=Path, help="a checkpoint whose tower is taken as it is")
    parser.add_argument("--attention", choices=("sparse", "dense"), default="sparse")
    parser.add_argument("--tower-steps", type=int, default=1000)
    parser.add_argument("--tower-minutes", type=float, help="at most")
    parser.add_argument("--language-steps", type=int, default=16000)
    parser.add_argument("--language-minutes", type=float, help="at most")
    parser.add_argument("--pairs", type=int, default=1024, help="of frames, a step of the tower")
    parser.add_argument("--tokens", type=int, default=32768, help="a step of the language model")
    parser.add_argument("--tower-lr", type=float, default=2e-3)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--workers", type=int, default=0, help="processes that draw the stories")
    parser.add_argument("--log-every", type=int, default=100, help="steps")
    parser.add_argument("--save-every", type=int, default=4000, help="steps")
    parser.add_argument("--measured-rows", type=int, default=100, help="conversations a length")
    parser.add_argument(
        "--graphs", action=argparse.BooleanOptionalAction, default=True, help="CUDA graphs"
    )
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # cuDNN's attention, torch's first choice on an H100, is suspected of NaN gradients with masks.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # graphs are not recorded on the default stream
    make_tiny_checkpoint.write_checkpoint(args.out, args.seed)
    torch.manual_seed(args.seed)
    model = load(args.out, device, dense=args.attention == "dense")
    log = Log(args.out / "log.jsonl")
    log(settings={name: str(value) for name, value in vars(args).items()})
    if args.tower:
        take_tower(model, args.tower)
    else:
        train_tower(model, args, device, log)
    save(model, args.out)
    train_language(model, args, device, log)
    log(stage="measured", step="last", **measure(model, 3 * args.measured_rows, device))
    save(model, args.out)


if __name__ == "__main__":
    main()
