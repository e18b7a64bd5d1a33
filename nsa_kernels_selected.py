"""Selected branch in Triton: attention over the tokens of the chosen blocks.

A tile of queries walks over its hot blocks (nsa_kernels_tiles.py). For the cold pairs one program
per block keeps k and v, gathers the queries that chose it, and writes one partial result per pair,
which the query's tile merges. Each pair owns its slot, so two runs give the same bits.

Order: forward, dq, dk and dv, launchers, public function.
"""

import torch

from .nsa_checks import check_blocks, check_packed
from .nsa_kernels_primitives import (
    add_rows,
    check_inputs,
    dkv_step,
    dot,
    dq_step,
    empty_softmax,
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
    store_softmax,
    tl,
    triton,
)
from .nsa_kernels_tiles import build_tile_lists
from .nsa_reference import no_queries

PARTS = 2  # programs per block and chunk in the cold kernels
NOWHERE = tl.constexpr(1 << 30)  # position of what fills a small block up to 16 keys


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
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, entry_ptr, offset_ptr, cu_q_ptr, cu_k_ptr, num_samples,
    num_slots, first_slot, chunk, num_chunks, scratch_slots, num_blocks, scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, S: tl.constexpr, B: tl.constexpr,
    KEYS: tl.constexpr, G: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Owns: a block of one KV head, and every PARTS-th QUERIES of its cold pairs in one chunk.
    Reads: k, v [Tk, K, D] of the block; the pairs from `BlockIndex`; q [Tq, H, D] of their queries.
    Writes: o [K, scratch_slots, G, D], lse [K, scratch_slots, G] of the pairs, over this block.
    """
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
    q_ptr, k_ptr, v_ptr, cold_o_ptr, cold_lse_ptr, o_ptr, lse_ptr, hot_block_ptr, hot_queries_ptr,
    hot_count_ptr, cold_count_ptr, cu_q_ptr, cu_k_ptr, num_samples,
    num_tiles, capacity, first_tile, scratch_slots, scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, S: tl.constexpr, S_2: tl.constexpr,
    B: tl.constexpr, KEYS: tl.constexpr, G: tl.constexpr, QUERIES: tl.constexpr,
    ROWS: tl.constexpr, MERGE: tl.constexpr, MERGE_STAGES: tl.constexpr,
):  # fmt: skip
    """Owns: a tile of QUERIES queries with all heads of one KV head's group.
    Reads: q [Tq, H, D] of the tile; its lists from `TileLists`; k, v [Tk, K, D] of its hot blocks;
    with MERGE cold_o [K, scratch_slots, G, D], cold_lse [K, scratch_slots, G] of its cold pairs.
    Writes: o [Tq, H, D] and base-2 lse [Tq, H] of the tile.
    """
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
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, entry_ptr, offset_ptr,
    cu_q_ptr, cu_k_ptr, num_samples,
    num_slots, first_slot, chunk, num_chunks, scratch_slots, num_blocks, scale, dq_scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, S: tl.constexpr, B: tl.constexpr,
    KEYS: tl.constexpr, G: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Owns: a block of one KV head, and every PARTS-th QUERIES of its cold pairs in one chunk.
    Reads: k, v [Tk, K, D] of the block; the pairs from `BlockIndex`; q, do [Tq, H, D], lse, delta
    [Tq, H] of their queries.
    Writes: dq [K, scratch_slots, G, D] of the pairs, of this block.
    """
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
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, cold_dq_ptr, dq_ptr, hot_block_ptr,
    hot_queries_ptr, hot_count_ptr, cold_count_ptr, cu_q_ptr, cu_k_ptr, num_samples,
    num_tiles, capacity, first_tile, scratch_slots, scale, dq_scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, S: tl.constexpr, S_2: tl.constexpr,
    B: tl.constexpr, KEYS: tl.constexpr, G: tl.constexpr, QUERIES: tl.constexpr,
    ROWS: tl.constexpr, MERGE: tl.constexpr, MERGE_STAGES: tl.constexpr,
):  # fmt: skip
    """Owns: a tile of QUERIES queries with all heads of one KV head's group.
    Reads: q, do [Tq, H, D], lse, delta [Tq, H] of the tile; its lists from `TileLists`; k, v
    [Tk, K, D] of its hot blocks; with MERGE cold_dq [K, scratch_slots, G, D] of its cold pairs.
    Writes: adds to dq [Tq, H, D] of the tile.
    """
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
def _chosen_by(entry_ptr, place, end, S: tl.constexpr):
    """Slots of the queries at places of a block's list; past its end, the last one again."""
    return tl.load(entry_ptr + tl.minimum(place, end - 1)) // S


@triton.jit
def _gather(
    q_ptr, do_ptr, lse_ptr, delta_ptr, row, head, live, H: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """As `load_queries`, but of rows that exist even where not live, so that no load is masked."""
    rows = row.to(tl.int64) * H + head
    offsets = row.to(tl.int64)[:, None] * (H * D) + (head[:, None] * D + tl.arange(0, D)[None, :])
    lse = tl.where(live, tl.load(lse_ptr + rows), float("inf"))
    return tl.load(q_ptr + offsets), tl.load(do_ptr + offsets), lse, tl.load(delta_ptr + rows)


@triton.jit(do_not_specialize=["num_samples", "num_slots", "num_blocks", "num_chunks"])
def _selected_dkv(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, entry_ptr, offset_ptr,
    cu_q_ptr, cu_k_ptr, num_samples, num_slots, num_blocks, num_chunks, scale, dk_scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, S: tl.constexpr, B: tl.constexpr,
    KEYS: tl.constexpr, G: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Owns: a block of one KV head.
    Reads: k, v [Tk, K, D] of the block; its pairs from `BlockIndex`; q, do [Tq, H, D], lse, delta
    [Tq, H] of their queries.
    Writes: adds to dk, dv [Tk, K, D] of the block.
    """
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


def _constants(q, k, lists):
    """What all kernels of this branch take besides tensors, but for what a chunk says."""
    return dict(
        **lists.lengths.arguments, S=lists.num_selected, B=lists.block_size,
        KEYS=max(16, lists.block_size),  # a dot wants 16
        **heads_of(q, k), **lists.tile, num_warps=4,
    )  # fmt: skip


def _merge_constants(q, lists):
    """What the tile kernels take in addition."""
    return {
        "S_2": triton.next_power_of_2(lists.num_selected),
        "MERGE": lists.index is not None,
        "MERGE_STAGES": stages(q, 4),
    }


def _cold_scratch(q, lists, dtype, *size):
    """One value (or row) per pair and head of the group for one chunk; a stub if all is hot."""
    pairs = len(lists.hot_count) * lists.scratch_slots if lists.index else 1
    return q.new_empty(pairs, lists.tile["G"], *size, dtype=dtype)


def selected_forward(q, k, v, lists, *, scale):
    """o [Tq, H, D] and base-2 lse [Tq, H]."""
    o, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    cold_o = _cold_scratch(q, lists, q.dtype, q.shape[2])
    cold_lse = _cold_scratch(q, lists, torch.float32)
    constants = _constants(q, k, lists) | {"scale": scales(q, scale)[1]}
    merge = _merge_constants(q, lists)
    for chunk in lists.chunks():
        if lists.index:
            blocks, kv_heads = chunk.cold_grid
            _cold_forward[(blocks * PARTS, kv_heads)](
                q, k, v, cold_o, cold_lse, **lists.index.arguments, **chunk.cold_sizes,
                **constants, PARTS=PARTS, num_stages=1,
            )  # fmt: skip
        _tile_forward[chunk.tile_grid](
            q, k, v, cold_o, cold_lse, o, lse, **lists.arguments, **chunk.tile_sizes,
            **constants, **merge, num_stages=stages(q, 3),
        )  # fmt: skip
    return o, lse


def selected_dq(q, k, v, do, lse, delta, dq, lists, *, scale):
    """Add this branch's gradient to dq in place."""
    inputs = (q, k, v, do, lse, delta)
    cold_dq = _cold_scratch(q, lists, q.dtype, q.shape[2])
    score_scale, scale = scales(q, scale)
    constants = _constants(q, k, lists) | {"scale": scale, "dq_scale": score_scale}
    merge = _merge_constants(q, lists)
    for chunk in lists.chunks():
        if lists.index:
            blocks, kv_heads = chunk.cold_grid
            _cold_dq[(blocks * PARTS, kv_heads)](
                *inputs, cold_dq, **lists.index.arguments, **chunk.cold_sizes, **constants,
                PARTS=PARTS, num_stages=1, maxnreg=for_three_programs(q),
            )  # fmt: skip
        _tile_dq[chunk.tile_grid](
            *inputs, cold_dq, dq, **lists.arguments, **chunk.tile_sizes, **constants, **merge,
            num_stages=stages(q, 2),
        )  # fmt: skip


def selected_dkv(q, k, v, do, lse, delta, dk, dv, lists, *, scale):
    """Add this branch's gradients to dk and dv in place."""
    score_scale, scale = scales(q, scale)
    _selected_dkv[(lists.num_blocks, k.shape[1])](
        q, k, v, do, lse, delta, dk, dv, **lists.index_by_block().arguments,
        num_slots=lists.num_slots, num_blocks=lists.num_blocks, num_chunks=lists.num_chunks,
        scale=scale, dk_scale=score_scale, **_constants(q, k, lists), num_stages=stages(q, 2),
    )  # fmt: skip


class _SelectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, blocks, lengths, block_size, scale):
        with torch.cuda.device_of(q):
            keep = any(ctx.needs_input_grad)
            lists = build_tile_lists(q, blocks, lengths, block_size=block_size, keep=keep)
            o, lse = selected_forward(q, k, v, lists, scale=scale)
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
        selected_dq(*inputs, dq, ctx.lists, scale=ctx.scale)
        selected_dkv(*inputs, dk, dv, ctx.lists, scale=ctx.scale)
        return dq, dk, dv, None, None, None, None


def selected_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    block_size: int,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal softmax attention over the tokens of the chosen blocks.

    q [Tq, H, D]; k, v [Tk, K, D]; blocks int32 [Tq, K, S] as from `select_blocks`, constant; -1,
    in any slot, is an unused one, and no block may be there twice. Returns o [Tq, H, D], zero
    where no token is visible. Differentiable in q, k, v.
    """
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k)
    check_blocks(blocks, q, k)
    check_inputs("selected_attention", q, k, v, head_dim=q.shape[2], block_size=block_size)
    lengths = packed_lengths(q, k, cu_seqlens_q, cu_seqlens_k)
    if not len(q):
        return no_queries(q, k, v)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return _SelectedAttention.apply(q, k, v, blocks.int(), lengths, block_size, scale)
