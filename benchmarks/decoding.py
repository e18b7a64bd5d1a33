"""Times attention of one new token over a cache, per layer, beside torch's: one GPU, bfloat16.

    python benchmarks/decoding.py
    python benchmarks/decoding.py --sizes 131072 --batch 4

Each line is one recorded CUDA graph of as many layers as fit, each with a cache of its own, so that
no key is still in the GPU's own cache from the layer before. "ours" is `decode_attention`, "padded"
the same with a mask of padding; "gqa" is torch's attention as the library calls it for a cache that
grows, "expand" as it does with a mask, keys and values expanded to all query heads. Microseconds
are medians of replays; GB/s count keys and values once.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from videonsa import nsa_kernels  # noqa: E402

LAYERS = 28
GIB = 2**30
ROOM = 128  # of a cache, beyond its keys


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[8192, 55296, 131072])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, nargs=2, default=[28, 4], help="query, key/value")
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}; "
        f"batch {args.batch}, heads {args.heads}, head size {args.head_dim}"
    )
    print(f"{'keys':>7s} {'':8s} {'us':>8s} {'GB/s':>7s} {'layers':>7s}")
    for tokens in args.sizes:
        bench(tokens, args)


@torch.no_grad()
def bench(tokens, args):
    heads, kv_heads = args.heads
    shape = (args.batch, tokens + ROOM, kv_heads, args.head_dim)
    numbers = 2 * args.batch * tokens * kv_heads * args.head_dim
    layers = min(LAYERS, max(1, 24 * GIB // (2 * numbers)))
    caches = [
        [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in "kv"]
        for _ in range(layers)
    ]
    query = torch.randn(args.batch, heads, args.head_dim, device="cuda", dtype=torch.bfloat16)
    length = torch.tensor([tokens], device="cuda")
    valid = torch.ones(shape[:2], dtype=torch.bool, device="cuda")
    scale = args.head_dim**-0.5
    calls = {
        "ours": lambda k, v: nsa_kernels.decode_attention(query, k, v, length, None, scale),
        "padded": lambda k, v: nsa_kernels.decode_attention(query, k, v, length, valid, scale),
        "gqa": lambda k, v: sdpa(query, k[:, :tokens], v[:, :tokens], None, True),
        "expand": lambda k, v: sdpa(query, k, v, length, False),
    }
    for name, call in calls.items():
        try:
            us = timed(lambda call=call: [call(*cache) for cache in caches], args.repeats) / layers
        except torch.OutOfMemoryError as error:
            print(f"{tokens:7d} {name:8s} {str(error)[:80]}")
            continue
        print(f"{tokens:7d} {name:8s} {us:8.1f} {2 * numbers / us / 1e3:7.0f} {layers:7d}")


def sdpa(query, key, value, length, grouped):
    """torch's attention as transformers calls it: grouped without a mask, expanded with one."""
    query, key, value = query[:, :, None], key.transpose(1, 2), value.transpose(1, 2)
    if grouped:
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    mask = (torch.arange(key.shape[2], device="cuda") < length)[None, None, None]
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def timed(run, repeats):
    """Median microseconds of a recorded graph of `run`."""
    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return sorted(times)[repeats // 2]


if __name__ == "__main__":
    main()
