"""How many different blocks neighbouring queries choose in a trained checkpoint, on the CPU.

    python benchmarks/sharing.py
    python benchmarks/sharing.py --model DIR --frames 64 128 256 --count 4

The kernels' time depends on it (docs/performance.md). The bundled clips and freshly rendered ones
of the given lengths (tools/make_clips.py, a seed that training never draws from) are read by the
processor and pass once through the model. Every layer's choice is counted over the tiles of the
kernels, `64 // group` queries each, beside a choice of random past blocks at the same lengths and
sizes. Only tiles all of whose queries can choose are counted: those past the first S blocks.
"""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from videonsa import ROOT  # noqa: E402

import make_clips  # noqa: E402

QUESTION = "What happens?"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub id")
    parser.add_argument("--frames", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--count", type=int, default=4, help="rendered clips of each length")
    parser.add_argument("--seed", type=int, default=1000)
    args = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    report("bundled clips", model, processor, sorted((ROOT / "examples/clips").glob("*.mp4")))
    for frames in args.frames:
        with tempfile.TemporaryDirectory() as folder:
            options = {"out": folder, "seed": args.seed, "count": args.count, "frames": frames}
            make_clips.main([part for key, x in options.items() for part in (f"--{key}", str(x))])
            videos = sorted(Path(folder).glob("videos/*.mp4"))
            report(f"{len(videos)} clips of {frames} frames", model, processor, videos)


def report(name, model, processor, videos):
    config = model.config.get_text_config()
    queries = max(1, 64 // (config.num_attention_heads // config.num_key_value_heads))
    block, selected = config.nsa_block_size, config.nsa_num_selected_blocks
    chosen, drawn, tokens = [], [], []
    for video in videos:
        for blocks in choices(model, processor, video):
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
def choices(model, processor, video):
    """int32 [tokens, K, S] of every layer."""
    content = [{"type": "video", "video": str(video)}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"do_sample_frames": True, "max_frames": 10**6},
    )
    package = type(model).__module__.rpartition(".")[0]
    reference = importlib.import_module(package + ".nsa_reference")
    select, record = reference.select_blocks, []

    def recorded(*args, **options):
        record.append(select(*args, **options))
        return record[-1]

    reference.select_blocks = recorded
    try:
        model(**inputs, logits_to_keep=1)
    finally:
        reference.select_blocks = select
    return record


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
