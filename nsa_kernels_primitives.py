"""What the Triton kernels share: Triton itself, the checks of their inputs, and small jit helpers.

Shapes: T tokens, H query heads, K key/value heads, G = H // K, D head size, B block size.
        q and o are [T, H, D], k and v [T, K, D], contiguous, so the kernels take no strides.
Row numbers: query row t * H + h, key row t * K + kv_head, in int64 before they are multiplied.
Tiles: a tile never crosses samples (`locate`), so a sample's results do not depend on the others.
Pointers: `x_ptr` of a kernel is the tensor x; cu_q and cu_k are cu_seqlens_q and cu_seqlens_k, and
        cu_mean numbers the means of complete blocks in the same way.
Softmax: base 2. `scale` is log2(e) times the scale of the scores, every lse a base-2 logarithm.
Lengths stay run-time values that never specialise, so no new length compiles anything (but for the
choice of blocks, once for each doubling of the longest), and no length is read back to the host:
grids are upper bounds, and the programs past the end return.
"""

from typing import NamedTuple

import torch

from .nsa_checks import check_lengths

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Absent:
        """Takes Triton's place so that this code can be imported; `check_inputs` gives advice."""

        def __getattr__(self, name):
            return self

        def __call__(self, *args, **kwargs):
            return self

    triton = tl = _Absent()

HEAD_DIMS = (16, 32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TILE_ROWS = 64  # rows of a query tile: one wgmma of 4 warps
FLOAT32_TILE = 16  # a float32 product is one instruction per multiplication: small tiles only
LOG2_E = 1.4426950408889634


class PackedLengths(NamedTuple):
    """The lengths of the packed samples, on the device, and what the host knows of them."""

    cu_q: torch.Tensor  # int32 [samples + 1], cumulative
    cu_k: torch.Tensor  # the same of the keys
    queries: int  # of all samples
    keys: int

    @property
    def samples(self):
        return len(self.cu_q) - 1

    @property
    def arguments(self):
        """What a kernel takes to find its sample, by name."""
        return {"cu_q_ptr": self.cu_q, "cu_k_ptr": self.cu_k, "num_samples": self.samples}

    def query_tiles(self, size):
        """How many tile numbers of `size` queries there are (see `locate`)."""
        return self.queries // size + self.samples

    def key_blocks(self, size):
        return self.keys // size + self.samples

    def positions_before(self, row):
        """An upper bound of every position among the query rows before `row`, plus one."""
        return min(row, self.queries) + self.keys - self.queries


def check_inputs(name, *tensors, head_dim=None, block_size=None):
    """Raise unless the kernels can run on these tensors, which must share device and dtype."""
    if not hasattr(triton, "__version__") or not isinstance(triton.__version__, str):
        raise ImportError(
            f"{name} is a Triton kernel, but Triton is not installed. Install it with "
            "`pip install triton`, or set nsa_backend='reference' in the text config."
        )
    first = tensors[0]
    if not first.is_cuda and isinstance(locate, triton.JITFunction):
        raise ValueError(
            f"{name}: the tensors are on {first.device}, but the Triton kernels need a CUDA "
            "device. Move them there, or set nsa_backend='reference' in the text config."
        )
    if first.dtype not in DTYPES or any(x.dtype != first.dtype for x in tensors):
        raise ValueError(
            f"{name}: the dtypes are {', '.join(str(x.dtype) for x in tensors)}; the kernels take "
            "one of float16, bfloat16 and float32 for all. Cast the tensors, or set "
            "nsa_backend='reference' in the text config."
        )
    if head_dim is not None and head_dim not in HEAD_DIMS:
        raise ValueError(
            f"{name}: the kernels support head sizes {HEAD_DIMS}, not {head_dim}. "
            "Set nsa_backend='reference' in the text config to run it anyway."
        )
    if block_size is not None and (block_size < 8 or block_size & (block_size - 1)):
        raise ValueError(
            f"{name}: the kernels support block sizes that are powers of two from 8 up, not "
            f"{block_size}. Set nsa_backend='reference' in the text config to run it anyway."
        )


def packed_lengths(q, k, cu_seqlens_q, cu_seqlens_k, *, block_size=1):
    """`PackedLengths` of q [Tq, ...] and k [Tk // block_size, ...], on their device.

    Raises a ValueError where lengths on the CPU do not fit; others are not read.
    """
    if cu_seqlens_q.device.type == cu_seqlens_k.device.type == "cpu":
        check_lengths(q, k, cu_seqlens_q, cu_seqlens_k, block_size=block_size)
    cu_q, cu_k = (x.to(q.device, torch.int32).contiguous() for x in (cu_seqlens_q, cu_seqlens_k))
    return PackedLengths(cu_q, cu_k, len(q), len(k))


def mean_starts(cu_k, block_size):
    """int32 [samples + 1]: where each sample's block means start."""
    if len(cu_k) == 2:  # one sample: one launch, not five
        return cu_k // block_size
    counts = cu_k.diff() // block_size
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def scales(q, scale):
    """The scale of the scores and the same for base-2 logarithms."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return scale, scale * LOG2_E


def heads_of(q, k):
    """The shape constants of most kernels."""
    return {"H": q.shape[1], "K": k.shape[1], "D": q.shape[2]}


def tile_of(group, rows, most=None):
    """Queries of a tile that holds all `group` heads of each, and its rows, a power of two."""
    queries = max(1, rows // group)
    queries = min(queries, most or queries)
    return {"G": group, "QUERIES": queries, "ROWS": max(rows, triton.next_power_of_2(group))}


def stages(q, wanted):
    """Software pipelining depth: float32 tiles leave no shared memory for more than one."""
    return 1 if q.dtype == torch.float32 else wanted


def fitting(q, size):
    """`size` of a tile, or what is left of it in float32."""
    return min(size, FLOAT32_TILE) if q.dtype == torch.float32 else size


def for_three_programs(q):
    """Registers a thread may use so that three programs of 4 warps share a multiprocessor."""
    return 168 if q.element_size() == 2 else None


def row_deltas(do, o):
    """do · o of each row in float32 [T, H], which the backward of a softmax subtracts."""
    return (do.float() * o.float()).sum(-1)


@triton.jit
def locate(tile, cu_ptr, num_samples, SIZE: tl.constexpr):
    """The sample that owns tile number `tile`, and the tile's first token within the sample.

    Sample s owns the numbers from cu[s] // SIZE + s up to those of sample s + 1: enough for all
    of its tokens, and known without a prefix sum. The numbers that are too many are empty tiles.
    """
    low = 0
    high = num_samples
    while high - low > 1:
        middle = (low + high) // 2
        is_before = tl.load(cu_ptr + middle) // SIZE + middle <= tile
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    return low, (tile - tl.load(cu_ptr + low) // SIZE - low) * SIZE


@triton.jit
def span(sample, cu_ptr):
    """First token of a sample and the number of its tokens."""
    start = tl.load(cu_ptr + sample)
    return start, tl.load(cu_ptr + sample + 1) - start


@triton.jit
def query_tile(tile, cu_q_ptr, cu_k_ptr, num_samples, SIZE: tl.constexpr):
    """Sample, first row, number of queries (none if not positive), and position of the first."""
    sample, offset = locate(tile, cu_q_ptr, num_samples, SIZE)
    first, queries = span(sample, cu_q_ptr)
    _, keys = span(sample, cu_k_ptr)
    return sample, first + offset, tl.minimum(SIZE, queries - offset), keys - queries + offset


@triton.jit
def first_to_see(block, B: tl.constexpr):
    """Position of the first query that sees a block's mean: its last token (`is_complete`)."""
    return (block + 1) * B - 1


@triton.jit
def is_complete(block, position, B: tl.constexpr):
    """Whether a query sees a block's mean: nsa_rules.is_complete, for the kernels."""
    return first_to_see(block, B) <= position


@triton.jit
def num_complete(position, B: tl.constexpr):
    """How many blocks a query sees the means of: 0 ... num_complete - 1 are complete."""
    return (position + 1) // B


@triton.jit
def packed_rows(first, count, kv_head, H: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr):
    """Rows of a tile of `count` queries with all heads of a group: query, row number, is real."""
    r = tl.arange(0, ROWS)
    query = r // G
    return query, (first + query).to(tl.int64) * H + kv_head * G + r % G, query < count


@triton.jit
def load_rows(ptr, rows, mask, D: tl.constexpr):
    """Rows [R] of a [*, D] tensor as a tile [R, D], zero where masked."""
    ptrs = ptr + rows[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(ptrs, mask=mask[:, None], other=0.0)


@triton.jit
def store_rows(ptr, rows, tile, mask, D: tl.constexpr):
    """The opposite of `load_rows`; rounds to the tensor's dtype."""
    ptrs = ptr + rows[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask[:, None])


@triton.jit
def add_rows(ptr, rows, tile, mask, D: tl.constexpr):
    """Add to rows that no other program touches."""
    store_rows(ptr, rows, load_rows(ptr, rows, mask, D).to(tl.float32) + tile, mask, D)


@triton.jit
def load_keys(k_ptr, v_ptr, tokens, real, kv_head, K: tl.constexpr, D: tl.constexpr):
    """k and v [keys, D] of one KV head at tokens of the pack, zero where not real."""
    rows = tokens.to(tl.int64) * K + kv_head
    return load_rows(k_ptr, rows, real, D), load_rows(v_ptr, rows, real, D)


@triton.jit
def load_queries(q_ptr, do_ptr, lse_ptr, delta_ptr, rows, live, D: tl.constexpr):
    """What a backward step needs of its queries; rows that are not live get p = 0."""
    lse = tl.load(lse_ptr + rows, mask=live, other=float("inf"))
    delta = tl.load(delta_ptr + rows, mask=live, other=0.0)
    return load_rows(q_ptr, rows, live, D), load_rows(do_ptr, rows, live, D), lse, delta


@triton.jit
def dot(a, b):
    """a @ b in float32; float32 operands are not rounded to tf32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def dot_add(a, b, acc):
    """acc + a @ b, as `dot`."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def empty_softmax(ROWS: tl.constexpr, D: tl.constexpr):
    """acc, row_max, row_sum of rows that have seen no key."""
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    return tl.zeros([ROWS, D], tl.float32), row_max, tl.zeros([ROWS], tl.float32)


@triton.jit
def softmax_step(scores, values, acc, row_max, row_sum):
    """One step of online softmax. A row that has seen no key keeps max = -inf and sum = 0."""
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    rescale = tl.exp2(row_max - finite_max)
    p = tl.exp2(scores - finite_max[:, None])
    acc = dot_add(p.to(values.dtype), values, acc * rescale[:, None])
    return acc, new_max, row_sum * rescale + tl.sum(p, 1)


@triton.jit
def store_softmax(o_ptr, lse_ptr, rows, live, acc, row_max, row_sum, D: tl.constexpr):
    """Write o and lse. A row that saw no key gets o = 0 and lse = +inf, so that p is 0 later."""
    blind = row_sum == 0.0
    row_sum = tl.where(blind, 1.0, row_sum)
    store_rows(o_ptr, rows, acc / row_sum[:, None], live, D)
    tl.store(lse_ptr + rows, tl.where(blind, float("inf"), row_max + tl.log2(row_sum)), mask=live)


@triton.jit
def dq_step(dq, q, k, v, do, lse, delta, visible, scale):
    """Add one key tile to dq [rows, D]. With a gate in lse (nsa_kernels.py), p is gate * p.

    `visible` [rows, keys] is None where every row sees every key; a row with lse = +inf sees none.
    """
    s = dot(q, tl.trans(k))
    dp = dot(do, tl.trans(v))
    p = tl.exp2(s * scale - lse[:, None])
    if visible is not None:
        p = tl.where(visible, p, 0.0)
    ds = p * (dp - delta[:, None])
    return dot_add(ds.to(k.dtype), k, dq)


@triton.jit
def dkv_step(dk, dv, q, k, v, do, lse, delta, visible, scale):
    """Add one query tile to dk and dv [keys, D]. `visible` is as for `dq_step`.

    Rows come first in every product, so that a thread holds lse and delta of two rows, not of all.
    dv comes before the second product: the other way round it spills, and is a fifth slower.
    """
    p = tl.exp2(dot(q, tl.trans(k)) * scale - lse[:, None])
    if visible is not None:
        p = tl.where(visible, p, 0.0)
    dv = dot_add(tl.trans(p.to(v.dtype)), do, dv)
    ds = p * (dot(do, tl.trans(v)) - delta[:, None])
    return dot_add(tl.trans(ds.to(k.dtype)), q, dk), dv
