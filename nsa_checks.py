"""What the reference and the kernels refuse: shapes and lengths that do not fit each other.

Every function raises a ValueError that says what was given and what was wanted. Shapes are checked
by both; lengths (`check_lengths`, `check_ends`) are read, which on a GPU would wait for it, so the
kernels check only those that are on the CPU.
"""

import torch

INTEGERS = (torch.int32, torch.int64)


def check_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
) -> None:
    """Raise a ValueError where q, k and v are not packed samples of matching shapes."""
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q, k and v have shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; "
            "wanted [queries, heads, D], and twice [keys, key heads, D] with the same D."
        )
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} query heads cannot share {k.shape[1]} key/value heads evenly; "
            "the first must be a multiple of the second."
        )
    check_cumulative("cu_seqlens_q", cu_seqlens_q)
    check_cumulative("cu_seqlens_k", cu_seqlens_k)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k have shapes {tuple(cu_seqlens_q.shape)} and "
            f"{tuple(cu_seqlens_k.shape)}; wanted one cumulative length per sample and a leading "
            "zero in both."
        )


def check_decoding(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    length: torch.Tensor,
    valid: torch.Tensor | None,
) -> None:
    """Raise a ValueError where `decode_attention` cannot take these; reads no value of theirs."""
    if query.ndim != 3 or key.ndim != 4 or key.shape != value.shape:
        raise ValueError(
            f"query, key and value have shapes {tuple(query.shape)}, {tuple(key.shape)} and "
            f"{tuple(value.shape)}; wanted [batch, heads, D], and twice [batch, capacity, key "
            "heads, D]."
        )
    batch, capacity, kv_heads, head_dim = key.shape
    fits = (len(query), query.shape[2]) == (batch, head_dim)
    if not fits or not kv_heads or query.shape[1] % kv_heads:
        raise ValueError(
            f"query has shape {tuple(query.shape)}, key {tuple(key.shape)}; wanted one batch size, "
            "one head size, and a multiple of the key heads."
        )
    if key.stride(3) != 1 or value.stride(3) != 1:
        raise ValueError(
            f"key and value have strides {key.stride()} and {value.stride()}; wanted the numbers "
            "of a head next to each other: the last stride 1."
        )
    if length.shape != (1,) or length.dtype != torch.int64 or length.device != key.device:
        raise ValueError(
            f"length is {length.dtype} {tuple(length.shape)} on {length.device}; wanted the number "
            f"of keys as int64 (1,) on {key.device}."
        )
    if valid is not None:
        check_shape("valid", valid, (batch, capacity), "one bool per key of the cache")
        if valid.dtype != torch.bool:
            raise ValueError(f"valid is {valid.dtype}; wanted bool, False for padding.")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise ValueError(
            "decode_attention has no gradient, but query, key or value requires one: call it "
            "under torch.no_grad(), or use dense_attention."
        )


def check_cumulative(name: str, cu_seqlens: torch.Tensor) -> None:
    """Raise a ValueError where cumulative lengths are not one row of integers."""
    if cu_seqlens.ndim != 1 or not len(cu_seqlens) or cu_seqlens.dtype not in INTEGERS:
        raise ValueError(
            f"{name} has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; wanted "
            "integers, one cumulative length per sample and a leading zero."
        )


def check_keys(k: torch.Tensor, v: torch.Tensor, cu_seqlens_k: torch.Tensor) -> None:
    """Raise a ValueError where k and v are not packed samples of one shape."""
    if k.ndim != 3 or k.shape != v.shape:
        raise ValueError(
            f"k and v have shapes {tuple(k.shape)} and {tuple(v.shape)}; wanted [keys, key heads, "
            "D] of both."
        )
    check_cumulative("cu_seqlens_k", cu_seqlens_k)


def check_gates(gates: torch.Tensor, q: torch.Tensor) -> None:
    """Raise a ValueError where gates are not [Tq, H, 3]."""
    shape = (*q.shape[:2], 3)
    check_shape("gates", gates, shape, "one weight per query, head and branch")


def check_blocks(blocks: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> None:
    """Raise a ValueError where blocks are not [Tq, K, S]."""
    shape = (len(q), k.shape[1], *blocks.shape[2:3])
    check_shape("blocks", blocks, shape, "the block numbers of each query and key head")


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Raise a ValueError where a tensor has another shape."""
    if tensor.shape != tuple(shape):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; wanted {meaning}, {tuple(shape)}."
        )


def check_lengths(
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    block_size: int = 1,
) -> None:
    """Raise a ValueError where lengths do not fit q [Tq, ...] and k [Tk // block_size, ...].

    Reads the lengths, which on a GPU waits for it.
    """
    check_ends("cu_seqlens_q", cu_seqlens_q, len(q))
    check_ends("cu_seqlens_k", cu_seqlens_k, len(k), block_size=block_size)
    lengths = zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True)
    for sample, (queries, keys) in enumerate(lengths):
        if queries > keys:
            raise ValueError(
                f"sample {sample} has {queries} queries but {keys} keys; its queries must be the "
                "last of its keys."
            )


def check_ends(name: str, cu_seqlens: torch.Tensor, rows: int, *, block_size: int = 1) -> None:
    """Raise a ValueError where lengths do not go up from 0 to the tokens of so many rows.

    The rows are tokens, or with a block_size above 1 the means of so many tokens each.
    """
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends != sorted(ends):
        raise ValueError(
            f"{name} is {ends}; wanted cumulative lengths, which start at 0 and never go down."
        )
    if ends[-1] // block_size != rows:
        what = "rows" if block_size == 1 else f"means of {block_size} tokens"
        raise ValueError(
            f"{name} ends at {ends[-1]} tokens, but its tensor has {rows} {what}; wanted the "
            "lengths of the samples that are packed there."
        )
