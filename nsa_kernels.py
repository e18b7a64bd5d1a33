"""The attention of VideoNSA in Triton: the public functions of nsa_reference.py, as kernels.

    o_j = g_cmp * compressed(j) + g_slc * selected(j) + g_win * window(j)        (VideoNSA, eq. 5)

Here are the whole layer and the backward of its gates; each branch has a file of its own, and
nsa_kernels_primitives.py holds what they share and its conventions.

Contract: float16, bfloat16 or float32 on a CUDA device; head sizes 16 to 128; softmax and sums in
          float32. The same inputs give the same bits, forward and backward.
Memory: beyond inputs and outputs, for T tokens in 16 bit: three branch outputs (6 H D bytes a
        token), 4 bytes per chosen block three times over, and scratch that does not grow with T
        (2 (D + 2) H S bytes for each of CHUNK queries, 0.3 GB of importance at a time).
Oracle: nsa_reference.py.

With do_b = gate_b * do, the backward of a branch needs gate_b * p and gate_b * p * (do.v - do.o_b).
Folding the gate into the log-sum-exp, lse_b - log2(gate_b), turns p into gate_b * p, so that no
branch needs a do of its own: all read do, and do.o_b is both their delta and the gate's gradient.
"""

import torch

from .nsa_kernels_choice import choose_blocks, select_blocks
from .nsa_kernels_compressed import (
    compress_blocks,
    compressed_attention,
    compressed_backward,
    compressed_forward,
    means_backward,
    means_forward,
)
from .nsa_kernels_dense import dense_attention
from .nsa_kernels_primitives import (
    check_inputs,
    load_rows,
    mean_starts,
    streams_of,
    tl,
    triton,
)
from .nsa_kernels_selected import (
    build_tile_lists,
    selected_attention,
    selected_dkv,
    selected_dq,
    selected_forward,
)
from .nsa_kernels_window import window_attention, window_dkv, window_dq, window_forward
from .nsa_reference import check_streams

__all__ = [
    "compress_blocks",
    "compressed_attention",
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
        do, gates, dgates, *outputs, *lses, *gated_lses, *deltas, n, D=do.shape[2], ROWS=ROWS
    )
    return dgates, list(zip(gated_lses, deltas, strict=True))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, gates, at, sizes, scale, keep):
        block_size, num_selected, window_size, num_initial, num_local = sizes
        with torch.cuda.device_of(q):
            cu_mean = mean_starts(at.cu_k, block_size)
            means = means_forward(k, v, at.cu_k, cu_mean, block_size)
            compressed, lse_cmp = compressed_forward(q, *means, at, cu_mean, block_size, scale)
            blocks = choose_blocks(
                q, means[0], lse_cmp, at, cu_mean, block_size, num_selected, num_initial,
                num_local, scale,
            )  # fmt: skip
            lists = build_tile_lists(q, blocks, at, block_size)
            selected, lse_slc = selected_forward(q, k, v, lists, scale)
            window, lse_win, o = window_forward(
                q, k, v, at, window_size, scale, gated=(gates, compressed, selected), keep=keep
            )
        if keep:
            ctx.save_for_backward(
                q, k, v, gates, *means, compressed, selected, window, lse_cmp, lse_slc, lse_win
            )
            ctx.at, ctx.lists, ctx.cu_mean = at, lists, cu_mean
            ctx.block_size, ctx.window_size, ctx.scale = block_size, window_size, scale
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, gates, k_mean, v_mean, *branches = ctx.saved_tensors
        at, scale, do = ctx.at, ctx.scale, do.contiguous()
        dgates, (compressed, selected, window) = _backward_of_gates(
            do, branches[:3], branches[3:], gates
        )
        dq, *means = compressed_backward(
            q, k_mean, v_mean, do, *compressed, at, ctx.cu_mean, ctx.block_size, scale
        )
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        means_backward(*means, dk, dv, at.cu_k, ctx.cu_mean, ctx.block_size)
        window_dq(q, k, v, do, *window, dq, at, ctx.window_size, scale)
        window_dkv(q, k, v, do, *window, dk, dv, at, ctx.window_size, scale)
        selected_dq(q, k, v, do, *selected, dq, ctx.lists, scale)
        selected_dkv(q, k, v, do, *selected, dk, dv, ctx.lists, scale)
        return dq, dk, dv, dgates, None, None, None, None


def nsa_attention(
    q,
    k,
    v,
    gates,
    cu_q,
    cu_k,
    *,
    block_size,
    num_selected,
    window_size,
    num_initial=0,
    num_local=1,
    scale=None,
):
    """The three branches, each weighted by its gate (VideoNSA, section 2.1).

    q [Tq, H, D]; k, v [Tk, K, D]; gates [Tq, H, 3], not negative, the weights of the compressed,
    the selected and the window branch. Returns o [Tq, H, D]. Differentiable in q, k, v and gates,
    not through the choice of the blocks.
    """
    check_streams(q, k, v, cu_q, cu_k)
    check_inputs("nsa_attention", q, k, v, head_dim=q.shape[2], block_size=block_size)
    if gates.shape != (*q.shape[:2], 3):
        raise ValueError(
            f"gates has shape {tuple(gates.shape)}; wanted one weight per query, head and branch, "
            f"{(*q.shape[:2], 3)}."
        )
    if not len(q):
        return torch.zeros_like(q)
    q, k, v, gates = (x.contiguous() for x in (q, k, v, gates))
    sizes = (block_size, num_selected, window_size, num_initial, num_local)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, gates))
    return _Attention.apply(q, k, v, gates, streams_of(q, k, cu_q, cu_k), sizes, scale, keep)
