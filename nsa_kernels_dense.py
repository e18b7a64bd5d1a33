"""Dense causal attention in Triton for a few queries at given positions: the text rows.

A few queries cannot fill a GPU, so the keys of each tile of queries are split over programs, and
the float32 partial results are merged. Order: forward, merge, dq, dk and dv, launchers, public.
"""

import torch

from .nsa_checks import check_packed, check_shape
from .nsa_kernels_primitives import (
    TILE_ROWS,
    check_inputs,
    dkv_step,
    dot,
    dq_step,
    empty_softmax,
    fitting,
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
    store_softmax,
    tile_of,
    tl,
    triton,
)
from .nsa_reference import no_queries

KEYS = 64  # per step
MERGE_ROWS = 16  # per program
PROGRAMS = 528  # wanted at least: four for each multiprocessor of an H100


@triton.jit
def _share_of_keys(t, live, keys, split, num_splits, KEYS: tl.constexpr):
    """First and last (excluded) of the keys that this program takes of those the tile sees."""
    seen = tl.minimum(tl.max(tl.where(live, t, -1), 0) + 1, keys)
    share = tl.cdiv(tl.cdiv(seen, KEYS), num_splits) * KEYS
    return split * share, tl.minimum(seen, split * share + share)


@triton.jit(do_not_specialize=["num_samples", "num_splits", "num_rows"])
def _dense_forward(
    q_ptr, k_ptr, v_ptr, positions_ptr, o_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, num_samples,
    num_splits, num_rows, scale,
    H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Owns: a tile of QUERIES queries with all heads of a group, and one share of their keys.
    Reads: q [Tq, H, D] and positions [Tq] of the tile; k, v [Tk, K, D] of the share.
    Writes: the share's o [num_splits, Tq, H, D] and base-2 lse [num_splits, Tq, H] of the tile.
    """
    split, kv_head = tl.program_id(1), tl.program_id(2)
    sample, first, count, _ = query_tile(tl.program_id(0), cu_q_ptr, cu_k_ptr, num_samples, QUERIES)
    if count <= 0:
        return
    query, rows, live = packed_rows(first, count, kv_head, H, G, ROWS)
    t = tl.load(positions_ptr + first + query, mask=live, other=-1)
    q = load_rows(q_ptr, rows, live, D)
    acc, row_max, row_sum = empty_softmax(ROWS, D)
    start, keys = span(sample, cu_k_ptr)
    begin, end = _share_of_keys(t, live, keys, split, num_splits, KEYS)
    for j in range(begin, end, KEYS):
        key = j + tl.arange(0, KEYS)
        k, v = load_keys(k_ptr, v_ptr, start + key, key < end, kv_head, K, D)
        s = dot(q, tl.trans(k)) * scale
        visible = (key[None, :] <= t[:, None]) & (key < end)[None, :]
        s = tl.where(visible, s, float("-inf"))
        acc, row_max, row_sum = softmax_step(s, v, acc, row_max, row_sum)
    rows += split.to(tl.int64) * num_rows
    store_softmax(o_ptr, lse_ptr, rows, live, acc, row_max, row_sum, D)


@triton.jit(do_not_specialize=["num_splits", "num_rows"])
def _merge(
    parts_ptr, part_lse_ptr, o_ptr, lse_ptr, num_splits, num_rows,
    D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Owns: ROWS rows, each one query and head; num_rows = Tq * H.
    Reads: the parts float32 [num_splits, num_rows, D] and their base-2 lse [num_splits, num_rows].
    Writes: o [num_rows, D] and base-2 lse [num_rows].
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < num_rows
    acc, row_max, row_sum = empty_softmax(ROWS, D)
    for _ in range(num_splits):
        lse = tl.load(part_lse_ptr + rows, mask=live, other=float("inf"))
        lse = tl.where(lse == float("inf"), float("-inf"), lse)  # this part saw no key
        new_max = tl.maximum(row_max, lse)
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale, p = tl.exp2(row_max - finite_max), tl.exp2(lse - finite_max)
        acc = acc * rescale[:, None] + load_rows(parts_ptr, rows, live, D) * p[:, None]
        row_max, row_sum = new_max, row_sum * rescale + p
        parts_ptr += num_rows.to(tl.int64) * D
        part_lse_ptr += num_rows
    store_softmax(o_ptr, lse_ptr, rows, live, acc, row_max, row_sum, D)


@triton.jit(do_not_specialize=["num_samples", "num_splits", "num_rows"])
def _dense_dq(
    q_ptr, k_ptr, v_ptr, positions_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, cu_q_ptr, cu_k_ptr,
    num_samples, num_splits, num_rows, scale, dq_scale,
    H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Owns: a tile of QUERIES queries with all heads of a group, and one share of their keys.
    Reads: q, do [Tq, H, D], positions [Tq], lse, delta [Tq, H] of the tile; k, v [Tk, K, D].
    Writes: the share's part of dq, float32 [num_splits, Tq, H, D], of the tile.
    """
    split, kv_head = tl.program_id(1), tl.program_id(2)
    sample, first, count, _ = query_tile(tl.program_id(0), cu_q_ptr, cu_k_ptr, num_samples, QUERIES)
    if count <= 0:
        return
    query, rows, live = packed_rows(first, count, kv_head, H, G, ROWS)
    t = tl.load(positions_ptr + first + query, mask=live, other=-1)
    q, do, lse, delta = load_queries(q_ptr, do_ptr, lse_ptr, delta_ptr, rows, live, D)
    dq = tl.zeros([ROWS, D], tl.float32)
    start, keys = span(sample, cu_k_ptr)
    begin, end = _share_of_keys(t, live, keys, split, num_splits, KEYS)
    for j in range(begin, end, KEYS):
        key = j + tl.arange(0, KEYS)
        k, v = load_keys(k_ptr, v_ptr, start + key, key < end, kv_head, K, D)
        visible = (key[None, :] <= t[:, None]) & (key < end)[None, :]
        dq = dq_step(dq, q, k, v, do, lse, delta, visible, scale)
    rows += split.to(tl.int64) * num_rows
    store_rows(dq_ptr, rows, dq * dq_scale, live, D)


@triton.jit(do_not_specialize=["num_samples"])
def _dense_dkv(
    q_ptr, k_ptr, v_ptr, positions_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_q_ptr,
    cu_k_ptr, num_samples, scale, dk_scale,
    H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Owns: a tile of KEYS keys of one KV head.
    Reads: k, v [Tk, K, D] of the tile; q, do [Tq, H, D], positions [Tq], lse, delta [Tq, H] of
    all queries of the sample.
    Writes: dk, dv [Tk, K, D] of the tile.
    """
    kv_head = tl.program_id(1)
    sample, offset = locate(tl.program_id(0), cu_k_ptr, num_samples, KEYS)
    start, keys = span(sample, cu_k_ptr)
    if offset >= keys:
        return
    key = offset + tl.arange(0, KEYS)
    k, v = load_keys(k_ptr, v_ptr, start + key, key < keys, kv_head, K, D)
    dk = tl.zeros([KEYS, D], tl.float32)
    dv = tl.zeros([KEYS, D], tl.float32)
    first, queries = span(sample, cu_q_ptr)
    for j in range(0, queries, QUERIES):
        query, rows, live = packed_rows(first + j, queries - j, kv_head, H, G, ROWS)
        live = live & (query < QUERIES)
        t = tl.load(positions_ptr + first + j + query, mask=live, other=-1)
        q, do, lse, delta = load_queries(q_ptr, do_ptr, lse_ptr, delta_ptr, rows, live, D)
        visible = key[None, :] <= t[:, None]
        dk, dv = dkv_step(dk, dv, q, k, v, do, lse, delta, visible, scale)
    rows = (start + key).to(tl.int64) * K + kv_head
    store_rows(dk_ptr, rows, dk * dk_scale, key < keys, D)
    store_rows(dv_ptr, rows, dv, key < keys, D)


def _sizes(q, k, wanted_stages):
    return dict(
        KEYS=fitting(q, KEYS), **heads_of(q, k),
        **tile_of(q.shape[1] // k.shape[1], fitting(q, TILE_ROWS)),
        num_warps=4, num_stages=stages(q, wanted_stages),
    )  # fmt: skip


def _grid(sizes, k, lengths):
    """Tiles of queries, splits of their keys, key/value heads."""
    tiles = lengths.query_tiles(sizes["QUERIES"])
    splits = triton.cdiv(PROGRAMS, tiles * k.shape[1])
    return tiles, min(splits, triton.cdiv(lengths.keys, 4 * KEYS)), k.shape[1]


class _DenseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, positions, lengths, scale):
        sizes = _sizes(q, k, 3)
        grid = _grid(sizes, k, lengths)
        splits, rows = grid[1], q.shape[0] * q.shape[1]
        o, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        parts, part_lse = o, lse
        if splits > 1:
            parts = q.new_empty(splits, *q.shape, dtype=torch.float32)
            part_lse = q.new_empty(splits, *q.shape[:2], dtype=torch.float32)
        with torch.cuda.device_of(q):
            _dense_forward[grid](
                q, k, v, positions, parts, part_lse, **lengths.arguments, num_splits=splits,
                num_rows=rows, scale=scales(q, scale)[1], **sizes,
            )  # fmt: skip
            if splits > 1:
                _merge[(triton.cdiv(rows, MERGE_ROWS),)](
                    parts, part_lse, o, lse, num_splits=splits, num_rows=rows, D=q.shape[2],
                    ROWS=MERGE_ROWS,
                )  # fmt: skip
        ctx.save_for_backward(q, k, v, positions, o, lse)
        ctx.lengths, ctx.scale = lengths, scale
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, positions, o, lse = ctx.saved_tensors
        lengths, (score_scale, scale) = ctx.lengths, scales(q, ctx.scale)
        do = do.contiguous()
        inputs = (q, k, v, positions, do, lse, row_deltas(do, o))
        sizes = _sizes(q, k, 2)
        grid = _grid(sizes, k, lengths)
        splits, rows = grid[1], q.shape[0] * q.shape[1]
        dq = q.new_empty(splits, *q.shape, dtype=torch.float32)
        _dense_dq[grid](
            *inputs, dq, **lengths.arguments, num_splits=splits, num_rows=rows, scale=scale,
            dq_scale=score_scale, **sizes,
        )  # fmt: skip
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        _dense_dkv[(lengths.key_blocks(sizes["KEYS"]), k.shape[1])](
            *inputs, dk, dv, **lengths.arguments, scale=scale, dk_scale=score_scale, **sizes
        )
        return dq.sum(0).to(q.dtype), dk, dv, None, None, None


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal softmax attention of queries at given positions to all keys of their sample.

    q [Tq, H, D]; k, v [Tk, K, D]; positions int [Tq]: where each query stands among its sample's
    keys; it sees the keys up to and including that one. Returns o [Tq, H, D]. Differentiable in
    q, k, v.
    """
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k)
    check_shape("positions", positions, q.shape[:1], "one position per query")
    check_inputs("dense_attention", q, k, v, head_dim=q.shape[2])
    lengths = packed_lengths(q, k, cu_seqlens_q, cu_seqlens_k)
    if not len(q):
        return no_queries(q, k, v)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    positions = positions.to(q.device, torch.int32).contiguous()
    return _DenseAttention.apply(q, k, v, positions, lengths, scale)
