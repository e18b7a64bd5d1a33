"""Selected branch in Triton: attention over the tokens of the chosen blocks.

Hybrid. A tile is about `64 // G` neighbouring queries with all heads of a group. Blocks that
enough queries of a tile chose are *hot*: the tile walks over them. Every other (query, block) pair
is *cold*: one program per block keeps k and v, gathers the queries that chose it, and writes one
partial result per pair, which the query's tile merges. Each pair owns its slot and the inverse
index comes from a stable sort, so two runs give the same bits.

Numbers: queries are counted in slots of tiles, u = tile * QUERIES + query, so that a tile's slots
         are neighbours; blocks of all samples are numbered as `locate` numbers tiles.
Order: lists of hot and cold pairs, forward, dq, dk and dv, launchers, public function.
"""

from typing import NamedTuple

import torch

from .nsa_kernels_primitives import (
    TILE_ROWS,
    Streams,
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
    packed_rows,
    query_tile,
    row_deltas,
    scales,
    softmax_step,
    span,
    stages,
    store_rows,
    store_softmax,
    streams_of,
    tile_of,
    tl,
    triton,
)

LARGEST_BLOCK = 64  # larger ones are taken apart
CHUNK = 9216  # queries whose cold partials are held at once
PARTS = 2  # programs per block and chunk in the cold kernels
ALL_HOT_UP_TO = 8192  # keys; up to here tiles alone are as fast and need no scratch
MASK_BITS = 32  # queries of a tile, one bit each
SORTED = 1024  # entries that one program sorts
NO_BLOCK = tl.constexpr(0x7FFFFFFF)
NOWHERE = tl.constexpr(1 << 30)  # position of what fills a small block up to 16 keys


class BlockIndex(NamedTuple):
    """Who chose each block: flat entries (kv_head * U + u) * S + slot, in the order of their bins.

    A bin is a KV head, a block, a chunk of tiles, and hot or cold, in this order: the cold pairs
    of a block in one chunk are neighbours, and so are all pairs of a block.
    """

    entry: torch.Tensor  # int32 [K * U * S]
    offset: torch.Tensor  # int32 [bins + 1]; bins = K * blocks * chunks * 2


class TileLists(NamedTuple):
    """What the tiles walk over. U is the number of tiles times the queries of each."""

    hot_block: torch.Tensor  # int32 [K, tiles, capacity], numbers within the sample
    hot_queries: torch.Tensor  # the same shape; bit i: query i of the tile chose the block
    hot_count: torch.Tensor  # int32 [K, tiles]
    cold_count: torch.Tensor  # int32 [K, U]
    bins: torch.Tensor | None  # int32 [K, U, S], what is left to sort where there is no index
    index: BlockIndex | None  # None: everything is hot, and only the backward needs one
    at: Streams
    tile: dict  # G, QUERIES, ROWS
    chunk: int  # tiles
    block_size: int
    num_selected: int


@triton.jit(do_not_specialize=[
    "num_samples", "num_tiles", "capacity", "num_blocks", "chunk", "num_chunks",
])  # fmt: skip
def _build(
    blocks_ptr, hot_block_ptr, hot_queries_ptr, hot_count_ptr, cold_count_ptr, bins_ptr, flag_ptr,
    cu_q_ptr, cu_k_ptr, num_samples, num_tiles, capacity, num_blocks, chunk, num_chunks,
    K: tl.constexpr, S: tl.constexpr, S_2: tl.constexpr, B: tl.constexpr,
    QUERIES: tl.constexpr, QUERIES_2: tl.constexpr, MIN_SHARE: tl.constexpr,
):  # fmt: skip
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    sample, first, count, position = query_tile(tile, cu_q_ptr, cu_k_ptr, num_samples, QUERIES)
    N: tl.constexpr = QUERIES_2 * S_2
    e = tl.arange(0, N)
    query, slot = e // S_2, e % S_2
    live = (query < count) & (slot < S)
    row = (first + query).to(tl.int64) * K + kv_head
    chosen = tl.load(blocks_ptr + row * S + slot, mask=live, other=-1)
    real = (chosen >= 0) & (chosen <= (position + query) // B)  # a future block shows nothing
    key = tl.sort(tl.where(real, chosen * N + e, NO_BLOCK))
    sorted_real = key != NO_BLOCK
    block, entry = key // N, key % N
    # hot: one of the MIN_SHARE windows of that length around an entry holds its block only
    hot = tl.zeros([N], tl.int32)
    for back in tl.static_range(MIN_SHARE):
        low, high = e - back, e - back + MIN_SHARE - 1
        a = tl.gather(block, tl.maximum(low, 0), 0)
        b = tl.gather(block, tl.minimum(high, N - 1), 0)
        hot = hot | (sorted_real & (low >= 0) & (high < N) & (a == b)).to(tl.int32)
    # The queries' own blocks as well, so that no cold pair needs the causal mask.
    hot = hot | (sorted_real & (block >= position // B)).to(tl.int32)
    new = (hot > 0) & ((e == 0) | (block != tl.gather(block, tl.maximum(e - 1, 0), 0)))
    tile_id = kv_head.to(tl.int64) * num_tiles + tile
    at = tile_id * capacity + tl.cumsum(new.to(tl.int32), 0) - 1
    tl.store(hot_block_ptr + at, block, mask=new)
    tl.atomic_or(hot_queries_ptr + at, 1 << (entry // S_2), mask=hot > 0, sem="relaxed")
    tl.store(hot_count_ptr + tile_id, tl.sum(new.to(tl.int32), 0))

    # back to the order of the queries through memory, cold blocks to the front of a query's row
    tl.store(flag_ptr + tile_id * N + entry, hot.to(tl.int8), mask=sorted_real)
    tl.debug_barrier()
    is_hot = tl.load(flag_ptr + tile_id * N + e, mask=real, other=0).to(tl.int32)
    is_cold = real.to(tl.int32) - is_hot
    hot_of_query = tl.reshape(is_hot, [QUERIES_2, S_2])
    cold_of_query = tl.reshape(is_cold, [QUERIES_2, S_2])
    num_cold = tl.sum(cold_of_query, 1)
    cold_rank = tl.cumsum(cold_of_query, 1) - 1
    hot_rank = num_cold[:, None] + tl.cumsum(hot_of_query, 1) - 1
    rank = tl.reshape(tl.where(hot_of_query > 0, hot_rank, cold_rank), [N])
    block = kv_head * num_blocks + tl.load(cu_k_ptr + sample) // B + sample + chosen
    u = tile_id * QUERIES + query
    bins = (block * num_chunks + tile // chunk) * 2 + is_cold
    tl.store(bins_ptr + u * S + rank, bins, mask=real)
    q = tl.arange(0, QUERIES_2)
    tl.store(cold_count_ptr + tile_id * QUERIES + q, num_cold, mask=q < QUERIES)


def _index_by_block(bins, num_bins):
    bins, entry = torch.sort(bins.flatten(), stable=True)
    bounds = torch.arange(num_bins + 1, dtype=torch.int32, device=bins.device)
    return BlockIndex(entry.to(torch.int32), torch.searchsorted(bins, bounds, out_int32=True))


def _smaller_blocks(blocks, block_size, largest):
    """The same choice in blocks of at most `largest` tokens, and their size."""
    parts = max(1, block_size // largest)
    if parts == 1:
        return blocks.contiguous(), block_size
    part = torch.arange(parts, dtype=torch.int32, device=blocks.device)
    apart = torch.where(blocks[..., None] < 0, -1, blocks[..., None] * parts + part)
    return apart.flatten(2), block_size // parts


def build_tile_lists(q, blocks, at, block_size):
    """Hot and cold lists of the choice `blocks` int32 [Tq, K, S]."""
    blocks, block_size = _smaller_blocks(blocks, block_size, fitting(q, LARGEST_BLOCK))
    _, kv_heads, num_selected = blocks.shape
    slots = triton.next_power_of_2(num_selected)
    group, most = q.shape[1] // kv_heads, min(MASK_BITS, max(1, SORTED // slots))
    tile = tile_of(group, fitting(q, TILE_ROWS), most)
    queries = tile["QUERIES"]
    # A third of a tile's queries is where a step of the tile costs what the cold pairs would.
    min_share = 1 if at.keys <= ALL_HOT_UP_TO else max(1, round(queries / 3))
    tiles = at.query_tiles(queries)
    chunk = tiles if min_share == 1 else min(max(CHUNK // queries, 1), tiles)
    own_blocks = (queries + block_size - 2) // block_size + 1  # at most, of one tile
    capacity = queries * num_selected // min_share + own_blocks + 1  # read ahead
    integers = {"dtype": torch.int32, "device": blocks.device}
    hot_block = torch.empty(kv_heads, tiles, capacity, **integers)
    hot_queries = torch.zeros(kv_heads, tiles, capacity, **integers)
    hot_count = torch.empty(kv_heads, tiles, **integers)
    cold_count = torch.empty(kv_heads, tiles * queries, **integers)
    num_blocks, num_chunks = at.key_blocks(block_size), triton.cdiv(tiles, chunk)
    num_bins = kv_heads * num_blocks * num_chunks * 2
    bins = torch.full((kv_heads, tiles * queries, num_selected), num_bins, **integers)
    queries_2 = triton.next_power_of_2(queries)
    flag = torch.empty(kv_heads, tiles, queries_2 * slots, dtype=torch.int8, device=blocks.device)
    _build[(tiles, kv_heads)](
        blocks, hot_block, hot_queries, hot_count, cold_count, bins, flag, *at.arguments, tiles,
        capacity, num_blocks, chunk, num_chunks, K=kv_heads, S=num_selected, S_2=slots,
        B=block_size, QUERIES=queries, QUERIES_2=queries_2, MIN_SHARE=min_share, num_warps=4,
    )  # fmt: skip
    index = None if min_share == 1 else _index_by_block(bins, num_bins)
    return TileLists(
        hot_block, hot_queries, hot_count, cold_count, None if index else bins, index, at, tile,
        chunk, block_size, num_selected,
    )  # fmt: skip


@triton.jit
def _block_keys(block, cu_k_ptr, num_samples, B: tl.constexpr, KEYS: tl.constexpr):
    """Of a block among all samples: sample, its first token and length, the keys' positions."""
    sample, offset = locate(block, cu_k_ptr, num_samples, B)
    start, length = span(sample, cu_k_ptr)
    i = tl.arange(0, KEYS)
    return sample, start, length, tl.where(i < B, offset + i, NOWHERE)


@triton.jit
def _first_slot(sample, cu_q_ptr, QUERIES: tl.constexpr):
    """Of a sample's first query: its slot u and its row."""
    first = tl.load(cu_q_ptr + sample)
    return (first // QUERIES + sample) * QUERIES, first


@triton.jit(do_not_specialize=[
    "num_samples", "num_slots", "first_slot", "chunk", "num_chunks", "scratch_slots", "num_blocks",
])  # fmt: skip
def _cold_forward(
    q_ptr, k_ptr, v_ptr, entry_ptr, offset_ptr, o_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, num_samples,
    num_slots, first_slot, chunk, num_chunks, scratch_slots, num_blocks, scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, S: tl.constexpr, B: tl.constexpr,
    KEYS: tl.constexpr, G: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    block, part, kv_head = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.program_id(1)
    offset = offset_ptr + ((kv_head * num_blocks + block) * num_chunks + chunk) * 2 + 1
    begin, end = tl.load(offset) + part * QUERIES, tl.load(offset + 1)
    if begin >= end:
        return
    r = tl.arange(0, ROWS)
    query, head = r // G, r % G
    sample, start, length, key = _block_keys(block, cu_k_ptr, num_samples, B, KEYS)
    k, v = load_keys(k_ptr, v_ptr, start + key, key < length, kv_head, K, D)
    sample_slot, first_row = _first_slot(sample, cu_q_ptr, QUERIES)
    # slots and rows below count from the chunk and the sample, so they stay in 32 bits
    first_entry = (kv_head * num_slots + first_slot) * S
    q_sample = q_ptr + (first_row.to(tl.int64) * H + kv_head * G) * D
    o_chunk = o_ptr + kv_head.to(tl.int64) * scratch_slots * G * D
    lse_chunk = lse_ptr + kv_head.to(tl.int64) * scratch_slots * G
    entry = tl.load(entry_ptr + tl.minimum(begin + query, end - 1)) - first_entry
    for j in range(begin, end, PARTS * QUERIES):
        live = (query < QUERIES) & (j + query < end)
        t = entry // S + first_slot - sample_slot  # counted from the sample's first query
        q = load_rows(q_sample, t.to(tl.int64) * H + head, live, D)
        slot = entry * G + head
        # the next step's entries, early: its other loads wait for them
        entry = tl.load(entry_ptr + tl.minimum(j + PARTS * QUERIES + query, end - 1)) - first_entry
        s = dot(q, tl.trans(k)) * scale
        if KEYS > B:
            s = tl.where((key < NOWHERE)[None, :], s, float("-inf"))
        row_max = tl.max(s, 1)
        p = tl.exp2(s - row_max[:, None])
        row_sum = tl.sum(p, 1)
        o = dot((p * (1.0 / row_sum)[:, None]).to(v.dtype), v)
        store_rows(o_chunk, slot.to(tl.int64), o, live, D)
        tl.store(lse_chunk + slot, row_max + tl.log2(row_sum), mask=live)


@triton.jit
def _hot_keys(
    k_ptr, v_ptr, block, start, length, kv_head,
    K: tl.constexpr, D: tl.constexpr, B: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """k and v of a tile's hot block, and the keys' positions."""
    i = tl.arange(0, KEYS)
    key = block * B + tl.where(i < B, i, NOWHERE)
    k, v = load_keys(k_ptr, v_ptr, start + key, key < length, kv_head, K, D)
    return k, v, key


@triton.jit
def _hot_bounds(count_ptr, position, count, B: tl.constexpr):
    """Of a tile's hot blocks, in ascending order: how many every query is past of, and all."""
    hot = tl.load(count_ptr)
    return tl.maximum(hot - (position + count - 1) // B + position // B - 1, 0), hot


@triton.jit(do_not_specialize=[
    "num_samples", "num_tiles", "capacity", "first_tile", "scratch_slots",
])  # fmt: skip
def _tile_forward(
    q_ptr, k_ptr, v_ptr, hot_block_ptr, hot_queries_ptr, hot_count_ptr, cold_count_ptr,
    cold_o_ptr, cold_lse_ptr, o_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, num_samples,
    num_tiles, capacity, first_tile, scratch_slots, scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, S: tl.constexpr, S_2: tl.constexpr,
    B: tl.constexpr, KEYS: tl.constexpr, G: tl.constexpr, QUERIES: tl.constexpr,
    ROWS: tl.constexpr, MERGE: tl.constexpr, MERGE_STAGES: tl.constexpr,
):  # fmt: skip
    tile, kv_head = first_tile + tl.program_id(0), tl.program_id(1)
    sample, first, count, position = query_tile(tile, cu_q_ptr, cu_k_ptr, num_samples, QUERIES)
    if count <= 0:
        return
    query, rows, live = packed_rows(first, count, kv_head, H, G, ROWS)
    t = tl.where(live, position + query, -1)
    start, length = span(sample, cu_k_ptr)
    q = load_rows(q_ptr, rows, live, D)
    acc, row_max, row_sum = empty_softmax(ROWS, D)
    tile_id = kv_head.to(tl.int64) * num_tiles + tile
    past, hot = _hot_bounds(hot_count_ptr + tile_id, position, count, B)
    # Each step reads the next one's block number: the loads of k and v wait for it.
    hot_block_ptr += tile_id * capacity
    hot_queries_ptr += tile_id * capacity
    block, chosen_by = tl.load(hot_block_ptr), tl.load(hot_queries_ptr)
    for j in range(past):
        k, v, key = _hot_keys(k_ptr, v_ptr, block, start, length, kv_head, K, D, B, KEYS)
        chose = ((chosen_by >> query) & 1) != 0
        block, chosen_by = tl.load(hot_block_ptr + j + 1), tl.load(hot_queries_ptr + j + 1)
        s = dot(q, tl.trans(k)) * scale + tl.where(chose, 0.0, float("-inf"))[:, None]
        if KEYS > B:
            s = tl.where((key < NOWHERE)[None, :], s, float("-inf"))
        acc, row_max, row_sum = softmax_step(s, v, acc, row_max, row_sum)
    for j in range(past, hot):
        k, v, key = _hot_keys(k_ptr, v_ptr, block, start, length, kv_head, K, D, B, KEYS)
        chose = ((chosen_by >> query) & 1) != 0
        block, chosen_by = tl.load(hot_block_ptr + j + 1), tl.load(hot_queries_ptr + j + 1)
        visible = chose[:, None] & (key[None, :] <= t[:, None])
        s = tl.where(visible, dot(q, tl.trans(k)) * scale, float("-inf"))
        acc, row_max, row_sum = softmax_step(s, v, acc, row_max, row_sum)
    if MERGE:
        # a cold partial is one more key, of score lse and value o; all maxima come first, so that
        # the steps of the loop do not wait for each other
        cold = tl.load(cold_count_ptr + tile_id * QUERIES + query, mask=live, other=0)
        local = tl.program_id(0) * QUERIES + query
        slot = (kv_head.to(tl.int64) * scratch_slots + local * S) * G + rows % G
        i = tl.arange(0, S_2)[None, :]
        s = tl.load(
            cold_lse_ptr + slot[:, None] + i * G, mask=i < cold[:, None], other=float("-inf")
        )
        new_max = tl.maximum(row_max, tl.max(s, 1))
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale = tl.exp2(row_max - finite_max)
        row_sum = row_sum * rescale + tl.sum(tl.exp2(s - finite_max[:, None]), 1)
        acc *= rescale[:, None]
        row_max = new_max
        for j in tl.range(0, tl.max(cold, 0), num_stages=MERGE_STAGES):
            score = tl.load(cold_lse_ptr + slot + j * G, mask=j < cold, other=float("-inf"))
            partial = load_rows(cold_o_ptr, slot + j * G, j < cold, D).to(tl.float32)
            acc += partial * tl.exp2(score - finite_max)[:, None]
    store_softmax(o_ptr, lse_ptr, rows, live, acc, row_max, row_sum, D)


@triton.jit(do_not_specialize=[
    "num_samples", "num_slots", "first_slot", "chunk", "num_chunks", "scratch_slots", "num_blocks",
])  # fmt: skip
def _cold_dq(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, entry_ptr, offset_ptr, dq_ptr,
    cu_q_ptr, cu_k_ptr, num_samples,
    num_slots, first_slot, chunk, num_chunks, scratch_slots, num_blocks, scale, dq_scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, S: tl.constexpr, B: tl.constexpr,
    KEYS: tl.constexpr, G: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    block, part, kv_head = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.program_id(1)
    offset = offset_ptr + ((kv_head * num_blocks + block) * num_chunks + chunk) * 2 + 1
    begin, end = tl.load(offset) + part * QUERIES, tl.load(offset + 1)
    if begin >= end:
        return
    r = tl.arange(0, ROWS)
    query, head = r // G, r % G
    sample, start, length, key = _block_keys(block, cu_k_ptr, num_samples, B, KEYS)
    k, v = load_keys(k_ptr, v_ptr, start + key, key < length, kv_head, K, D)
    sample_slot, first_row = _first_slot(sample, cu_q_ptr, QUERIES)
    first_entry = (kv_head * num_slots + first_slot) * S
    entry = tl.load(entry_ptr + tl.minimum(begin + query, end - 1)) - first_entry
    for j in range(begin, end, PARTS * QUERIES):
        live = (query < QUERIES) & (j + query < end)
        t = entry // S + first_slot - sample_slot
        rows = (first_row + t).to(tl.int64) * H + kv_head * G + head
        q, do, lse, delta = load_queries(q_ptr, do_ptr, lse_ptr, delta_ptr, rows, live, D)
        dq = tl.zeros([ROWS, D], tl.float32)
        slot = (kv_head.to(tl.int64) * scratch_slots + entry) * G + head
        entry = tl.load(entry_ptr + tl.minimum(j + PARTS * QUERIES + query, end - 1)) - first_entry
        real = (key < NOWHERE)[None, :] if KEYS > B else None
        dq = dq_step(dq, q, k, v, do, lse, delta, real, scale)
        store_rows(dq_ptr, slot, dq * dq_scale, live, D)


@triton.jit(do_not_specialize=[
    "num_samples", "num_tiles", "capacity", "first_tile", "scratch_slots",
])  # fmt: skip
def _tile_dq(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, hot_block_ptr, hot_queries_ptr, hot_count_ptr,
    cold_count_ptr, cold_dq_ptr, dq_ptr, cu_q_ptr, cu_k_ptr, num_samples,
    num_tiles, capacity, first_tile, scratch_slots, scale, dq_scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, S: tl.constexpr, S_2: tl.constexpr,
    B: tl.constexpr, KEYS: tl.constexpr, G: tl.constexpr, QUERIES: tl.constexpr,
    ROWS: tl.constexpr, MERGE: tl.constexpr, MERGE_STAGES: tl.constexpr,
):  # fmt: skip
    tile, kv_head = first_tile + tl.program_id(0), tl.program_id(1)
    sample, first, count, position = query_tile(tile, cu_q_ptr, cu_k_ptr, num_samples, QUERIES)
    if count <= 0:
        return
    query, rows, live = packed_rows(first, count, kv_head, H, G, ROWS)
    t = tl.where(live, position + query, -1)
    start, length = span(sample, cu_k_ptr)
    q, do, lse, delta = load_queries(q_ptr, do_ptr, lse_ptr, delta_ptr, rows, live, D)
    dq = tl.zeros([ROWS, D], tl.float32)
    tile_id = kv_head.to(tl.int64) * num_tiles + tile
    past, hot = _hot_bounds(hot_count_ptr + tile_id, position, count, B)
    # Each step reads the next one's block number: the loads of k and v wait for it.
    hot_block_ptr += tile_id * capacity
    hot_queries_ptr += tile_id * capacity
    block, chosen_by = tl.load(hot_block_ptr), tl.load(hot_queries_ptr)
    for j in range(past):
        k, v, key = _hot_keys(k_ptr, v_ptr, block, start, length, kv_head, K, D, B, KEYS)
        chose = ((chosen_by >> query) & 1) != 0
        block, chosen_by = tl.load(hot_block_ptr + j + 1), tl.load(hot_queries_ptr + j + 1)
        real = (key < NOWHERE)[None, :] if KEYS > B else None
        dq = dq_step(dq, q, k, v, do, tl.where(chose, lse, float("inf")), delta, real, scale)
    for j in range(past, hot):
        k, v, key = _hot_keys(k_ptr, v_ptr, block, start, length, kv_head, K, D, B, KEYS)
        chose = ((chosen_by >> query) & 1) != 0
        block, chosen_by = tl.load(hot_block_ptr + j + 1), tl.load(hot_queries_ptr + j + 1)
        visible = chose[:, None] & (key[None, :] <= t[:, None])
        dq = dq_step(dq, q, k, v, do, lse, delta, visible, scale)
    dq *= dq_scale
    if MERGE:
        cold = tl.load(cold_count_ptr + tile_id * QUERIES + query, mask=live, other=0)
        local = tl.program_id(0) * QUERIES + query
        slot = (kv_head.to(tl.int64) * scratch_slots + local * S) * G + rows % G
        for j in tl.range(0, tl.max(cold, 0), num_stages=MERGE_STAGES):
            dq += load_rows(cold_dq_ptr, slot + j * G, j < cold, D).to(tl.float32)
    add_rows(dq_ptr, rows, dq, live, D)


@triton.jit
def _chosen_by(entry_ptr, at, end, S: tl.constexpr):
    """Slots of the queries at places of a block's list; past its end, the last one again."""
    return tl.load(entry_ptr + tl.minimum(at, end - 1)) // S


@triton.jit
def _gather(
    q_ptr, do_ptr, lse_ptr, delta_ptr, row, head, live, H: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """As `load_queries`, but of rows that exist even where not live, so that no load is masked."""
    rows = row.to(tl.int64) * H + head
    at = row.to(tl.int64)[:, None] * (H * D) + (head[:, None] * D + tl.arange(0, D)[None, :])
    lse = tl.where(live, tl.load(lse_ptr + rows), float("inf"))
    return tl.load(q_ptr + at), tl.load(do_ptr + at), lse, tl.load(delta_ptr + rows)


@triton.jit(do_not_specialize=["num_samples", "num_slots", "num_blocks", "num_chunks"])
def _dkv(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, entry_ptr, offset_ptr, dk_ptr, dv_ptr,
    cu_q_ptr, cu_k_ptr, num_samples, num_slots, num_blocks, num_chunks, scale, dk_scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, S: tl.constexpr, B: tl.constexpr,
    KEYS: tl.constexpr, G: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    block, kv_head = tl.program_id(0), tl.program_id(1)
    offset = offset_ptr + (kv_head * num_blocks + block) * num_chunks * 2
    begin, end = tl.load(offset), tl.load(offset + num_chunks * 2)
    if begin >= end:
        return
    sample, start, length, key = _block_keys(block, cu_k_ptr, num_samples, B, KEYS)
    k, v = load_keys(k_ptr, v_ptr, start + key, key < length, kv_head, K, D)
    sample_slot, first_row = _first_slot(sample, cu_q_ptr, QUERIES)
    row_of_slot = first_row - sample_slot - kv_head * num_slots
    row_at_0 = tl.load(cu_q_ptr + sample + 1) - length  # of a query at position 0, if there is one
    r = tl.arange(0, ROWS)
    query, head = r // G, kv_head * G + r % G
    dk = tl.zeros([KEYS, D], tl.float32)
    dv = tl.zeros([KEYS, D], tl.float32)
    # Queries inside the block, which do not see all of it, come first in its list: their pairs
    # are hot, and in their chunk no earlier query chose the block.
    masked_end = tl.minimum(end, begin + tl.cdiv(B, QUERIES) * QUERIES)
    for j in range(begin, masked_end, QUERIES):
        row = _chosen_by(entry_ptr, j + query, end, S) + row_of_slot
        live = (query < QUERIES) & (j + query < end)
        q, do, lse, delta = _gather(q_ptr, do_ptr, lse_ptr, delta_ptr, row, head, live, H, D)
        visible = key[None, :] <= (row - row_at_0)[:, None]
        dk, dv = dkv_step(dk, dv, q, k, v, do, lse, delta, visible, scale)
    for j in range(masked_end, end, QUERIES):
        row = _chosen_by(entry_ptr, j + query, end, S) + row_of_slot
        live = (query < QUERIES) & (j + query < end)
        q, do, lse, delta = _gather(q_ptr, do_ptr, lse_ptr, delta_ptr, row, head, live, H, D)
        dk, dv = dkv_step(dk, dv, q, k, v, do, lse, delta, None, scale)
    rows = (start + key).to(tl.int64) * K + kv_head
    add_rows(dk_ptr, rows, dk * dk_scale, key < length, D)
    add_rows(dv_ptr, rows, dv, key < length, D)


def _block_sizes(block_size):
    return {"B": block_size, "KEYS": max(16, block_size)}  # a dot wants 16


def _for_each_chunk(q, k, lists, cold_kernel, tile_kernel):
    """Run the cold kernel (if any pair is cold), then the tile kernel, over chunks of tiles.

    The kernels take the chunk's grid, its run-time sizes and the constants.
    """
    at, queries = lists.at, lists.tile["QUERIES"]
    kv_heads, tiles = lists.hot_count.shape
    sizes = dict(
        S=lists.num_selected, **_block_sizes(lists.block_size), **heads_of(q, k), **lists.tile,
        num_warps=4,
    )  # fmt: skip
    merge = dict(
        S_2=triton.next_power_of_2(lists.num_selected), MERGE=lists.index is not None,
        MERGE_STAGES=stages(q, 4),
    )  # fmt: skip
    num_blocks, num_chunks = at.key_blocks(lists.block_size), triton.cdiv(tiles, lists.chunk)
    scratch = lists.chunk * queries * lists.num_selected
    for number, first in enumerate(range(0, tiles, lists.chunk)):
        n = min(lists.chunk, tiles - first)
        if lists.index:
            positions = at.positions_before((first + n) * queries)
            seen = min(num_blocks, triton.cdiv(positions, lists.block_size) + at.samples)
            cold_kernel(
                (seen * PARTS, kv_heads),
                (tiles * queries, first * queries, number, num_chunks, scratch, num_blocks),
                sizes | {"PARTS": PARTS},
            )
        capacity = lists.hot_block.shape[2]
        tile_kernel((n, kv_heads), (tiles, capacity, first, scratch), sizes | merge)


def _cold_scratch(q, lists, dtype, *size):
    """One value (or row) per pair and head of the group for one chunk; a stub if all is hot."""
    kv_heads = len(lists.hot_count)
    per_head = lists.chunk * lists.tile["QUERIES"] * lists.num_selected
    pairs = kv_heads * per_head if lists.index else 1
    return q.new_empty(pairs, lists.tile["G"], *size, dtype=dtype)


def selected_forward(q, k, v, lists, scale):
    """o [Tq, H, D] and base-2 lse [Tq, H]."""
    scale, at = scales(q, scale)[1], lists.at
    o, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    cold_o = _cold_scratch(q, lists, q.dtype, q.shape[2])
    cold_lse = _cold_scratch(q, lists, torch.float32)

    def cold_kernel(grid, lengths, sizes):
        _cold_forward[grid](
            q, k, v, *lists.index, cold_o, cold_lse, *at.arguments, *lengths, scale,
            num_stages=1, **sizes,
        )  # fmt: skip

    def tile_kernel(grid, lengths, sizes):
        _tile_forward[grid](
            q, k, v, *lists[:4], cold_o, cold_lse, o, lse, *at.arguments, *lengths, scale,
            num_stages=stages(q, 3), **sizes,
        )  # fmt: skip

    _for_each_chunk(q, k, lists, cold_kernel, tile_kernel)
    return o, lse


def selected_dq(q, k, v, do, lse, delta, dq, lists, scale):
    """Add this branch's gradient to dq in place."""
    (score_scale, scale), at = scales(q, scale), lists.at
    cold_dq = _cold_scratch(q, lists, q.dtype, q.shape[2])
    inputs = (q, k, v, do, lse, delta)

    def cold_kernel(grid, lengths, sizes):
        _cold_dq[grid](
            *inputs, *lists.index, cold_dq, *at.arguments, *lengths, scale, score_scale,
            num_stages=1, maxnreg=for_three_programs(q), **sizes,
        )  # fmt: skip

    def tile_kernel(grid, lengths, sizes):
        _tile_dq[grid](
            *inputs, *lists[:4], cold_dq, dq, *at.arguments, *lengths, scale, score_scale,
            num_stages=stages(q, 2), **sizes,
        )  # fmt: skip

    _for_each_chunk(q, k, lists, cold_kernel, tile_kernel)


def selected_dkv(q, k, v, do, lse, delta, dk, dv, lists, scale):
    """Add this branch's gradients to dk and dv in place."""
    (score_scale, scale), at = scales(q, scale), lists.at
    num_blocks, slots = at.key_blocks(lists.block_size), lists.cold_count.shape[1]
    num_chunks = triton.cdiv(lists.hot_count.shape[1], lists.chunk)
    index = lists.index or _index_by_block(lists.bins, 2 * num_chunks * num_blocks * k.shape[1])
    _dkv[(num_blocks, k.shape[1])](
        q, k, v, do, lse, delta, *index, dk, dv, *at.arguments, slots, num_blocks, num_chunks,
        scale, score_scale, S=lists.num_selected, **_block_sizes(lists.block_size),
        **heads_of(q, k), **lists.tile, num_warps=4, num_stages=stages(q, 2),
    )  # fmt: skip


class _SelectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, blocks, at, block_size, scale):
        with torch.cuda.device_of(q):
            lists = build_tile_lists(q, blocks, at, block_size)
            o, lse = selected_forward(q, k, v, lists, scale)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.lists, ctx.scale = lists, scale
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        do = do.contiguous()
        inputs = (q, k, v, do, lse, row_deltas(do, o))
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        selected_dq(*inputs, dq, ctx.lists, ctx.scale)
        selected_dkv(*inputs, dk, dv, ctx.lists, ctx.scale)
        return dq, dk, dv, None, None, None, None


def selected_attention(q, k, v, blocks, cu_q, cu_k, *, block_size, scale=None):
    """Causal softmax attention over the tokens of the chosen blocks.

    blocks int32 [Tq, K, S] as from `select_blocks`, constant; -1, in any slot, is an unused one,
    and no block may be there twice. Returns o [Tq, H, D], zero where no token is visible.
    Differentiable in q, k, v.
    """
    check_inputs("selected_attention", q, k, v, head_dim=q.shape[2], block_size=block_size)
    if not len(q):
        return torch.zeros_like(q)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    at = streams_of(q, k, cu_q, cu_k)
    return _SelectedAttention.apply(q, k, v, blocks.int(), at, block_size, scale)
