"""Window branch in Triton: the last `window_size` tokens.

Order: forward, dq, dk and dv, launchers, public function.
"""

import torch

from .nsa_checks import check_packed
from .nsa_kernels_primitives import (
    TILE_ROWS,
    add_rows,
    check_inputs,
    dkv_step,
    dot,
    dq_step,
    empty_softmax,
    fitting,
    for_three_programs,
    heads_of,
    load_keys,
    load_queries,
    load_rows,
    locate,
    packed_lengths,
    packed_rows,
    query_tile,
    row_deltas,
    scales,
    softmax_step,
    span,
    stages,
    store_rows,
    tile_of,
    tl,
    triton,
)
from .nsa_reference import no_queries

KEYS = 32  # per step; 64 is 20-30 % slower on an H100
DKV_KEYS = 64


@triton.jit
def _in_window(position, key, WINDOW: tl.constexpr):
    """Whether the key is one of the WINDOW last tokens at the position, its own counted."""
    return (key <= position) & (key > position - WINDOW)


@triton.jit
def _gate(gates_ptr, rows, live, BRANCH: tl.constexpr):
    """The gates of one branch, float32 [rows, 1], from gates [Tq, H, 3]."""
    return tl.load(gates_ptr + rows * 3 + BRANCH, mask=live, other=0.0).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["num_samples"])
def _window_forward(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, gates_ptr, compressed_ptr, selected_ptr, sum_ptr,
    cu_q_ptr, cu_k_ptr, num_samples, scale,
    WINDOW: tl.constexpr, H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Owns: a tile of QUERIES queries with all heads of one KV head's group.
    Reads: q [Tq, H, D] of the tile, k, v [Tk, K, D] of its window; for the gated sum also gates
    [Tq, H, 3] and the outputs compressed, selected [Tq, H, D].
    Writes: o [Tq, H, D] and base-2 lse [Tq, H] unless o_ptr is None; the sum of the three
    branches [Tq, H, D] unless sum_ptr is None.
    """
    kv_head = tl.program_id(1)
    sample, first, count, position = query_tile(
        tl.program_id(0), cu_q_ptr, cu_k_ptr, num_samples, QUERIES
    )
    if count <= 0:
        return
    query, rows, live = packed_rows(first, count, kv_head, H, G, ROWS)
    t = position + query
    q = load_rows(q_ptr, rows, live, D)
    acc, row_max, row_sum = empty_softmax(ROWS, D)
    start, _ = span(sample, cu_k_ptr)
    oldest = tl.maximum(position - WINDOW + 1, 0) // KEYS * KEYS
    for j in range(oldest, position + count, KEYS):
        key = j + tl.arange(0, KEYS)
        k, v = load_keys(k_ptr, v_ptr, start + key, key < position + count, kv_head, K, D)
        s = dot(q, tl.trans(k)) * scale
        s = tl.where(_in_window(t[:, None], key[None, :], WINDOW), s, float("-inf"))
        acc, row_max, row_sum = softmax_step(s, v, acc, row_max, row_sum)
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    if o_ptr is not None:
        store_rows(o_ptr, rows, acc, live, D)
        tl.store(lse_ptr + rows, row_max + tl.log2(row_sum), mask=live)
    if sum_ptr is not None:
        total = load_rows(compressed_ptr, rows, live, D).to(tl.float32)
        total *= _gate(gates_ptr, rows, live, 0)
        selected = load_rows(selected_ptr, rows, live, D).to(tl.float32)
        total += selected * _gate(gates_ptr, rows, live, 1)
        window = acc.to(q.dtype).to(tl.float32)  # rounded, as the other two are
        store_rows(sum_ptr, rows, total + window * _gate(gates_ptr, rows, live, 2), live, D)


@triton.jit(do_not_specialize=["num_samples"])
def _window_dq(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, cu_q_ptr, cu_k_ptr, num_samples,
    scale, dq_scale,
    WINDOW: tl.constexpr, H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Owns: a tile of QUERIES queries with all heads of one KV head's group.
    Reads: q, do [Tq, H, D], lse, delta [Tq, H] of the tile; k, v [Tk, K, D] of its window.
    Writes: adds to dq [Tq, H, D] of the tile.
    """
    kv_head = tl.program_id(1)
    sample, first, count, position = query_tile(
        tl.program_id(0), cu_q_ptr, cu_k_ptr, num_samples, QUERIES
    )
    if count <= 0:
        return
    query, rows, live = packed_rows(first, count, kv_head, H, G, ROWS)
    q, do, lse, delta = load_queries(q_ptr, do_ptr, lse_ptr, delta_ptr, rows, live, D)
    dq = tl.zeros([ROWS, D], tl.float32)
    start, _ = span(sample, cu_k_ptr)
    oldest = tl.maximum(position - WINDOW + 1, 0) // KEYS * KEYS
    for j in range(oldest, position + count, KEYS):
        key = j + tl.arange(0, KEYS)
        k, v = load_keys(k_ptr, v_ptr, start + key, key < position + count, kv_head, K, D)
        visible = _in_window((position + query)[:, None], key[None, :], WINDOW)
        dq = dq_step(dq, q, k, v, do, lse, delta, visible, scale)
    add_rows(dq_ptr, rows, dq * dq_scale, live, D)


@triton.jit(do_not_specialize=["num_samples"])
def _window_dkv(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr,
    num_samples, scale, dk_scale,
    WINDOW: tl.constexpr, H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Owns: a tile of KEYS keys of one KV head.
    Reads: k, v [Tk, K, D] of the tile; q, do [Tq, H, D], lse, delta [Tq, H] whose window meets it.
    Writes: adds to dk, dv [Tk, K, D] of the tile.
    """
    kv_head = tl.program_id(1)
    sample, offset = locate(tl.program_id(0), cu_k_ptr, num_samples, KEYS)
    start, length = span(sample, cu_k_ptr)
    if offset >= length:
        return
    key = offset + tl.arange(0, KEYS)
    k, v = load_keys(k_ptr, v_ptr, start + key, key < length, kv_head, K, D)
    dk = tl.zeros([KEYS, D], tl.float32)
    dv = tl.zeros([KEYS, D], tl.float32)
    first, queries = span(sample, cu_q_ptr)
    cached = length - queries
    end = tl.minimum(length, offset + KEYS - 1 + WINDOW)
    oldest = tl.maximum(offset, cached)
    query, rows, _ = packed_rows(first - cached, QUERIES, kv_head, H, G, ROWS)
    for j in range(oldest, end, QUERIES):
        live = query < tl.minimum(QUERIES, end - j)
        q, do, lse, delta = load_queries(
            q_ptr, do_ptr, lse_ptr, delta_ptr, rows + tl.cast(j, tl.int64) * H, live, D
        )
        visible = _in_window((j + query)[:, None], key[None, :], WINDOW)
        dk, dv = dkv_step(dk, dv, q, k, v, do, lse, delta, visible, scale)
    rows = (start + key).to(tl.int64) * K + kv_head
    add_rows(dk_ptr, rows, dk * dk_scale, key < length, D)
    add_rows(dv_ptr, rows, dv, key < length, D)


def _sizes(q, k, window_size, wanted_stages):
    return dict(
        WINDOW=window_size, KEYS=fitting(q, KEYS), **heads_of(q, k),
        **tile_of(q.shape[1] // k.shape[1], fitting(q, TILE_ROWS)), num_warps=4,
        num_stages=stages(q, wanted_stages),
    )  # fmt: skip


def window_forward(q, k, v, lengths, *, window_size, scale, gated=None, keep=True):
    """o [Tq, H, D] and base-2 lse [Tq, H], or None for both where not kept.

    With `gated`, gates [Tq, H, 3] and the outputs of the compressed and the selected branch, also
    the gated sum of the three branches: it costs least where one of them is in registers.
    """
    sizes = _sizes(q, k, window_size, 3)
    o = torch.empty_like(q) if keep else None
    lse = q.new_empty(q.shape[:2], dtype=torch.float32) if keep else None
    total = torch.empty_like(q) if gated else None
    gates, compressed, selected = gated or (None, None, None)
    _window_forward[(lengths.query_tiles(sizes["QUERIES"]), k.shape[1])](
        q, k, v, o, lse, gates, compressed, selected, total, **lengths.arguments,
        scale=scales(q, scale)[1], maxnreg=for_three_programs(q), **sizes,
    )  # fmt: skip
    return o, lse, total


def window_dq(q, k, v, do, lse, delta, dq, lengths, *, window_size, scale):
    """Add this branch's gradient to dq in place."""
    sizes = _sizes(q, k, window_size, 2)
    score_scale, scale = scales(q, scale)
    _window_dq[(lengths.query_tiles(sizes["QUERIES"]), k.shape[1])](
        q, k, v, do, lse, delta, dq, **lengths.arguments, scale=scale, dq_scale=score_scale,
        **sizes,
    )  # fmt: skip


def window_dkv(q, k, v, do, lse, delta, dk, dv, lengths, *, window_size, scale):
    """Add this branch's gradients to dk and dv in place."""
    keys, (score_scale, scale) = fitting(q, DKV_KEYS), scales(q, scale)
    sizes = _sizes(q, k, window_size, 2) | {"KEYS": keys}
    _window_dkv[(lengths.key_blocks(keys), k.shape[1])](
        q, k, v, do, lse, delta, dk, dv, **lengths.arguments, scale=scale, dk_scale=score_scale,
        **sizes,
    )  # fmt: skip


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lengths, window_size, scale):
        ctx.lengths, ctx.settings = lengths, {"window_size": window_size, "scale": scale}
        with torch.cuda.device_of(q):
            o, lse, _ = window_forward(q, k, v, lengths, **ctx.settings)
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        do = do.contiguous()
        inputs = (q, k, v, do, lse, row_deltas(do, o))
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        window_dq(*inputs, dq, ctx.lengths, **ctx.settings)
        window_dkv(*inputs, dk, dv, ctx.lengths, **ctx.settings)
        return dq, dk, dv, None, None, None


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    window_size: int,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention to the last `window_size` tokens, the query's own counted (eq. 5).

    q [Tq, H, D]; k, v [Tk, K, D]. Returns o [Tq, H, D]. Differentiable in q, k, v.
    """
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k)
    check_inputs("window_attention", q, k, v, head_dim=q.shape[2])
    lengths = packed_lengths(q, k, cu_seqlens_q, cu_seqlens_k)
    if not len(q):
        return no_queries(q, k, v)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return _WindowAttention.apply(q, k, v, lengths, window_size, scale)
