"""The attention of VideoNSA in plain PyTorch: its specification, and the oracle of every test.

    o_j = g_cmp * compressed(j) + g_slc * selected(j) + g_win * window(j)        (VideoNSA, eq. 5)

Every function but `decode_attention` works on packed samples: the vision tokens of several
samples, one after the other, without padding. Positions, blocks and windows count within a sample's
own tokens.

Shapes: T tokens, H query heads, K key/value heads, G = H // K, D head size, B block size,
        S selected blocks, N keys of one sample.
        q is [Tq, H, D], k and v are [Tk, K, D]; head h reads key/value head h // G.
Lengths: cu_seqlens_q and cu_seqlens_k are int [samples + 1], cumulative, from 0 to Tq and Tk. A
        sample may have fewer queries than keys (the earlier ones are cached); its queries are then
        its last ones. Without any query the results are empty and all gradients zero.
Errors: a ValueError where shapes or lengths do not fit. The kernels read no lengths that are on a
        GPU, because that would wait for it: where those do not fit, their results are undefined.
Numbers: any floating dtype, any device. Scores and softmax are computed in float32 (float64 for
        float64 inputs) and the probabilities are rounded to the inputs' dtype before they meet v.
Memory: queries are taken in chunks, so it grows with the number of keys, not with its square.
"""

from collections.abc import Callable

import torch

from .nsa_checks import (
    check_blocks,
    check_decoding,
    check_ends,
    check_gates,
    check_keys,
    check_lengths,
    check_packed,
    check_shape,
)
from .nsa_rules import is_complete

CHUNK_ELEMENTS = 2**21  # the largest intermediate of one chunk of queries; fits a CPU's cache


def compress_blocks(
    k: torch.Tensor, v: torch.Tensor, cu_seqlens_k: torch.Tensor, *, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of k and v over each complete block of `block_size` tokens (VideoNSA, section 2.2).

    k, v [Tk, K, D]. Returns k_cmp, v_cmp [Tk // block_size, K, D]: the blocks of the first
    sample, then of the second, and so on; a sample of n keys has n // block_size of them. Rows past
    the last block are zero. Differentiable in k and v.
    """
    check_keys(k, v, cu_seqlens_k)
    check_ends("cu_seqlens_k", cu_seqlens_k, len(k))
    means = []
    for x in (k, v):
        blocks = [
            x[start : end - (end - start) % block_size].unflatten(0, (-1, block_size))
            for start, end in _spans(cu_seqlens_k)
            if end - start >= block_size
        ]
        mean = torch.cat([block.to(_exact(x)).mean(1) for block in blocks]) if blocks else x[:0]
        unused = len(x) // block_size - len(mean)
        means.append(torch.cat([mean.to(x.dtype), x.new_zeros(unused, *x.shape[1:])]))
    return tuple(means)


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

    q [Tq, H, D]; k_cmp, v_cmp [means, K, D] as `compress_blocks` returns them; `is_complete` says
    which are visible. Returns o [Tq, H, D], zero where no block is visible, and the natural
    log-sum-exp of the scaled scores, float32 (or float64) [Tq, H], +inf where no block is visible.
    Differentiable through o.
    """
    check_packed(q, k_cmp, v_cmp, cu_seqlens_q, cu_seqlens_k)
    scale = _scale(q, scale)
    outputs, sums = [], []
    for queries, blocks, positions in _chunks(
        q, k_cmp, cu_seqlens_q, cu_seqlens_k, block_size, per_query=q.shape[1]
    ):
        visible = is_complete(len(k_cmp[blocks]), positions, block_size)
        o, lse = _attend(q[queries], k_cmp[blocks], v_cmp[blocks], visible, scale, with_lse=True)
        outputs.append(o)
        sums.append(lse)
    if not outputs:
        return no_queries(q, k_cmp, v_cmp), q.new_zeros(q.shape[:2], dtype=_exact(q))
    return torch.cat(outputs), torch.cat(sums).detach()


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
    scale = _scale(q, scale)
    group = q.shape[1] // k_cmp.shape[1]
    chosen = []
    per_query = q.shape[1] * q.shape[2]
    for queries, blocks, positions in _chunks(
        q, k_cmp, cu_seqlens_q, cu_seqlens_k, block_size, per_query=per_query
    ):
        keys = k_cmp[blocks].to(_exact(q)).transpose(0, 1)  # [K, blocks, D]
        visible = is_complete(keys.shape[1], positions, block_size)[:, None]
        importance = 0  # [t, K, blocks]
        for head in range(group):
            # A product and a sum, because a matrix product may round equal columns differently,
            # and equal blocks (of a still picture) have to stay equal.
            scores = (q[queries, head::group, None] * keys).sum(-1) * scale
            probability = (scores - lse[queries, head::group, None]).exp()
            importance = importance + probability.masked_fill(~visible, 0)

        own = (positions // block_size)[:, None, None]
        # The own block may be incomplete and so have no mean: one column more than there are means.
        index = torch.arange(keys.shape[1] + 1, device=q.device)
        importance = torch.nn.functional.pad(importance, (0, 1))
        forced = (index < num_initial) | (index > own - num_local)
        importance = importance.masked_fill(forced, torch.inf)
        importance = importance.masked_fill(index > own, -torch.inf)
        chosen.append(_largest(importance, num_selected))
    if not chosen:
        return torch.empty(0, k_cmp.shape[1], num_selected, dtype=torch.int32, device=q.device)
    return torch.cat(chosen)


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
    in any slot, is an unused one. Returns o [Tq, H, D], zero where no token is visible.
    Differentiable in q, k, v.
    """
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k)
    check_blocks(blocks, q, k)
    scale = _scale(q, scale)
    group = q.shape[1] // k.shape[1]
    slots = blocks.shape[2] * block_size
    outputs = []
    per_query = slots * k.shape[1] * k.shape[2]
    for queries, keys, positions in _chunks(
        q, k, cu_seqlens_q, cu_seqlens_k, 1, per_query=per_query, per_key=0
    ):
        first = blocks[queries].long().unsqueeze(-1) * block_size
        token = first + torch.arange(block_size, device=q.device)  # [t, K, S, B]
        token = token.flatten(2)
        visible = (token >= 0) & (token <= positions[:, None, None])
        token = torch.where(visible, token, 0)
        head = torch.arange(k.shape[1], device=q.device)[:, None]
        o = _softmax_attention(
            _grouped(q[queries], group), k[keys][token, head], v[keys][token, head], visible, scale
        )
        outputs.append(o.flatten(1, 2))
    return torch.cat(outputs) if outputs else no_queries(q, k, v)


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
    scale = _scale(q, scale)
    outputs = []
    per_query = 2 * window_size * q.shape[1]
    for queries, keys, positions in _chunks(
        q,
        k,
        cu_seqlens_q,
        cu_seqlens_k,
        1,
        per_query=per_query,
        per_key=0,
        at_most=max(window_size, 256),
    ):
        # The chunk's queries share one run of keys: first window's start to last query.
        start = keys.start + max(0, int(positions[0]) - window_size + 1)
        near = slice(start, keys.start + int(positions[-1]) + 1)
        key_positions = torch.arange(near.start, near.stop, device=q.device) - keys.start
        age = positions[:, None] - key_positions
        o = _attend(q[queries], k[near], v[near], (age >= 0) & (age < window_size), scale)
        outputs.append(o)
    return torch.cat(outputs) if outputs else no_queries(q, k, v)


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
    scale = _scale(q, scale)
    outputs = []
    for queries, keys, _ in _chunks(q, k, cu_seqlens_q, cu_seqlens_k, 1, per_query=q.shape[1]):
        key_positions = torch.arange(keys.stop - keys.start, device=q.device)
        visible = key_positions <= positions[queries, None]
        outputs.append(_attend(q[queries], k[keys], v[keys], visible, scale))
    return torch.cat(outputs) if outputs else no_queries(q, k, v)


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    length: torch.Tensor,
    valid: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Attention of one new token a row over the keys of a cache, the token's own among them.

    Not packed: query [B, H, D]; key, value [B, C, K, D], where C is the cache's capacity, the last
    stride 1. length int64 [1]: the keys before it count, whatever the cache holds after them.
    valid: bool [B, C] or None, False for padding. Returns [B, H, D], zero in a row without keys.
    Not differentiable: ValueError where a gradient is due.
    """
    check_decoding(query, key, value, length, valid)
    visible = (torch.arange(key.shape[1], device=key.device) < length).expand(key.shape[:2])
    if valid is not None:
        visible = visible & valid
    key, value = (x.masked_fill(~visible[..., None, None], 0).transpose(1, 2) for x in (key, value))
    query = _grouped(query, query.shape[1] // key.shape[1])
    return _softmax_attention(query, key, value, visible[:, None], scale).flatten(1, 2)


def nsa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    block_size: int,
    num_selected: int,
    window_size: int,
    num_initial: int = 0,
    num_local: int = 1,
    scale: float | None = None,
    watch_blocks: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """The three branches, each weighted by its gate (VideoNSA, section 2.1).

    q [Tq, H, D]; k, v [Tk, K, D]; gates [Tq, H, 3], the weights of the compressed, the selected
    and the window branch. Returns o [Tq, H, D]. Differentiable in q, k, v and gates, not through
    the choice of the blocks, which watch_blocks is called with, as `select_blocks` returns it.
    """
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k)
    check_gates(gates, q)
    k_cmp, v_cmp = compress_blocks(k, v, cu_seqlens_k, block_size=block_size)
    compressed, lse = compressed_attention(
        q, k_cmp, v_cmp, cu_seqlens_q, cu_seqlens_k, block_size=block_size, scale=scale
    )
    blocks = select_blocks(
        q,
        k_cmp,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        block_size=block_size,
        num_selected=num_selected,
        num_initial=num_initial,
        num_local=num_local,
        scale=scale,
    )
    if watch_blocks is not None:
        watch_blocks(blocks)
    selected = selected_attention(
        q, k, v, blocks, cu_seqlens_q, cu_seqlens_k, block_size=block_size, scale=scale
    )
    window = window_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, window_size=window_size, scale=scale
    )
    branches = torch.stack([compressed, selected, window], dim=-1)  # [Tq, H, D, 3]
    return (branches * gates.to(q.dtype).unsqueeze(2)).sum(-1)


def no_queries(q: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """The output for q [0, H, D]: empty, and connected, so that all get gradients, of zeros."""
    return q * sum(x.sum().to(q.dtype) for x in others)


def _spans(cumulative):
    """[(start, end)] of each sample."""
    bounds = cumulative.tolist()
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def _chunks(
    q, k, cu_seqlens_q, cu_seqlens_k, block_size, *, per_query, per_key=1, at_most=CHUNK_ELEMENTS
):
    """Runs of queries of one sample that keep every intermediate under CHUNK_ELEMENTS.

    Yields (slice of the queries, slice of the sample's keys, positions [t] of the queries). With
    a block_size above 1, k holds the means of complete blocks and the second slice counts those.
    An intermediate has `per_query` elements per query, times the keys if `per_key` is 1. A run
    has no more than `at_most` queries.
    """
    check_lengths(q, k, cu_seqlens_q, cu_seqlens_k, block_size=block_size)
    first_key = 0
    for (q_start, q_end), (k_start, k_end) in zip(
        _spans(cu_seqlens_q), _spans(cu_seqlens_k), strict=True
    ):
        tokens = k_end - k_start
        keys = slice(first_key, first_key + tokens // block_size)
        first_key = keys.stop
        elements = per_query * (max(1, keys.stop - keys.start) if per_key else 1)
        step = min(at_most, max(1, CHUNK_ELEMENTS // elements))
        for start in range(q_start, q_end, step):
            end = min(start + step, q_end)
            positions = torch.arange(start, end, device=q.device) + (tokens - q_end)
            yield slice(start, end), keys, positions


def _largest(importance, count):
    """Ascending indices of the `count` largest entries above -inf, int32, filled up with -1.

    A stable sort, because ties go to the lower index.
    """
    values, order = importance.sort(dim=-1, descending=True, stable=True)
    none = importance.shape[-1]
    order = order.masked_fill(values == -torch.inf, none)[..., :count].sort(dim=-1).values
    order = torch.nn.functional.pad(order, (0, count - order.shape[-1]), value=none)
    return order.masked_fill(order == none, -1).int()


def _attend(q, k, v, visible, scale, with_lse=False):
    """q [t, H, D] over shared keys k, v [n, K, D] where visible [t, n].

    Returns o [t, H, D], and where it is asked for lse [t, H], +inf in a row that sees no key.
    """
    group = q.shape[1] // k.shape[1]
    keys, values = k.transpose(0, 1), v.transpose(0, 1)  # [K, n, D], the same for every query
    grouped = _grouped(q, group).transpose(0, 1)  # [K, t, G, D]
    scores = grouped.flatten(1, 2) @ keys.to(_exact(q)).transpose(1, 2)  # [K, t * G, n]
    scores = _masked(scores.unflatten(1, (-1, group)) * scale, visible[:, None])
    o = _softmax(scores, visible[:, None]).to(v.dtype).flatten(1, 2) @ values
    o = o.unflatten(1, (-1, group)).transpose(0, 1).flatten(1, 2)  # from [t, K, G, D]
    if not with_lse:
        return o
    lse = scores.logsumexp(-1).masked_fill(~visible.any(-1)[:, None], torch.inf)  # [K, t, G]
    return o, lse.transpose(0, 1).flatten(1)


def _softmax_attention(q, k, v, visible, scale):
    """q [t, K, G, D] over each query's own keys k, v [t, K, n, D] where visible [t, K, n]."""
    visible = visible.unsqueeze(2)
    scores = _masked((q @ k.to(_exact(k)).transpose(2, 3)) * scale, visible)
    return _softmax(scores, visible).to(v.dtype) @ v


def _masked(scores, visible):
    # The lowest finite number, not -inf, keeps a row without keys (and its gradient) free of NaN.
    return scores.masked_fill(~visible, torch.finfo(scores.dtype).min)


def _softmax(scores, visible):
    """Probabilities from masked scores, zero in a row that sees no key."""
    weights = scores.softmax(-1) if scores.shape[-1] else scores
    return weights * visible.any(-1, keepdim=True)


def _grouped(q, group):
    """[t, H, D] as [t, K, G, D], in the precision of the scores."""
    return q.unflatten(1, (-1, group)).to(_exact(q))


def _exact(x):
    """The dtype of scores and softmax."""
    return torch.promote_types(x.dtype, torch.float32)


def _scale(q, scale):
    return q.shape[-1] ** -0.5 if scale is None else scale
