"""Attention of one new token a row over the keys of a cache in Triton: decoding.

One query row cannot fill a GPU, and its time is that of reading the cache. So the keys are split
over programs, each of which reads its share once for all heads of a group, and a second kernel
merges their float32 partial results. How many keys there are stays on the device: the grid and the
scratch follow from shapes alone, and a recorded CUDA graph goes on while the cache fills.
"""

import torch

from .nsa_checks import check_decoding
from .nsa_kernels_primitives import (
    LOG2_E,
    check_inputs,
    dot,
    empty_softmax,
    fitting,
    load_rows,
    softmax_step,
    stages,
    store_softmax,
    tile_of,
    tl,
    triton,
)

KEYS = 64  # per step
LEAST_ROWS = 16  # of a tile that the tensor cores take
PROGRAMS_PER_MULTIPROCESSOR = 2  # as many as its shared memory holds in 16 bit
MERGE_FEATURES = 32  # per program


@triton.jit
def _load_cached(ptr, key, token_stride, real, D: tl.constexpr):
    """Rows of one key/value head of a cache as a tile [keys, D], zero where not real."""
    ptrs = ptr + key.to(tl.int64)[:, None] * token_stride + tl.arange(0, D)[None, :]
    return tl.load(ptrs, mask=real[:, None], other=0.0)


@triton.jit(do_not_specialize=["capacity", "num_rows"])
def _decode_forward(
    q_ptr, k_ptr, v_ptr, length_ptr, valid_ptr, o_ptr, lse_ptr, capacity, num_rows, scale,
    k_batch, k_token, k_head, v_batch, v_token, v_head, valid_batch, valid_token,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Owns: the heads of a group of one batch row, and one share of the keys, in whole steps.
    Reads: q [B, H, D]; k, v [B, capacity, K, D] and, if given, valid uint8 [B, capacity], by their
    strides; length int64 [1].
    Writes: the share's o [splits, B, H, D] and base-2 lse [splits, B, H]; num_rows = B * H.
    """
    split, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.arange(0, ROWS)
    rows, live = batch * H + kv_head * G + row, row < G
    q = load_rows(q_ptr, rows, live, D)
    k_ptr += batch * k_batch + kv_head.to(tl.int64) * k_head
    v_ptr += batch * v_batch + kv_head.to(tl.int64) * v_head
    length = tl.minimum(tl.load(length_ptr), capacity).to(tl.int32)
    steps, splits = tl.cdiv(length, KEYS), tl.num_programs(0)
    begin = split * steps // splits * KEYS
    end = tl.minimum((split + 1) * steps // splits * KEYS, length)
    acc, row_max, row_sum = empty_softmax(ROWS, D)
    for first in range(begin, end, KEYS):
        key = first + tl.arange(0, KEYS)
        real = key < end
        if valid_ptr is not None:
            valid_ptrs = valid_ptr + batch * valid_batch + key.to(tl.int64) * valid_token
            real = real & (tl.load(valid_ptrs, mask=real, other=0) != 0)
        k = _load_cached(k_ptr, key, k_token, real, D)
        v = _load_cached(v_ptr, key, v_token, real, D)
        s = tl.where(real[None, :], dot(q, tl.trans(k)) * scale, float("-inf"))
        acc, row_max, row_sum = softmax_step(s, v, acc, row_max, row_sum)
    rows += split.to(tl.int64) * num_rows
    store_softmax(o_ptr, lse_ptr, rows, live, acc, row_max, row_sum, D)


@triton.jit(do_not_specialize=["num_splits", "num_rows"])
def _merge_splits(
    parts_ptr, lse_ptr, o_ptr, num_splits, num_rows,
    D: tl.constexpr, SPLITS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Owns: FEATURES features of one row, a head of a batch row; num_rows = B * H.
    Reads: the parts float32 [num_splits, num_rows, D] and base-2 lse [num_splits, num_rows].
    Writes: o [num_rows, D].
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    split = tl.arange(0, SPLITS)
    rows, present = split.to(tl.int64) * num_rows + row, split < num_splits
    lse = tl.load(lse_ptr + rows, mask=present, other=float("inf"))
    lse = tl.where(lse == float("inf"), float("-inf"), lse)  # this part saw no key
    largest = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(largest == float("-inf"), 0.0, largest))
    total = tl.sum(weights, 0)
    parts_ptrs = parts_ptr + rows[:, None] * D + column[None, :]
    parts = tl.load(parts_ptrs, mask=present[:, None], other=0.0)
    o = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(o_ptr + row * D + column, o.to(o_ptr.dtype.element_ty))


def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count


def _num_splits(key, step):
    """Programs that share the keys of one key/value head: all of them fit the GPU at once."""
    batch, capacity, kv_heads, _ = key.shape
    programs = PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(key.device)
    return max(1, min(programs // (batch * kv_heads), triton.cdiv(capacity, step)))


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    length: torch.Tensor,
    valid: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Attention of one new token a row over the keys of a cache, the token's own among them.

    query [B, H, D]; key, value [B, C, K, D], where C is the cache's capacity: views of any strides
    but the last, which is 1. length int64 [1], on their device: the keys before it count, and what
    the cache holds after them is not read. valid: bool [B, C] or None, False for padding. Returns
    [B, H, D], zero in a row without keys. Not differentiable: ValueError where a gradient is due.
    """
    check_decoding(query, key, value, length, valid)
    check_inputs("decode_attention", query, key, value, head_dim=query.shape[2])
    query = query.contiguous()
    o = torch.empty_like(query)
    if not len(query):
        return o
    rows, step = query.shape[0] * query.shape[1], fitting(query, KEYS)
    splits = _num_splits(key, step)
    parts = o if splits == 1 else query.new_empty(splits, *query.shape, dtype=torch.float32)
    lse = query.new_empty(splits, *query.shape[:2], dtype=torch.float32)
    valid_strides = (0, 0) if valid is None else valid.stride()
    tile = tile_of(query.shape[1] // key.shape[2], LEAST_ROWS)
    with torch.cuda.device_of(query):
        _decode_forward[(splits, key.shape[2], len(query))](
            query, key, value, length, None if valid is None else valid.view(torch.uint8),
            parts, lse, key.shape[1], rows, scale * LOG2_E, *key.stride()[:3], *value.stride()[:3],
            *valid_strides, H=query.shape[1], G=tile["G"], D=query.shape[2],
            ROWS=tile["ROWS"], KEYS=step, num_warps=4, num_stages=stages(query, 3),
        )  # fmt: skip
        if splits > 1:
            features = min(MERGE_FEATURES, query.shape[2])
            _merge_splits[(rows, query.shape[2] // features)](
                parts, lse, o, splits, rows, D=query.shape[2],
                SPLITS=triton.next_power_of_2(splits), FEATURES=features, num_warps=4,
            )  # fmt: skip
    return o
