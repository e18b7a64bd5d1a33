"""The choice of blocks in Triton: forced blocks, then the past ones of largest importance.

Importance is the sum over the group's heads of the compressed branch's probability, kept in
float32 and written once per chunk of queries, with the maximum of every 16 blocks beside it.
The choice is exact in two levels: every block of the answer lies in one of the S groups of
largest maximum. Equal values go to the lower index on both levels.
"""

import torch

from .nsa_checks import check_packed, check_shape
from .nsa_kernels_primitives import (
    LOG2_E,
    check_inputs,
    dot,
    fitting,
    heads_of,
    is_complete,
    load_rows,
    mean_starts,
    num_complete,
    packed_lengths,
    query_tile,
    scales,
    stages,
    tl,
    triton,
)

ROWS, MEANS = 64, 128  # tile of the importance kernel
GROUP = 16  # blocks per maximum
CHUNK_ROWS = 8192  # queries whose importance is held at once,
CHUNK_ELEMENTS = 2**26  # and fewer where that would be more float32 numbers than these
NO_GROUP = tl.constexpr(1 << 24)
INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit(do_not_specialize=["num_samples", "first_tile", "num_groups"])
def _importance(
    q_ptr, k_ptr, lse_ptr, importance_ptr, maxima_ptr, cu_mean_ptr, cu_q_ptr, cu_k_ptr,
    num_samples, first_tile, row_length, num_groups, scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, B: tl.constexpr,
    ROWS: tl.constexpr, MEANS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Owns: a tile of ROWS queries by MEANS blocks of one KV head, tiles counted from first_tile.
    Reads: q [Tq, H, D] and base-2 lse [Tq, H] of the group's heads; the means k [means, K, D].
    Writes: importance float32 [rows of the chunk, K, row_length], -1 for a future block, and
    maxima [rows of the chunk, K, num_groups] of each GROUP blocks.
    """
    local_tile, column, kv_head = tl.program_id(0), tl.program_id(1) * MEANS, tl.program_id(2)
    sample, first, count, position = query_tile(
        first_tile + local_tile, cu_q_ptr, cu_k_ptr, num_samples, ROWS
    )
    if (count <= 0) | (column * B >= position + count):
        return
    r = tl.arange(0, ROWS)
    i = column + tl.arange(0, MEANS)
    live = r < count
    complete = num_complete(position + count - 1, B)  # for the last query
    mean = tl.load(cu_mean_ptr + sample)
    k = load_rows(k_ptr, (mean + i).to(tl.int64) * K + kv_head, i < complete, D)
    total = tl.zeros([ROWS, MEANS], tl.float32)
    for head in range(H // K):
        rows = (first + r).to(tl.int64) * H + kv_head * (H // K) + head
        q = load_rows(q_ptr, rows, live, D)
        lse = tl.load(lse_ptr + rows, mask=live, other=float("inf"))
        total += tl.exp2(dot(q, tl.trans(k)) * scale - lse[:, None])
    t = position + r
    total = tl.where(is_complete(i[None, :], t[:, None], B), total, 0.0)
    total = tl.where(i[None, :] <= (t // B)[:, None], total, -1.0)  # -1: may not be chosen
    row = (local_tile * ROWS + r).to(tl.int64) * K + kv_head
    tl.store(importance_ptr + row[:, None] * row_length + i[None, :], total, mask=live[:, None])
    maxima = tl.max(tl.reshape(total, [ROWS, MEANS // GROUP, GROUP]), 2)
    group = column // GROUP + tl.arange(0, MEANS // GROUP)
    tl.store(maxima_ptr + row[:, None] * num_groups + group[None, :], maxima, mask=live[:, None])


@triton.jit
def _take_largest(bits, need):
    """Mask of the `need` largest of int32 `bits`, negative ones excluded, lower index first.

    Non-negative floats order as their bits: bisect bit by bit for the largest threshold that
    still leaves `need` values, then cut the equal ones off by their rank.
    """
    threshold = 0
    bit = 30
    count = tl.sum((bits >= 0).to(tl.int32), 0)
    while (bit >= 0) & (count != need):
        candidate = threshold | (1 << bit)
        left = tl.sum((bits >= candidate).to(tl.int32), 0)
        threshold = tl.where(left >= need, candidate, threshold)
        count = tl.where(left >= need, left, count)
        bit -= 1
    above = (bits > threshold).to(tl.int32)
    equal = (bits == threshold).to(tl.int32)
    return above + equal * (tl.cumsum(equal, 0) <= need - tl.sum(above, 0)).to(tl.int32)


@triton.jit
def _rank(ptr, offsets, first, last, own, INITIAL: tl.constexpr, LOCAL: tl.constexpr):
    """Bits to order blocks (or groups of blocks first ... last) by: forced first, future never."""
    bits = tl.load(ptr + offsets, mask=first <= own, other=-1.0).to(tl.int32, bitcast=True)
    forced = (first < INITIAL) | (tl.minimum(last, own) > own - LOCAL)
    return tl.where(first <= own, tl.where(forced, INFINITY_BITS, bits), -1)


@triton.jit(do_not_specialize=["num_samples", "first_tile", "num_groups"])
def _choose(
    importance_ptr, maxima_ptr, blocks_ptr, cu_q_ptr, cu_k_ptr, num_samples, first_tile,
    row_length, num_groups, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
    S: tl.constexpr, S_2: tl.constexpr, K: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Owns: one query of one KV head, queries counted from tile first_tile.
    Reads: importance [rows of the chunk, K, row_length] and maxima [rows of the chunk, K,
    num_groups] of the query, as `_importance` writes them.
    Writes: blocks int32 [Tq, K, S], the query's S block numbers, ascending, then -1.
    """
    local, kv_head = tl.program_id(0), tl.program_id(1)
    sample, first, count, position = query_tile(
        first_tile + local // ROWS, cu_q_ptr, cu_k_ptr, num_samples, ROWS
    )
    query = local % ROWS
    if query >= count:
        return
    own = (position + query) // B
    row = local.to(tl.int64) * K + kv_head

    if GROUPS <= S_2:
        groups = tl.arange(0, S_2)
    else:
        group = tl.arange(0, GROUPS)
        start = group * GROUP
        bits = _rank(
            maxima_ptr, row * num_groups + group, start, start + GROUP - 1, own, INITIAL, LOCAL
        )
        taken = _take_largest(bits, tl.minimum(S, tl.sum((bits >= 0).to(tl.int32), 0)))
        ordered = tl.sort(tl.where(taken > 0, group, NO_GROUP))
        is_first = (tl.arange(0, GROUPS // S_2) == 0)[:, None]
        groups = tl.sum(tl.where(is_first, tl.reshape(ordered, [GROUPS // S_2, S_2]), 0), 0)

    block = tl.reshape(groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :], [S_2 * GROUP])
    bits = _rank(importance_ptr, row * row_length + block, block, block, own, INITIAL, LOCAL)
    taken = _take_largest(bits, tl.minimum(S, tl.sum((bits >= 0).to(tl.int32), 0)))
    out = blocks_ptr + ((first + query).to(tl.int64) * K + kv_head) * S
    tl.store(out + tl.cumsum(taken, 0) - 1, block, mask=taken > 0)
    slot = tl.arange(0, S_2)
    unused = (slot >= tl.sum(taken, 0)) & (slot < S)
    tl.store(out + slot, tl.full([S_2], -1, tl.int32), mask=unused)


def choose_blocks(
    q, k_mean, lse, lengths, cu_mean, *, block_size, num_selected, num_initial, num_local, scale
):
    """Block numbers int32 [Tq, K, S]; `lse` is the compressed branch's, base 2."""
    kv_heads = k_mean.shape[1]
    blocks = torch.empty(len(q), kv_heads, num_selected, dtype=torch.int32, device=q.device)
    rows, means, (_, scale) = fitting(q, ROWS), fitting(q, MEANS), scales(q, scale)
    row_length = triton.cdiv(triton.cdiv(lengths.keys, block_size), means) * means
    num_groups = row_length // GROUP
    most_rows = min(CHUNK_ROWS, CHUNK_ELEMENTS // (kv_heads * row_length))
    tiles = lengths.query_tiles(rows)
    chunk_tiles = min(tiles, max(1, most_rows // rows))
    importance = q.new_empty(chunk_tiles * rows * kv_heads, row_length, dtype=torch.float32)
    maxima = q.new_empty(len(importance), num_groups, dtype=torch.float32)
    slots = triton.next_power_of_2(num_selected)
    for first_tile in range(0, tiles, chunk_tiles):
        n = min(chunk_tiles, tiles - first_tile)
        past = triton.cdiv(lengths.positions_before((first_tile + n) * rows), block_size)
        sizes = dict(
            **lengths.arguments, first_tile=first_tile, row_length=row_length,
            num_groups=num_groups, B=block_size, ROWS=rows, GROUP=GROUP,
        )  # fmt: skip
        _importance[(n, triton.cdiv(past, means), kv_heads)](
            q, k_mean, lse, importance, maxima, cu_mean, scale=scale, MEANS=means,
            **heads_of(q, k_mean), **sizes, num_warps=4, num_stages=stages(q, 3),
        )  # fmt: skip
        groups = max(slots, triton.next_power_of_2(triton.cdiv(past, GROUP)))
        _choose[(n * rows, kv_heads)](
            importance, maxima, blocks, INITIAL=num_initial, LOCAL=num_local, S=num_selected,
            S_2=slots, K=kv_heads, GROUPS=groups, **sizes, num_warps=1,
        )  # fmt: skip
    return blocks


@torch.no_grad()
def select_blocks(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    block_size: int,
    num_selected: int,
    num_initial: int = 0,
    num_local: int = 1,
    scale: float | None = None,
) -> torch.Tensor:
    """The blocks that each query attends to, chosen per key/value head (VideoNSA, eq. 3-4).

    q [Tq, H, D]; k_cmp [means, K, D] and lse [Tq, H] as for and from `compressed_attention`. The
    first `num_initial` blocks and the `num_local` ones that end with the query's own are always
    chosen; the rest of the `num_selected` are the past blocks of largest importance, the sum over
    the group's heads of the compressed branch's probabilities. Equal importances go to the lower
    index. Returns int32 [Tq, K, num_selected], block numbers within the sample, ascending, then -1.
    """
    check_packed(q, k_cmp, k_cmp, cu_seqlens_q, cu_seqlens_k)
    check_shape("lse", lse, q.shape[:2], "one log-sum-exp per query and head")
    check_inputs("select_blocks", q, k_cmp, head_dim=q.shape[2], block_size=block_size)
    lengths = packed_lengths(q, k_cmp, cu_seqlens_q, cu_seqlens_k, block_size=block_size)
    if not len(q):
        shape = (0, k_cmp.shape[1], num_selected)
        return torch.empty(shape, dtype=torch.int32, device=q.device)
    q, k_cmp = q.contiguous(), k_cmp.contiguous()
    # As many keys as there can be for this number of means: the last block may be incomplete.
    lengths = lengths._replace(keys=(len(k_cmp) + 1) * block_size - 1)
    with torch.cuda.device_of(q):
        return choose_blocks(
            q, k_cmp, (lse * LOG2_E).contiguous(), lengths, mean_starts(lengths.cu_k, block_size),
            block_size=block_size, num_selected=num_selected, num_initial=num_initial,
            num_local=num_local, scale=scale,
        )  # fmt: skip
