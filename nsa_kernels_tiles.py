"""What the selected branch walks over: each tile's hot blocks, and its cold pairs by block.

A tile is about `64 // G` neighbouring queries with all heads of a group. Blocks that enough
queries of a tile chose are *hot*: the tile walks over them. Every other (query, block) pair is
*cold* and is listed by its block. The lists come from a stable sort, so two runs give the same.

Numbers: queries are counted in slots of tiles, u = tile * QUERIES + query, so that a tile's slots
         are neighbours; blocks of all samples are numbered as `locate` numbers tiles.
Order: the lists and their chunks, the kernel that splits a tile's pairs, the launcher.
"""

from typing import NamedTuple

import torch

from .memory_videonsa import (
    CHUNK_QUERIES,
    LEAST_QUERIES,
    QUERIES_SHARE,
    free_memory,
    partial_bytes,
    units_that_fit,
)
from .nsa_kernels_primitives import (
    TILE_ROWS,
    PackedLengths,
    fitting,
    query_tile,
    tile_of,
    tl,
    triton,
)

LARGEST_BLOCK = 64  # larger ones are taken apart
ALL_HOT_UP_TO = 8192  # keys; up to here tiles alone are as fast and need no scratch
MASK_BITS = 32  # queries of a tile, one bit each
SORTED = 1024  # entries that one program sorts
NO_BLOCK = tl.constexpr(0x7FFFFFFF)


class BlockIndex(NamedTuple):
    """Who chose each block: flat entries (kv_head * U + u) * S + slot, in the order of their bins.

    A bin is a KV head, a block, a chunk of tiles, and hot or cold, in this order: the cold pairs
    of a block in one chunk are neighbours, and so are all pairs of a block.
    """

    entry: torch.Tensor  # int32 [K * U * S]
    offset: torch.Tensor  # int32 [bins + 1]; bins = K * blocks * chunks * 2

    @property
    def arguments(self):
        """What a kernel takes to walk over a block's pairs, by name."""
        return {"entry_ptr": self.entry, "offset_ptr": self.offset}


class Chunk(NamedTuple):
    """Tiles whose cold partials are held at once: for both kernels a grid and run-time sizes."""

    cold_grid: tuple[int, int]  # blocks that the chunk's queries can have chosen, K
    cold_sizes: dict
    tile_grid: tuple[int, int]  # tiles of the chunk, K
    tile_sizes: dict


class TileLists(NamedTuple):
    """What the tiles walk over. U is the number of tiles times the queries of each."""

    hot_block: torch.Tensor  # int32 [K, tiles, capacity], numbers within the sample
    hot_queries: torch.Tensor  # the same shape; bit i: query i of the tile chose the block
    hot_count: torch.Tensor  # int32 [K, tiles]
    cold_count: torch.Tensor  # int32 [K, U]
    bins: torch.Tensor | None  # int32 [K, U, S], what is left to sort where there is no index
    index: BlockIndex | None  # None: everything is hot, and only the backward needs one
    lengths: PackedLengths
    tile: dict  # G, QUERIES, ROWS
    chunk_tiles: int  # tiles of one `Chunk`
    block_size: int
    num_selected: int

    @property
    def arguments(self):
        """What a kernel takes to walk over a tile's hot blocks and its cold partials, by name."""
        return {
            "hot_block_ptr": self.hot_block,
            "hot_queries_ptr": self.hot_queries,
            "hot_count_ptr": self.hot_count,
            "cold_count_ptr": self.cold_count,
        }

    @property
    def num_blocks(self):
        return self.lengths.key_blocks(self.block_size)

    @property
    def num_slots(self):
        return self.cold_count.shape[1]

    @property
    def num_chunks(self):
        return triton.cdiv(self.hot_count.shape[1], self.chunk_tiles)

    @property
    def scratch_slots(self):
        """Cold pairs that a chunk can have at most, of one KV head."""
        return self.chunk_tiles * self.tile["QUERIES"] * self.num_selected

    def chunks(self):
        """Yield a `Chunk` for each run of tiles."""
        kv_heads, tiles = self.hot_count.shape
        queries, num_blocks = self.tile["QUERIES"], self.num_blocks
        scratch = {"scratch_slots": self.scratch_slots}
        cold = {"num_slots": self.num_slots, "num_blocks": num_blocks}
        cold |= {"num_chunks": self.num_chunks} | scratch
        tile = {"num_tiles": tiles, "capacity": self.hot_block.shape[2]} | scratch
        for number, first in enumerate(range(0, tiles, self.chunk_tiles)):
            count = min(self.chunk_tiles, tiles - first)
            positions = self.lengths.positions_before((first + count) * queries)
            seen = triton.cdiv(positions, self.block_size) + self.lengths.samples
            yield Chunk(
                cold_grid=(min(num_blocks, seen), kv_heads),
                cold_sizes=cold | {"chunk": number, "first_slot": first * queries},
                tile_grid=(count, kv_heads),
                tile_sizes=tile | {"first_tile": first},
            )

    def index_by_block(self):
        """The index of all pairs, made now where the forward needed none."""
        num_bins = len(self.hot_count) * self.num_blocks * self.num_chunks * 2
        return self.index or _index_by_block(self.bins, num_bins)


@triton.jit(do_not_specialize=[
    "num_samples", "num_tiles", "capacity", "num_blocks", "chunk_tiles", "num_chunks",
])  # fmt: skip
def _build_lists(
    blocks_ptr, hot_block_ptr, hot_queries_ptr, hot_count_ptr, cold_count_ptr, bins_ptr, flag_ptr,
    cu_q_ptr, cu_k_ptr, num_samples, num_tiles, capacity, num_blocks, chunk_tiles, num_chunks,
    K: tl.constexpr, S: tl.constexpr, S_2: tl.constexpr, B: tl.constexpr,
    QUERIES: tl.constexpr, QUERIES_2: tl.constexpr, MIN_SHARE: tl.constexpr,
):  # fmt: skip
    """Owns: a tile of QUERIES queries of one KV head.
    Reads: blocks int32 [Tq, K, S], the choice of its queries.
    Writes: the tile's rows of the tensors of `TileLists`: hot_block, hot_queries, hot_count,
    cold_count, bins; and flag int8 [K, tiles, QUERIES_2 * S_2], scratch: whether a pair is hot.
    """
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
    place = tile_id * capacity + tl.cumsum(new.to(tl.int32), 0) - 1
    tl.store(hot_block_ptr + place, block, mask=new)
    tl.atomic_or(hot_queries_ptr + place, 1 << (entry // S_2), mask=hot > 0, sem="relaxed")
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
    bins = (block * num_chunks + tile // chunk_tiles) * 2 + is_cold
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


def _queries_at_once(q, num_selected, keep):
    """Queries whose cold partials are held at once; for a backward always as many, because the
    order of its sums, and so their rounding, goes by them.
    """
    if keep:
        return CHUNK_QUERIES
    size = partial_bytes(q.shape[1], q.shape[2], num_selected, q.element_size())
    free = free_memory(q.device)
    return units_that_fit(CHUNK_QUERIES, LEAST_QUERIES, size, free, QUERIES_SHARE)


def build_tile_lists(q, blocks, lengths, *, block_size, keep):
    """Hot and cold lists of the choice `blocks` int32 [Tq, K, S]; keep: for a backward too."""
    blocks, block_size = _smaller_blocks(blocks, block_size, fitting(q, LARGEST_BLOCK))
    _, kv_heads, num_selected = blocks.shape
    slots = triton.next_power_of_2(num_selected)
    group, most = q.shape[1] // kv_heads, min(MASK_BITS, max(1, SORTED // slots))
    tile = tile_of(group, fitting(q, TILE_ROWS), most)
    queries = tile["QUERIES"]
    # A third of a tile's queries is where a step of the tile costs what the cold pairs would.
    min_share = 1 if lengths.keys <= ALL_HOT_UP_TO else max(1, round(queries / 3))
    tiles = lengths.query_tiles(queries)
    chunk_tiles = tiles
    if min_share > 1:
        at_once = _queries_at_once(q, num_selected, keep)
        chunk_tiles = min(max(at_once // queries, 1), tiles)
    own_blocks = (queries + block_size - 2) // block_size + 1  # at most, of one tile
    capacity = queries * num_selected // min_share + own_blocks + 1  # read ahead
    integers = {"dtype": torch.int32, "device": blocks.device}
    hot_block = torch.empty(kv_heads, tiles, capacity, **integers)
    hot_queries = torch.zeros(kv_heads, tiles, capacity, **integers)
    hot_count = torch.empty(kv_heads, tiles, **integers)
    cold_count = torch.empty(kv_heads, tiles * queries, **integers)
    num_blocks, num_chunks = lengths.key_blocks(block_size), triton.cdiv(tiles, chunk_tiles)
    num_bins = kv_heads * num_blocks * num_chunks * 2
    bins = torch.full((kv_heads, tiles * queries, num_selected), num_bins, **integers)
    queries_2 = triton.next_power_of_2(queries)
    flag = torch.empty(kv_heads, tiles, queries_2 * slots, dtype=torch.int8, device=blocks.device)
    _build_lists[(tiles, kv_heads)](
        blocks, hot_block, hot_queries, hot_count, cold_count, bins, flag, **lengths.arguments,
        num_tiles=tiles, capacity=capacity, num_blocks=num_blocks, chunk_tiles=chunk_tiles,
        num_chunks=num_chunks, K=kv_heads, S=num_selected, S_2=slots, B=block_size,
        QUERIES=queries, QUERIES_2=queries_2, MIN_SHARE=min_share, num_warps=4,
    )  # fmt: skip
    index = None if min_share == 1 else _index_by_block(bins, num_bins)
    return TileLists(
        hot_block, hot_queries, hot_count, cold_count, bins=None if index else bins, index=index,
        lengths=lengths, tile=tile, chunk_tiles=chunk_tiles, block_size=block_size,
        num_selected=num_selected,
    )  # fmt: skip
