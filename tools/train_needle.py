"""Find moments in long videos: a small model from scratch, sparse or dense, with a 7B's heads.

    python tools/train_needle.py --out out/needle --tokens 65536
    python tools/train_needle.py --out out/needle_dense --tokens 65536 --attention dense

A video is frames of 16 tokens. 32 of them, anywhere, show a key and a value; all others are scenes
without meaning, but for the last 16 frames, which show a key each and ask for its value. After the
video stand as many questions in text: a key's word, with the value's word as its answer. So every
needle is the distractor of all other questions, and each answer is learned at one place, in two
kinds:

- shown: at a frame's last token. A vision row has to find the needle: sparsely, or densely.
- asked: at a word after the video. Text rows attend densely in both models, so that this says
  whether a needle can be read once it is found.

What is compared is the language model's attention, so there are no pixels: features are fixed
random vectors of keys, values and scenes with noise on every token, in place of a vision tower's.
The rest is the real class with its own plan and positions, and the parts of train_tiny.py. Steps
are not recorded as CUDA graphs: at --step-tokens the GPU has more to do than the host, but for the
shortest videos.

Every step has the same number of tokens, in rows of one length. Training begins with videos of 8
frames with 4 needles, half of them shown and half asked, because among 32 the look-up hardly begins
to be learned; longer ones join in before half of it is over. log.jsonl has losses, milliseconds a
step and the peak of memory by length, and every --save-every steps the accuracy by length and depth
of the needle; guessing among the values is right in 1.6 %. Sparse and dense are trained alike where
--steps end both runs, not --minutes. What came out stands in docs/training.md.
"""

import argparse
import random
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from videonsa.configuration_videonsa import VideoNSATextConfig
from videonsa.packing_videonsa import NSAPlan

import make_tiny_checkpoint
import tiny_batches
from make_tiny_checkpoint import CONFIG
from tiny_batches import QUESTION_START, SYSTEM_TURN, TOKENS, Words
from train_tiny import Clock, Log, Speed, Trainer, autocast, load, plan_of, row_logits, save

LENGTHS = (128, 1024, 4096, 16384, 65536)  # vision tokens of a video
QUESTIONS = 16  # of each of KINDS, at most
KEYS, VALUES = 256, 64
FIRST_KEY, FIRST_VALUE = 256, 512  # their words: ids of the tokenizer, whatever it spells so
KINDS = ("shown", "asked")
DEPTHS = 5  # equal parts of a video for which accuracy is told apart
SCALE, NOISE = 0.3, 0.15  # standard deviations of what a frame shows, and of a token's noise

TEXT_7B = VideoNSATextConfig()
GROUP = TEXT_7B.num_attention_heads // TEXT_7B.num_key_value_heads
HEAD_DIM = TEXT_7B.hidden_size // TEXT_7B.num_attention_heads
# One key/value head with its group of query heads; block, selection and window are the 7B's too.
TEXT = CONFIG["text_config"] | {
    "hidden_size": GROUP * HEAD_DIM,
    "intermediate_size": 2 * GROUP * HEAD_DIM,
    "num_hidden_layers": 2,
    "num_attention_heads": GROUP,
    "num_key_value_heads": 1,
    "max_position_embeddings": TEXT_7B.max_position_embeddings,
    "rope_parameters": TEXT_7B.rope_parameters,
    "nsa_block_size": TEXT_7B.nsa_block_size,
    "nsa_num_selected_blocks": TEXT_7B.nsa_num_selected_blocks,
    "nsa_window_size": TEXT_7B.nsa_window_size,
}


def config_of(attention):
    """A checkpoint's configuration; its vision tower is there to be loaded, and sees nothing."""
    vision = CONFIG["vision_config"] | {"out_hidden_size": TEXT["hidden_size"]}
    text = TEXT | {"nsa_enabled": attention == "sparse"}
    return CONFIG | {"text_config": text, "vision_config": vision}


# The videos.


class Vectors(NamedTuple):
    """What frames show, the same in every run: [KEYS, hidden], [VALUES, hidden] and [hidden]."""

    keys: torch.Tensor
    values: torch.Tensor
    asking: torch.Tensor


def make_vectors(hidden, device):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(KEYS + VALUES + 1, hidden, generator=generator) * SCALE
    keys, values, asking = drawn.to(device).split([KEYS, VALUES, 1])
    return Vectors(keys, values, asking[0])


class Layout(NamedTuple):
    """What all batches of `rows` videos of so many tokens have in common.

    ids int64 [L], without the questions' words, which begin at `text`; positions int64
    [3, rows, L]; places int64 [2 * questions], where the answers are predicted, by KINDS.
    """

    rows: int
    tokens: int
    questions: int  # of each kind; there are twice as many needles
    ids: torch.Tensor
    text: int
    positions: torch.Tensor
    plan: NSAPlan
    places: torch.Tensor


def make_layout(model, rows, tokens, device):
    words, frames = Words(), tokens // TOKENS
    questions = min(QUESTIONS, frames // 4)
    opening = words.ids(SYSTEM_TURN + QUESTION_START + "<|vision_start|>")
    closing = words.ids("<|vision_end|>")
    video, text = len(opening), len(opening) + tokens + len(closing)
    said = [*opening, *[words.video] * tokens, *closing, *[words.padding] * (2 * questions)]
    ids, question = torch.tensor(said), torch.arange(questions)
    shown = video + (frames - questions + 1 + question) * TOKENS - 1
    batch = {"ids": ids.expand(rows, -1)}
    return Layout(
        rows=rows,
        tokens=tokens,
        questions=questions,
        ids=ids.to(device),
        text=text,
        positions=tiny_batches.positions(words, batch["ids"], (frames,)).to(device),
        plan=plan_of(model, batch, device),
        places=torch.cat([shown, text + 2 * question]).to(device),
    )


class Videos(NamedTuple):
    """A batch: features float32 [rows * tokens, hidden], ids int64 [rows, L], and of its questions
    [rows, 2 * questions], by KINDS, the word that answers (int64) and where the needle stands, from
    0 to 1.
    """

    features: torch.Tensor
    ids: torch.Tensor
    answers: torch.Tensor
    depths: torch.Tensor


def draw(vectors, layout, generator):
    """Videos of a layout, drawn on the generator's device."""
    rows, frames, device = layout.rows, layout.tokens // TOKENS, generator.device
    hidden, options = vectors.keys.shape[1], {"generator": generator, "device": device}

    def some(count, of):
        return torch.rand(rows, of, **options).argsort(1)[:, :count]

    # Of needles in the order of the questions about them: each is asked for once.
    questions = layout.questions
    keys, places = some(2 * questions, KEYS), some(2 * questions, frames - questions)
    values = torch.randint(VALUES, (rows, 2 * questions), **options)

    scenes = torch.randn(rows, frames, hidden, **options) * SCALE
    scenes[torch.arange(rows, device=device)[:, None], places] = (
        vectors.keys[keys] + vectors.values[values]
    )
    scenes[:, -questions:] = vectors.keys[keys[:, :questions]] + vectors.asking
    features = torch.randn(rows, frames, TOKENS, hidden, **options) * NOISE + scenes[:, :, None]

    ids = layout.ids.repeat(rows, 1)
    ids[:, layout.text :: 2] = FIRST_KEY + keys[:, questions:]
    ids[:, layout.text + 1 :: 2] = FIRST_VALUE + values[:, questions:]
    return Videos(features.flatten(0, 2), ids, FIRST_VALUE + values, places / (frames - questions))


# Training.


def answer_logits(model, layout, videos):
    """float32 [rows, 2 * questions, V], where the answers are predicted."""
    with autocast(videos.ids.device):
        logits = row_logits(model, videos.ids, layout.positions, videos.features, layout.plan)
    return logits[:, layout.places].float()


def losses_of(logits, videos):
    """The mean loss of each of KINDS: [2]."""
    losses = F.cross_entropy(logits.flatten(0, 1), videos.answers.flatten(), reduction="none")
    return losses.view(len(logits), len(KINDS), -1).mean((0, 2))


def length_at(rng, lengths, progress):
    """A length for the steps at `progress`: the longest that joined in, or any, half and half."""
    joined = lengths[: int(2 * progress * len(lengths)) + 1]
    return joined[-1] if rng.random() < 0.5 else rng.choice(joined)


def train(model, vectors, layouts, args, device, log):
    """Train the language model in place; measure and save it now and then."""
    model.model.visual.requires_grad_(False)
    trainer = Trainer(model.model.language_model.parameters(), args.lr)
    generator, rng = torch.Generator(device).manual_seed(args.seed), random.Random(args.seed)
    clock, step = Clock(args.steps, args.minutes), 0
    while not clock.is_over(step):
        layout = layouts[length_at(rng, list(layouts), clock.progress(step))]
        data = iter(lambda layout=layout: draw(vectors, layout, generator), None)
        total, speed = torch.zeros(len(KINDS), device=device), Speed(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(args.log_every):  # steps of one length, which they are the measure of
            videos = speed.wait_for(data)
            trainer.set_rate(step, clock.progress(step))
            losses = losses_of(answer_logits(model, layout, videos), videos)
            trainer.update(losses.mean())
            total += losses.detach()
            step += 1
        line = speed.per_step(args.log_every)
        loss = by_kind(total / args.log_every, 4)
        log(
            stage="training", step=step, tokens=layout.tokens, rows=layout.rows, loss=loss,
            skipped=int(trainer.skipped), **line,
        )  # fmt: skip
        if step % args.save_every < args.log_every:
            measured = measure(model, vectors, layouts, args.measured_rows, device)
            log(stage="measured", step=step, right=measured)
            save(model, args.out)


def by_kind(numbers, digits):
    return {kind: round(x, digits) for kind, x in zip(KINDS, numbers.tolist(), strict=True)}


@torch.no_grad()
def measure(model, vectors, layouts, rows, device):
    """By length, on at least `rows` videos never trained on: percent of right answers, in all and
    in equal parts of the video by where the needle is (a list, from the first on), and mean loss.
    """
    results = {}
    for tokens, layout in layouts.items():
        generator = torch.Generator(device).manual_seed(2**32 + tokens)
        right, count = torch.zeros(2, len(KINDS), DEPTHS, device=device)
        loss, batches = torch.zeros(len(KINDS), device=device), -(-rows // layout.rows)
        for _ in range(batches):
            videos = draw(vectors, layout, generator)
            logits = answer_logits(model, layout, videos)
            loss += losses_of(logits, videos) / batches
            hits = (logits.argmax(-1) == videos.answers).float()
            parts = F.one_hot((videos.depths * DEPTHS).long(), DEPTHS)
            count += parts.unflatten(1, (len(KINDS), -1)).sum((0, 2))
            right += (hits[..., None] * parts).unflatten(1, (len(KINDS), -1)).sum((0, 2))
        results[tokens] = {
            "all": by_kind(100 * right.sum(1) / count.sum(1), 1),
            "by_depth": [by_kind(part, 1) for part in (100 * right / count).T],
            "loss": by_kind(loss, 4),
        }
    return results


def parse(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--tokens", type=int, choices=LENGTHS, required=True, help="longest video")
    parser.add_argument("--attention", choices=("sparse", "dense"), default="sparse")
    parser.add_argument("--seed", type=int, default=0, help="of weights and videos")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, help="at most")
    parser.add_argument("--step-tokens", type=int, default=65536, help="vision tokens of a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--log-every", type=int, default=25, help="steps, all of one length")
    parser.add_argument("--save-every", type=int, default=500, help="steps")
    parser.add_argument("--measured-rows", type=int, default=32, help="videos a length, at least")
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    make_tiny_checkpoint.write_checkpoint(args.out, args.seed, config_of(args.attention))
    model = load(args.out, device, dense=args.attention == "dense")
    log = Log(args.out / "log.jsonl")
    log(settings={name: str(value) for name, value in vars(args).items()})
    lengths = [tokens for tokens in LENGTHS if tokens <= args.tokens]
    layouts = {
        tokens: make_layout(model, max(1, args.step_tokens // tokens), tokens, device)
        for tokens in lengths
    }
    vectors = make_vectors(TEXT["hidden_size"], device)
    train(model, vectors, layouts, args, device, log)
    measured = measure(model, vectors, layouts, 4 * args.measured_rows, device)
    log(stage="measured", step="last", right=measured)
    save(model, args.out)


if __name__ == "__main__":
    main()
