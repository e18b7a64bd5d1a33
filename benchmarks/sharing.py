"""How many different blocks neighbouring queries choose in a trained checkpoint.

    python benchmarks/sharing.py
    python benchmarks/sharing.py --model DIR --frames 64 128 256 --count 4
    python benchmarks/sharing.py --model out/needle --needle 4096 16384 65536

The kernels' time depends on it (docs/performance.md). The bundled clips and freshly rendered ones
of the given lengths (tools/make_clips.py, a seed that training never draws from) are read by the
processor and pass once through the model, on a GPU where there is one; with --needle it is videos
of so many tokens of tools/train_needle.py, which wrote the model. Every layer's choice is counted
over the tiles of the kernels, `64 // group` queries each, beside a choice of random past blocks at
the same lengths and sizes. Only tiles all of whose queries can choose are counted: those past the
first S blocks.
"""

import argparse
import functools
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from videonsa import ROOT  # noqa: E402
from videonsa.configuration_videonsa import VideoNSAConfig  # noqa: E402

import make_clips  # noqa: E402
import train_needle  # noqa: E402

QUESTION = "What happens?"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub id")
    parser.add_argument("--frames", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--count", type=int, default=4, help="rendered clips of each length")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--needle", type=int, nargs="+", help="vision tokens of its videos")
    args = parser.parse_args()
    if args.needle:
        return report_needles(args)
    model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True).eval()
    model.to(DEVICE)
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    report_clips("bundled clips", model, processor, sorted((ROOT / "examples/clips").glob("*.mp4")))
    for frames in args.frames:
        with tempfile.TemporaryDirectory() as folder:
            options = {"out": folder, "seed": args.seed, "count": args.count, "frames": frames}
            make_clips.main([part for key, x in options.items() for part in (f"--{key}", str(x))])
            videos = sorted(Path(folder).glob("videos/*.mp4"))
            report_clips(f"{len(videos)} clips of {frames} frames", model, processor, videos)


def report_clips(name, model, processor, videos):
    runs = [functools.partial(read_clip, model, processor, video) for video in videos]
    report(name, model, runs)


def report_needles(args):
    if not VideoNSAConfig.from_pretrained(args.model).text_config.nsa_enabled:
        raise ValueError(f"{args.model} was trained with dense attention, and chooses no blocks.")
    model = train_needle.load(Path(args.model), DEVICE).eval()
    vectors = train_needle.make_vectors(model.config.text_config.hidden_size, DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(args.seed)
    for tokens in args.needle:
        layout = train_needle.make_layout(model, 1, tokens, DEVICE)
        videos = [train_needle.draw(vectors, layout, generator) for _ in range(args.count)]
        answer = functools.partial(train_needle.answer_logits, model, layout)
        report(f"{args.count} videos", model, [functools.partial(answer, x) for x in videos])


def report(name, model, runs):
    """Print what was chosen in `runs`, functions that pass one video each through the model."""
    config = model.config.get_text_config()
    queries = max(1, 64 // (config.num_attention_heads // config.num_key_value_heads))
    block, selected = config.nsa_block_size, config.nsa_num_selected_blocks
    chosen, drawn, tokens = [], [], []
    for run in runs:
        for blocks in choices(model, run):
            chosen += different(blocks, queries, block)
            drawn += different(
                random_blocks(len(blocks), blocks.shape[1], block, selected), queries, block
            )
            tokens.append(len(blocks))
    if not chosen:
        print(f"{name}: too short, {max(tokens)} vision tokens")
        return
    chosen, drawn = torch.tensor(chosen), torch.tensor(drawn)
    print(
        f"{name}: {min(tokens)} to {max(tokens)} vision tokens, block {block}, {selected} chosen: "
        f"{queries} neighbours choose {chosen.mean():.1f} different blocks; at random "
        f"{drawn.mean():.1f}; all the same {selected}, nothing shared {queries * selected}",
        flush=True,
    )


@torch.no_grad()
def choices(model, run):
    """int32 [tokens, K, S] of every layer in a run of the model."""
    record = []
    layers = [layer.self_attn for layer in model.model.language_model.layers]
    for layer in layers:
        layer.watch_blocks = lambda blocks: record.append(blocks.cpu())
    try:
        run()
    finally:
        for layer in layers:
            layer.watch_blocks = None
    return record


def read_clip(model, processor, video):
    content = [{"type": "video", "video": str(video)}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"do_sample_frames": True, "max_frames": 10**6},
    )
    model(**inputs.to(DEVICE), logits_to_keep=1)


def random_blocks(tokens, kv_heads, block, selected):
    """The query's own block and past ones at random, int32 [tokens, K, S]."""
    own = torch.arange(tokens)[:, None, None] // block
    index = torch.arange(-(-tokens // block))
    score = torch.rand(tokens, kv_heads, len(index))
    score = score.masked_fill(index == own, 2.0).masked_fill(index > own, -1.0)
    best = score.topk(selected, dim=-1)
    return best.indices.masked_fill(best.values < 0, -1).int()


def different(blocks, queries, block):
    """Of each full tile past the first S blocks and each KV head: how many blocks it chose."""
    first = -(-blocks.shape[2] * block // queries)
    tiles = blocks[first * queries :]
    tiles = tiles[: len(tiles) // queries * queries].unflatten(0, (-1, queries))
    tiles = tiles.transpose(1, 2).flatten(2).sort(dim=-1).values  # [tiles, K, queries * S]
    new = (tiles.diff(dim=-1) != 0) & (tiles[..., 1:] >= 0)
    return (new.sum(-1) + (tiles[..., 0] >= 0)).flatten().float().tolist()


if __name__ == "__main__":
    main()
