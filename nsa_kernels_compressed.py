"""Compressed branch in Triton: block means, and attention over the means of complete blocks.

Order: means (forward, backward), attention (forward, dq, dk and dv), launchers, public functions.
"""

import torch

from .nsa_checks import check_ends, check_keys, check_packed
from .nsa_kernels_primitives import (
    TILE_ROWS,
    check_inputs,
    dkv_step,
    dot,
    dq_step,
    empty_softmax,
    first_to_see,
    fitting,
    heads_of,
    is_complete,
    load_keys,
    load_queries,
    load_rows,
    locate,
    mean_starts,
    num_complete,
    packed_lengths,
    query_tile,
    row_deltas,
    scales,
    softmax_step,
    span,
    stages,
    store_rows,
    store_softmax,
    tl,
    triton,
)
from .nsa_reference import no_queries

LN_2 = 0.6931471805599453
MEANS = 64  # per step
QUERY_PARTS = 16  # dk/dv: the queries of a tile of means are shared by up to this many programs
PARTIAL_ROWS = 2**15  # dk/dv: means times parts, which bounds the float32 partial sums


@triton.jit(do_not_specialize=["num_samples"])
def _mean_forward(
    k_ptr, v_ptr, k_mean_ptr, v_mean_ptr, cu_k_ptr, cu_mean_ptr, num_samples,
    K: tl.constexpr, D: tl.constexpr, B: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Owns: one block of one KV head, complete or not.
    Reads: k, v [Tk, K, D] of its B tokens.
    Writes: k_mean, v_mean [Tk // B, K, D], one row of each where the block is complete.
    """
    sample, offset = locate(tl.program_id(0), cu_k_ptr, num_samples, B)
    kv_head = tl.program_id(1)
    start, length = span(sample, cu_k_ptr)
    if offset + B <= length:
        i = tl.arange(0, STEP)
        k_sum = tl.zeros([D], tl.float32)
        v_sum = tl.zeros([D], tl.float32)
        for j in range(0, B, STEP):
            k, v = load_keys(k_ptr, v_ptr, start + offset + j + i, i < STEP, kv_head, K, D)
            k_sum += tl.sum(k.to(tl.float32), 0)
            v_sum += tl.sum(v.to(tl.float32), 0)
        mean = (tl.load(cu_mean_ptr + sample) + offset // B).to(tl.int64) * K + kv_head
        offsets = mean * D + tl.arange(0, D)
        tl.store(k_mean_ptr + offsets, (k_sum / B).to(k_mean_ptr.dtype.element_ty))
        tl.store(v_mean_ptr + offsets, (v_sum / B).to(v_mean_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["num_samples"])
def _mean_backward(
    dk_mean_ptr, dv_mean_ptr, dk_ptr, dv_ptr, cu_k_ptr, cu_mean_ptr, num_samples,
    K: tl.constexpr, D: tl.constexpr, B: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Owns: one block of one KV head, complete or not.
    Reads: dk_mean, dv_mean [Tk // B, K, D], one row of each where the block is complete.
    Writes: dk, dv [Tk, K, D] of its tokens, zero where the block is not complete.
    """
    sample, offset = locate(tl.program_id(0), cu_k_ptr, num_samples, B)
    kv_head = tl.program_id(1)
    start, length = span(sample, cu_k_ptr)
    complete = offset + B <= length
    mean = (tl.load(cu_mean_ptr + sample) + offset // B).to(tl.int64) * K + kv_head
    offsets = mean * D + tl.arange(0, D)
    dk = tl.load(dk_mean_ptr + offsets, mask=complete, other=0.0).to(tl.float32) / B
    dv = tl.load(dv_mean_ptr + offsets, mask=complete, other=0.0).to(tl.float32) / B
    for j in range(0, B, STEP):
        token = offset + j + tl.arange(0, STEP)
        rows = (start + token).to(tl.int64) * K + kv_head
        store_rows(dk_ptr, rows, tl.broadcast_to(dk[None, :], [STEP, D]), token < length, D)
        store_rows(dv_ptr, rows, tl.broadcast_to(dv[None, :], [STEP, D]), token < length, D)


@triton.jit(do_not_specialize=["num_samples"])
def _compressed_forward(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, cu_mean_ptr, cu_q_ptr, cu_k_ptr, num_samples, scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, B: tl.constexpr,
    ROWS: tl.constexpr, MEANS: tl.constexpr,
):  # fmt: skip
    """Owns: a tile of ROWS queries of one head.
    Reads: q [Tq, H, D] of the tile; the means k, v [means, K, D] that its queries see.
    Writes: o [Tq, H, D] and base-2 lse [Tq, H] of the tile.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    head = tl.program_id(1)
    kv_head = head // (H // K)
    sample, first, count, position = query_tile(tile, cu_q_ptr, cu_k_ptr, num_samples, ROWS)
    if count <= 0:
        return
    r = tl.arange(0, ROWS)
    i = tl.arange(0, MEANS)
    t = position + r
    live = r < count
    rows = (first + r).to(tl.int64) * H + head
    q = load_rows(q_ptr, rows, live, D)
    acc, row_max, row_sum = empty_softmax(ROWS, D)
    mean = tl.load(cu_mean_ptr + sample)
    seen_by_some = num_complete(position + count - 1, B)
    seen_by_all = num_complete(position, B) // MEANS * MEANS  # whole steps only
    for j in range(0, seen_by_all, MEANS):
        k, v = load_keys(k_ptr, v_ptr, mean + j + i, i < MEANS, kv_head, K, D)
        s = dot(q, tl.trans(k)) * scale
        acc, row_max, row_sum = softmax_step(s, v, acc, row_max, row_sum)
    for j in range(seen_by_all, seen_by_some, MEANS):
        k, v = load_keys(k_ptr, v_ptr, mean + j + i, j + i < seen_by_some, kv_head, K, D)
        s = dot(q, tl.trans(k)) * scale
        s = tl.where(is_complete((j + i)[None, :], t[:, None], B), s, float("-inf"))
        acc, row_max, row_sum = softmax_step(s, v, acc, row_max, row_sum)
    store_softmax(o_ptr, lse_ptr, rows, live, acc, row_max, row_sum, D)


@triton.jit(do_not_specialize=["num_samples"])
def _compressed_dq(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, cu_mean_ptr, cu_q_ptr, cu_k_ptr,
    num_samples, scale, dq_scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, B: tl.constexpr,
    ROWS: tl.constexpr, MEANS: tl.constexpr,
):  # fmt: skip
    """Owns: a tile of ROWS queries of one head.
    Reads: q, do [Tq, H, D], lse, delta [Tq, H] of the tile; the means k, v [means, K, D] it sees.
    Writes: dq [Tq, H, D] of the tile.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    kv_head = head // (H // K)
    sample, first, count, position = query_tile(tile, cu_q_ptr, cu_k_ptr, num_samples, ROWS)
    if count <= 0:
        return
    r = tl.arange(0, ROWS)
    live = r < count
    rows = (first + r).to(tl.int64) * H + head
    q, do, lse, delta = load_queries(q_ptr, do_ptr, lse_ptr, delta_ptr, rows, live, D)
    dq = tl.zeros([ROWS, D], tl.float32)
    mean = tl.load(cu_mean_ptr + sample)
    i = tl.arange(0, MEANS)
    seen_by_some = num_complete(position + count - 1, B)
    seen_by_all = num_complete(position, B) // MEANS * MEANS
    for j in range(0, seen_by_all, MEANS):
        k, v = load_keys(k_ptr, v_ptr, mean + j + i, i < MEANS, kv_head, K, D)
        dq = dq_step(dq, q, k, v, do, lse, delta, None, scale)
    for j in range(seen_by_all, seen_by_some, MEANS):
        k, v = load_keys(k_ptr, v_ptr, mean + j + i, j + i < seen_by_some, kv_head, K, D)
        visible = is_complete((j + i)[None, :], (position + r)[:, None], B)
        dq = dq_step(dq, q, k, v, do, lse, delta, visible, scale)
    store_rows(dq_ptr, rows, dq * dq_scale, live, D)


@triton.jit(do_not_specialize=["num_samples", "num_means"])
def _compressed_dkv(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_mean_ptr, cu_q_ptr,
    cu_k_ptr, num_samples, num_means, scale, dk_scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, B: tl.constexpr,
    ROWS: tl.constexpr, MEANS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Owns: a tile of MEANS means of one query head, and every PARTS-th tile of its queries.
    Reads: k, v [means, K, D] of the tile; q, do [Tq, H, D], lse, delta [Tq, H] that see any.
    Writes: float32 partial sums dk, dv [PARTS, means, H, D] of its part, tile and head.
    """
    part, head = tl.program_id(0) % PARTS, tl.program_id(1)
    sample, offset = locate(tl.program_id(0) // PARTS, cu_mean_ptr, num_samples, MEANS)
    mean, complete = span(sample, cu_mean_ptr)
    if offset >= complete:
        return
    i = offset + tl.arange(0, MEANS)
    real = i < complete
    k, v = load_keys(k_ptr, v_ptr, mean + i, real, head // (H // K), K, D)
    dk = tl.zeros([MEANS, D], tl.float32)
    dv = tl.zeros([MEANS, D], tl.float32)
    first, queries = span(sample, cu_q_ptr)
    _, keys = span(sample, cu_k_ptr)
    cached = keys - queries
    start = tl.maximum(first_to_see(offset, B), cached)
    # The first steps, of queries that do not see all means of the tile yet, come with a mask.
    all_see = tl.minimum(
        keys,
        tl.cdiv(tl.maximum(first_to_see(offset + MEANS - 1, B) - start, 0), PARTS * ROWS)
        * PARTS * ROWS + start,
    )  # fmt: skip
    for j in range(start + part * ROWS, all_see, PARTS * ROWS):
        t = j + tl.arange(0, ROWS)
        live = t < keys
        rows = (first + t - cached).to(tl.int64) * H + head
        q, do, lse, delta = load_queries(q_ptr, do_ptr, lse_ptr, delta_ptr, rows, live, D)
        visible = is_complete(i[None, :], t[:, None], B)
        dk, dv = dkv_step(dk, dv, q, k, v, do, lse, delta, visible, scale)
    for j in range(all_see + part * ROWS, keys, PARTS * ROWS):
        t = j + tl.arange(0, ROWS)
        live = t < keys
        rows = (first + t - cached).to(tl.int64) * H + head
        q, do, lse, delta = load_queries(q_ptr, do_ptr, lse_ptr, delta_ptr, rows, live, D)
        dk, dv = dkv_step(dk, dv, q, k, v, do, lse, delta, None, scale)
    out = (part.to(tl.int64) * num_means + mean + i) * H + head
    store_rows(dk_ptr, out, dk * dk_scale, real, D)
    store_rows(dv_ptr, out, dv, real, D)


def compressed_forward(q, k_mean, v_mean, lengths, cu_mean, *, block_size, scale):
    """o [Tq, H, D] (zero where no block is complete yet) and base-2 lse [Tq, H] (+inf there)."""
    o, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    rows, (_, scale) = fitting(q, TILE_ROWS), scales(q, scale)
    _compressed_forward[(lengths.query_tiles(rows), q.shape[1])](
        q, k_mean, v_mean, o, lse, cu_mean, **lengths.arguments, scale=scale, B=block_size,
        ROWS=rows, MEANS=fitting(q, MEANS), **heads_of(q, k_mean), num_warps=4,
        num_stages=stages(q, 3),
    )  # fmt: skip
    return o, lse


def compressed_backward(q, k_mean, v_mean, do, lse, delta, lengths, cu_mean, *, block_size, scale):
    """dq in q's dtype, and the gradients of the means in float32, undefined past the last mean."""
    dq = torch.empty_like(q)
    num_means, (score_scale, scale) = len(k_mean), scales(q, scale)
    rows, tile = fitting(q, TILE_ROWS), fitting(q, MEANS)
    fixed = dict(
        **lengths.arguments, scale=scale, B=block_size, ROWS=rows, MEANS=tile,
        **heads_of(q, k_mean), num_warps=4, num_stages=stages(q, 2),
    )  # fmt: skip
    inputs = (q, k_mean, v_mean, do, lse, delta)
    _compressed_dq[(lengths.query_tiles(rows), q.shape[1])](
        *inputs, dq, cu_mean, dq_scale=score_scale, **fixed
    )
    parts = min(QUERY_PARTS, max(1, PARTIAL_ROWS // max(1, num_means)))
    dk, dv = q.new_empty(2, parts, num_means, *q.shape[1:], dtype=torch.float32)
    if num_means:
        _compressed_dkv[((num_means // tile + lengths.samples) * parts, q.shape[1])](
            *inputs, dk, dv, cu_mean, num_means=num_means, dk_scale=score_scale, PARTS=parts,
            **fixed,
        )  # fmt: skip
    kv_heads = k_mean.shape[1]
    return dq, *(x.unflatten(2, (kv_heads, -1)).sum((0, 3)) for x in (dk, dv))


def means_forward(k, v, cu_k, cu_mean, *, block_size):
    """k_mean, v_mean [Tk // B, K, D]; rows past the last complete block are zero."""
    k_mean, v_mean = (x.new_zeros(len(x) // block_size, *x.shape[1:]) for x in (k, v))
    _mean_forward[_mean_grid(k, cu_k, block_size)](
        k, v, k_mean, v_mean, **_mean_arguments(k, cu_k, cu_mean, block_size)
    )
    return k_mean, v_mean


def means_backward(dk_mean, dv_mean, dk, dv, cu_k, cu_mean, *, block_size):
    """Write to dk and dv, wholly, the gradients that reach them through the means."""
    _mean_backward[_mean_grid(dk, cu_k, block_size)](
        dk_mean, dv_mean, dk, dv, **_mean_arguments(dk, cu_k, cu_mean, block_size)
    )


def _mean_grid(k, cu_k, block_size):
    return (len(k) // block_size + len(cu_k) - 1, k.shape[1])


def _mean_arguments(k, cu_k, cu_mean, block_size):
    return {
        "cu_k_ptr": cu_k, "cu_mean_ptr": cu_mean, "num_samples": len(cu_k) - 1,
        "K": k.shape[1], "D": k.shape[2], "B": block_size, "STEP": min(64, block_size),
    }  # fmt: skip


class _CompressBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k, v, cu_k, block_size):
        cu_mean = mean_starts(cu_k, block_size)
        ctx.save_for_backward(cu_k, cu_mean)
        ctx.shape, ctx.block_size = k.shape, block_size
        with torch.cuda.device_of(k):
            return means_forward(k, v, cu_k, cu_mean, block_size=block_size)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dk_mean, dv_mean):
        cu_k, cu_mean = ctx.saved_tensors
        dk_mean, dv_mean = dk_mean.contiguous(), dv_mean.contiguous()
        dk, dv = dk_mean.new_empty(ctx.shape), dv_mean.new_empty(ctx.shape)
        means_backward(dk_mean, dv_mean, dk, dv, cu_k, cu_mean, block_size=ctx.block_size)
        return dk, dv, None, None


class _CompressedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k_mean, v_mean, lengths, block_size, scale):
        cu_mean = mean_starts(lengths.cu_k, block_size)
        ctx.lengths, ctx.cu_mean = lengths, cu_mean
        ctx.settings = {"block_size": block_size, "scale": scale}
        with torch.cuda.device_of(q):
            o, lse = compressed_forward(q, k_mean, v_mean, lengths, cu_mean, **ctx.settings)
        ctx.save_for_backward(q, k_mean, v_mean, o, lse)
        natural = lse * LN_2
        ctx.mark_non_differentiable(natural)
        return o, natural

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, _):
        q, k_mean, v_mean, o, lse = ctx.saved_tensors
        do = do.contiguous()
        dq, dk_mean, dv_mean = compressed_backward(
            q, k_mean, v_mean, do, lse, row_deltas(do, o), ctx.lengths, ctx.cu_mean,
            **ctx.settings,
        )  # fmt: skip
        used = torch.arange(len(k_mean), device=q.device) < ctx.cu_mean[-1]
        dk_mean, dv_mean = (
            torch.where(used[:, None, None], x, 0).to(q.dtype) for x in (dk_mean, dv_mean)
        )
        return dq, dk_mean, dv_mean, None, None, None


def compress_blocks(
    k: torch.Tensor, v: torch.Tensor, cu_seqlens_k: torch.Tensor, *, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of k and v over each complete block of `block_size` tokens (VideoNSA, section 2.2).

    k, v [Tk, K, D]. Returns k_cmp, v_cmp [Tk // block_size, K, D]: the blocks of the first
    sample, then of the second, and so on; rows past the last block are zero. Differentiable in k
    and v.
    """
    check_keys(k, v, cu_seqlens_k)
    check_inputs("compress_blocks", k, v, head_dim=k.shape[2], block_size=block_size)
    if cu_seqlens_k.device.type == "cpu":
        check_ends("cu_seqlens_k", cu_seqlens_k, len(k))
    k, v = k.contiguous(), v.contiguous()
    cu_k = cu_seqlens_k.to(k.device, torch.int32).contiguous()
    return _CompressBlocks.apply(k, v, cu_k, block_size)


def compressed_attention(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    block_size: int,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the means of the blocks that are complete at the query.

    q [Tq, H, D]; k_cmp, v_cmp [means, K, D] as `compress_blocks` returns them. Returns o
    [Tq, H, D], zero where no block is visible, and the natural log-sum-exp of the scaled scores,
    float32 [Tq, H], +inf where no block is visible. Differentiable through o.
    """
    check_packed(q, k_cmp, v_cmp, cu_seqlens_q, cu_seqlens_k)
    check_inputs(
        "compressed_attention", q, k_cmp, v_cmp, head_dim=q.shape[2], block_size=block_size
    )
    # The number of keys only bounds the grids of other branches; this one counts means.
    lengths = packed_lengths(q, k_cmp, cu_seqlens_q, cu_seqlens_k, block_size=block_size)
    if not len(q):
        return no_queries(q, k_cmp, v_cmp), q.new_zeros(q.shape[:2], dtype=torch.float32)
    q, k_cmp, v_cmp = q.contiguous(), k_cmp.contiguous(), v_cmp.contiguous()
    return _CompressedAttention.apply(q, k_cmp, v_cmp, lengths, block_size, scale)
