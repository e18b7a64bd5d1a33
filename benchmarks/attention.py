"""Times the attention layer, forward and backward, beside dense attention: one GPU, bfloat16.

    python benchmarks/attention.py
    python benchmarks/attention.py --sizes 32768 --profile
    python benchmarks/attention.py --peers cudnn flex fla
    python benchmarks/attention.py --needle out/needle --heads 7 1 --sizes 4096 16384 65536

The layer is timed end to end, the choice of blocks included. Its cost depends on how much of their
choice neighbouring queries share, so it runs three times: "random" (every query picks its past
blocks independently, the worst case), "shared" (75 % of the picks are common to 18 neighbours)
and "computed" (what random q and k choose). The first two compute the choice at full cost and then
replace it. With --needle, the folder of a model of tools/train_needle.py, each of its layers is
timed, too, on the q, k, v and gates that it makes of one of its videos. Milliseconds are medians of
CUDA-event times after a warm-up, memory is the peak above the inputs.

"fla" is the NSA of flash-linear-attention, where it is installed. Groups of heads must be powers of
two from 16 there, so 28 heads are padded to 64, and it runs without the window, for which it would
need flash-attn. It computes its own choice.
"""

import argparse
import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from videonsa import nsa_kernels  # noqa: E402
from videonsa.nsa_kernels_choice import choose_blocks  # noqa: E402

import train_needle  # noqa: E402

BLOCK, SELECTED, WINDOW = 64, 32, 256
NEIGHBOURS = 18
ROWS = 9216  # queries whose picks are drawn at once, a multiple of NEIGHBOURS


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[8192, 32768, 65536, 131072])
    parser.add_argument("--heads", type=int, nargs=2, default=[28, 4], help="query, key/value")
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--choices", nargs="+", default=["random", "shared", "computed"])
    parser.add_argument("--peers", nargs="*", default=["cudnn", "flash"], choices=[*PEERS])
    parser.add_argument("--needle", type=Path, help="a trained model whose layers are timed too")
    parser.add_argument("--profile", action="store_true", help="device time of each kernel too")
    args = parser.parse_args()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}; "
        f"heads {args.heads}, head size {args.head_dim}, block {BLOCK}, {SELECTED} selected, "
        f"window {WINDOW}"
    )
    print(f"{'tokens':>7s} {'':16s} {'forward':>9s} {'fwd+bwd':>9s} ms {'GiB':>6s} {'GiB':>6s}")
    for tokens in args.sizes:
        bench(tokens, args)


def bench(tokens, args):
    torch.manual_seed(tokens)
    heads, kv_heads = args.heads
    q, k, v, do = (
        torch.randn(tokens, n, args.head_dim, device="cuda").bfloat16()
        for n in (heads, kv_heads, kv_heads, heads)
    )
    gates = torch.sigmoid(torch.randn(tokens, heads, 3, device="cuda")).bfloat16()
    inputs = [x.requires_grad_() for x in (q, k, v, gates)]
    for name in args.peers:
        measure(tokens, name, PEERS[name], inputs if name == "fla" else inputs[:3], do)
    for name in args.choices:
        measure_layer(tokens, name, inputs, do, args.profile)
    if args.needle:
        for index, own in enumerate(trained_inputs(args.needle, tokens)):
            measure_layer(tokens, f"layer {index}", own, do, args.profile)


def measure_layer(tokens, name, inputs, do, profiled):
    q, k = inputs[:2]
    with replaced_choice(name, tokens, k.shape[1]) as statistics:
        measure(tokens, name, layer, inputs, do)
        print(f"{'':24s} {statistics(q.shape[1] // k.shape[1])}")
        if profiled:
            profile(inputs, do)


def trained_inputs(folder, tokens):
    """q, k, v and gates of each layer of a model of tools/train_needle.py, on one of its videos."""
    device, seen = torch.device("cuda"), []
    model = train_needle.load(folder, device).eval()
    vectors = train_needle.make_vectors(model.config.text_config.hidden_size, device)
    layout = train_needle.make_layout(model, 1, tokens, device)
    video = train_needle.draw(vectors, layout, torch.Generator(device).manual_seed(tokens))
    attention = nsa_kernels.nsa_attention

    def record(*inputs, **settings):
        seen.append([x.detach().bfloat16().requires_grad_() for x in inputs[:4]])
        return attention(*inputs, **settings)

    nsa_kernels.nsa_attention = record
    try:
        with torch.no_grad():
            train_needle.answer_logits(model, layout, video)
    finally:
        nsa_kernels.nsa_attention = attention
    return seen


@functools.cache
def lengths(tokens):
    """Cumulative lengths of one sample: a model makes them once for all of its layers."""
    return torch.tensor([0, tokens], dtype=torch.int32, device="cuda")


def layer(q, k, v, gates):
    cu = lengths(len(q))
    return nsa_kernels.nsa_attention(
        q, k, v, gates, cu, cu, block_size=BLOCK, num_selected=SELECTED, window_size=WINDOW
    )


def sdpa(backend):
    def attention(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        with sdpa_kernel(backend):
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return o[0].transpose(0, 1)

    return attention


def flex(q, k, v):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens = len(q)
    if tokens not in FLEX_MASKS:
        FLEX_MASKS[tokens] = create_block_mask(
            lambda b, h, i, j: i >= j, None, None, tokens, tokens, device="cuda"
        )
        FLEX_MASKS.setdefault("kernel", torch.compile(flex_attention))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    o = FLEX_MASKS["kernel"](q, k, v, block_mask=FLEX_MASKS[tokens], enable_gqa=True)
    return o[0].transpose(0, 1)


FLEX_MASKS = {}


def fla(q, k, v, gates):
    from fla.ops.nsa import parallel_nsa

    group = len(q[0]) // len(k[0])
    padding = max(16, triton.next_power_of_2(group)) - group
    q = F.pad(q.unflatten(1, (-1, group)), (0, 0, 0, padding)).flatten(1, 2)
    gates = F.pad(gates.unflatten(1, (-1, group)), (0, 0, 0, padding)).flatten(1, 2)
    q, k, v, gates = (x[None] for x in (q, k, v, gates))
    o = parallel_nsa(q, k, v, gates[..., 0], gates[..., 1], block_counts=SELECTED, block_size=BLOCK)
    return o[0].unflatten(1, (-1, group + padding))[:, :, :group].flatten(1, 2)


PEERS = {
    "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "flex": flex,
    "fla": fla,
}


class replaced_choice:  # noqa: N801
    """Inside, the layer computes its choice and then takes the named one instead."""

    def __init__(self, name, tokens, kv_heads):
        self.blocks = None
        if name in ("random", "shared"):
            self.blocks = random_blocks(tokens, kv_heads, 0.75 if name == "shared" else 0.0)

    def __enter__(self):
        def choose(*args, **settings):
            self.last = choose_blocks(*args, **settings)
            if self.blocks is not None:
                self.last = self.blocks
            return self.last

        nsa_kernels.choose_blocks = choose
        return self.statistics

    def __exit__(self, *error):
        nsa_kernels.choose_blocks = choose_blocks

    def statistics(self, group):
        """How many different blocks the queries of one tile choose, of how many in all."""
        queries = max(1, 64 // group)
        tiles = len(self.last) // queries
        blocks = self.last[: tiles * queries].transpose(1, 2).unflatten(0, (tiles, queries))
        blocks = blocks.flatten(1, 2).sort(dim=1).values  # [tiles, queries * S, K]
        new = (blocks[:, 1:] != blocks[:, :-1]) & (blocks[:, 1:] >= 0)
        different = new.sum(1) + (blocks[:, 0] >= 0)
        return (
            f"{queries} neighbours choose {different.float().mean():.0f} different blocks "
            f"(nothing shared: {(blocks >= 0).sum(1).float().mean():.0f})"
        )


def random_blocks(tokens, kv_heads, shared):
    """int32 [tokens, K, S], ascending, own block included; `shared` of the picks are common."""
    num_blocks = triton.cdiv(tokens, BLOCK)
    taken = min(SELECTED, num_blocks)
    blocks = torch.full((tokens, kv_heads, SELECTED), -1, dtype=torch.int32, device="cuda")
    index = torch.arange(num_blocks, device="cuda")
    for h in range(kv_heads):
        for first in range(0, tokens, ROWS):
            t = torch.arange(first, min(first + ROWS, tokens), device="cuda")
            own = t[:, None] // BLOCK
            score = torch.rand(len(t), num_blocks, device="cuda")
            if shared:
                common = torch.rand(triton.cdiv(len(t), NEIGHBOURS), num_blocks, device="cuda")
                common = common[(t - first) // NEIGHBOURS]
                common.masked_fill_(index >= t[:, None] // NEIGHBOURS * NEIGHBOURS // BLOCK, -1)
                best = common.topk(min(round(shared * (SELECTED - 1)), num_blocks), dim=1)
                score.scatter_add_(1, best.indices, (best.values >= 0) * 10.0)
            score.masked_fill_(index > own, -1).scatter_(1, own, 100.0)
            best = score.topk(taken, dim=1)
            chosen = best.indices.masked_fill(best.values < 0, 1 << 30).sort(1).values
            blocks[t, h, :taken] = chosen.masked_fill(chosen == 1 << 30, -1).int()
    return blocks


def measure(tokens, name, attention, inputs, do):
    def forward():
        with torch.no_grad():
            attention(*inputs)

    def both():
        torch.autograd.grad(attention(*inputs), inputs, do)

    repeats = 7 if tokens <= 65536 else 5
    try:
        (fwd, fwd_gib), (fwd_bwd, fwd_bwd_gib) = timed(forward, repeats), timed(both, repeats)
    except (RuntimeError, ImportError) as error:
        print(f"{tokens:7d} {name:16s} {str(error).splitlines()[0][:90]}", flush=True)
        return
    print(
        f"{tokens:7d} {name:16s} {fwd:9.2f} {fwd_bwd:9.2f}    {fwd_gib:6.2f} {fwd_bwd_gib:6.2f}",
        flush=True,
    )


def timed(run, repeats):
    """Median ms, and the peak of memory above what was there, in GiB."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    return sorted(times)[repeats // 2], peak


def profile(inputs, do):
    """Device time of each kernel in one forward and backward."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        torch.autograd.grad(layer(*inputs), inputs, do)
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda e: -e.device_time_total)
    for e in events[:24]:
        print(f"{'':8s}{e.device_time_total / 1e3:8.2f} ms {e.count:4d} x {e.key[:70]}")


if __name__ == "__main__":
    main()
