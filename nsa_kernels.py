"""The attention of VideoNSA in Triton: the public functions of nsa_reference.py, as kernels.

    o_j = g_cmp * compressed(j) + g_slc * selected(j) + g_win * window(j)        (VideoNSA, eq. 5)

Here are the whole layer and the backward of its gates; each branch has a file of its own, and
nsa_kernels_primitives.py holds what they share and its conventions.

Contract: float16, bfloat16 or float32 on a CUDA device; head sizes 16 to 128; softmax and sums in
          float32. The same inputs give the same bits, forward and backward. Lengths that are
          on the GPU are not read: where they do not fit the tensors, results are undefined.
        `decode_attention` takes a cache in place of packed rows, and has no gradient.
Memory: beyond inputs and outputs, for T tokens in 16 bit: three branch outputs (6 H D bytes a
        token), 4 bytes per chosen block three times over, and scratch that does not grow with T
        (2 (D + 2) H S bytes for each of CHUNK_QUERIES queries, or, without a backward, of fewer on
        a GPU that is nearly full; 0.3 GB of importance at a time).
Oracle: nsa_reference.py.

With do_b = gate_b * do, the backward of a branch needs gate_b * p and gate_b * p * (do.v - do.o_b).
Folding the gate into the log-sum-exp, lse_b - log2(gate_b), turns p into gate_b * p, so that no
branch needs a do of its own: all read do, and do.o_b is both their delta and the gate's gradient.
"""

from collections.abc import Callable

import torch

from .nsa_checks import check_gates, check_packed
from .nsa_kernels_choice import choose_blocks, select_blocks
from .nsa_kernels_compressed import (
    compress_blocks,
    compressed_attention,
    compressed_backward,
    compressed_forward,
    means_backward,
    means_forward,
)
from .nsa_kernels_decode import decode_attention
from .nsa_kernels_dense import dense_attention
from .nsa_kernels_primitives import (
    check_inputs,
    load_rows,
    mean_starts,
    packed_lengths,
    tl,
    triton,
)
from .nsa_kernels_selected import (
    selected_attention,
    selected_dkv,
    selected_dq,
    selected_forward,
)
from .nsa_kernels_tiles import build_tile_lists
from .nsa_kernels_window import window_attention, window_dkv, window_dq, window_forward
from .nsa_reference import no_queries

__all__ = [
    "compress_blocks",
    "compressed_attention",
    "decode_attention",
    "dense_attention",
    "nsa_attention",
    "select_blocks",
    "selected_attention",
    "window_attention",
]

ROWS = 16


@triton.jit
def _branch_backward(
    do, o_ptr, lse_ptr, gate_ptr, dgate_ptr, gated_lse_ptr, delta_ptr, rows, live,
    BRANCH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One branch of `_gates_backward`, for its tile do [ROWS, D]."""
    delta = tl.sum(do * load_rows(o_ptr, rows, live, D).to(tl.float32), 1)
    gate = tl.load(gate_ptr + rows * 3 + BRANCH, mask=live, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + rows, mask=live, other=0.0)
    tl.store(dgate_ptr + rows * 3 + BRANCH, delta.to(dgate_ptr.dtype.element_ty), mask=live)
    tl.store(delta_ptr + rows, delta, mask=live)
    tl.store(gated_lse_ptr + rows, lse - tl.log2(gate), mask=live)  # +inf for a closed gate


@triton.jit(do_not_specialize=["num_rows"])
def _gates_backward(
    do_ptr, gate_ptr, dgate_ptr, o0, o1, o2, lse0, lse1, lse2, gated0, gated1, gated2,
    delta0, delta1, delta2, num_rows, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Owns: ROWS rows, each one query and head; num_rows = Tq * H.
    Reads: do [Tq, H, D], gates [Tq, H, 3], and of each branch o [Tq, H, D] and base-2 lse [Tq, H].
    Writes: dgates [Tq, H, 3], and of each branch lse with its gate folded in and delta [Tq, H].
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < num_rows
    do = load_rows(do_ptr, rows, live, D).to(tl.float32)
    _branch_backward(do, o0, lse0, gate_ptr, dgate_ptr, gated0, delta0, rows, live, 0, D)
    _branch_backward(do, o1, lse1, gate_ptr, dgate_ptr, gated1, delta1, rows, live, 1, D)
    _branch_backward(do, o2, lse2, gate_ptr, dgate_ptr, gated2, delta2, rows, live, 2, D)


def _backward_of_gates(do, outputs, lses, gates):
    """dgates, then each branch's lse with its gate folded in and delta, all float32 [Tq, H]."""
    n = do.shape[0] * do.shape[1]
    dgates = torch.empty_like(gates)
    gated_lses, deltas = ([torch.empty_like(x) for x in lses] for _ in range(2))
    _gates_backward[(triton.cdiv(n, ROWS),)](
        do, gates, dgates, *outputs, *lses, *gated_lses, *deltas, num_rows=n, D=do.shape[2],
        ROWS=ROWS,
    )  # fmt: skip
    return dgates, list(zip(gated_lses, deltas, strict=True))


class _Attention(torch.autograd.Function):
    """The layer. choice: what `choose_blocks` takes besides; keep: what a backward needs."""

    @staticmethod
    def forward(ctx, q, k, v, gates, lengths, block_size, window_size, choice, scale, keep, watch):
        blocked = {"block_size": block_size, "scale": scale}
        windowed = {"window_size": window_size, "scale": scale}
        with torch.cuda.device_of(q):
            cu_mean = mean_starts(lengths.cu_k, block_size)
            k_mean, v_mean = means_forward(k, v, lengths.cu_k, cu_mean, block_size=block_size)
            compressed, lse_cmp = compressed_forward(q, k_mean, v_mean, lengths, cu_mean, **blocked)
            blocks = choose_blocks(q, k_mean, lse_cmp, lengths, cu_mean, **blocked, **choice)
            if watch is not None:
                watch(blocks)
            lists = build_tile_lists(q, blocks, lengths, block_size=block_size, keep=keep)
            selected, lse_slc = selected_forward(q, k, v, lists, scale=scale)
            window, lse_win, o = window_forward(
                q, k, v, lengths, **windowed, gated=(gates, compressed, selected), keep=keep
            )
        if keep:
            ctx.save_for_backward(
                q, k, v, gates, k_mean, v_mean, compressed, selected, window, lse_cmp, lse_slc,
                lse_win,
            )  # fmt: skip
            ctx.lengths, ctx.lists, ctx.cu_mean = lengths, lists, cu_mean
            ctx.blocked, ctx.windowed, ctx.scale = blocked, windowed, scale
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, gates, k_mean, v_mean, *branches = ctx.saved_tensors
        lengths, cu_mean, scale, do = ctx.lengths, ctx.cu_mean, ctx.scale, do.contiguous()
        dgates, (compressed, selected, window) = _backward_of_gates(
            do, branches[:3], branches[3:], gates
        )
        dq, dk_mean, dv_mean = compressed_backward(
            q, k_mean, v_mean, do, *compressed, lengths, cu_mean, **ctx.blocked
        )
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        block_size = ctx.blocked["block_size"]
        means_backward(dk_mean, dv_mean, dk, dv, lengths.cu_k, cu_mean, block_size=block_size)
        window_dq(q, k, v, do, *window, dq, lengths, **ctx.windowed)
        window_dkv(q, k, v, do, *window, dk, dv, lengths, **ctx.windowed)
        selected_dq(q, k, v, do, *selected, dq, ctx.lists, scale=scale)
        selected_dkv(q, k, v, do, *selected, dk, dv, ctx.lists, scale=scale)
        return dq, dk, dv, dgates, *[None] * 7


def nsa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    block_size: int,
    num_selected: int,
    window_size: int,
    num_initial: int = 0,
    num_local: int = 1,
    scale: float | None = None,
    watch_blocks: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """The three branches, each weighted by its gate (VideoNSA, section 2.1).

    q [Tq, H, D]; k, v [Tk, K, D]; gates [Tq, H, 3], not negative, the weights of the compressed,
    the selected and the window branch. Returns o [Tq, H, D]. Differentiable in q, k, v and gates,
    not through the choice of the blocks, which watch_blocks is called with, as `select_blocks`
    returns it.
    """
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k)
    check_inputs("nsa_attention", q, k, v, head_dim=q.shape[2], block_size=block_size)
    check_gates(gates, q)
    lengths = packed_lengths(q, k, cu_seqlens_q, cu_seqlens_k)
    if not len(q):
        return no_queries(q, k, v, gates)
    q, k, v, gates = (x.contiguous() for x in (q, k, v, gates))
    choice = {"num_selected": num_selected, "num_initial": num_initial, "num_local": num_local}
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, gates))
    return _Attention.apply(
        q, k, v, gates, lengths, block_size, window_size, choice, scale, keep, watch_blocks
    )
