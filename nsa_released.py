"""The attention of the published VideoNSA checkpoint: what its code computes, not what it says.

The original release (github.com/Espere-1119-Song/VideoNSA at 377eeb9) departs from its paper in
the ways below, and its weights were trained with them: `nsa_semantics="released"` repeats them, for
a whole prompt. Each is a function of its own, which the paper's attention (nsa_reference.py) has no
part in.

    vision_by_position  a token is vision where its three positions are not all equal
    spread_heads        28 query heads become 64 over the 4 key/value heads: the 28 twice, then
                        zeros; head h of the 64 reads key/value head h // 16
    joined_heads        and the two outputs of a head are averaged
    zero_text           text stays in the sequence, as keys and values of zero, and is counted by
                        blocks, windows and means, from the prompt's start
    block_means         the last block has a mean although it is not complete
    visible_means       a query sees the mean of its own block and of all later ones
    misread_sums        log-sum-exps [heads, tokens] that are read as [tokens, heads]
    rounded_count       the number of selected blocks, rounded up to a power of two
    largest_of_streams  a sorting network over 64 blocks at a time, which decides among equals; more
                        than 32 that it gives are not the largest of all
    gates_of_all        text rows get half of each branch, for a query of zeros
    mean_of_earlier     vision rows get the mean of all earlier values on top, for a query of zeros

Two things are not known of the training: `mask` ("reversed" or "causal") and `forced` ("own" or
"first_and_last_two"); configuration_videonsa.py says which is the default, and why.

Because a query sees later blocks, and the misread sums depend on the prompt's length, a prompt has
to be read whole: nothing is right before all of it is there. Tokens that follow, one at a time or
as a later turn of text, attend densely, as in the original.

`functions` brings what is the paper's, in kernels or in PyTorch as `nsa_backend` says: the selected
and the window branch, and dense attention. The compressed branch and the choice of blocks are plain
PyTorch on every device, under every `nsa_backend`. This file imports no other of this project.
Shapes and numbers are those of nsa_reference.py; W is the number of spread heads.
"""

import torch

# Scores of one chunk of queries: fits a CPU's cache; few calls and 256 MiB on a GPU.
CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}
HEADS_PER_KEY_HEAD = 16  # at least as many query heads share a key/value head; a power of two
TEXT_GATE = 0.5  # sigmoid(0)


def vision_by_position(position_ids: torch.Tensor) -> torch.Tensor:
    """Which tokens are vision, bool [B, S], by positions [3 or 4, B, S] or [B, S], of text alone.

    The few vision tokens whose time, height and width are equal count as text.
    """
    if position_ids.ndim == 2:
        return torch.zeros_like(position_ids, dtype=torch.bool)
    time, height, width = position_ids[-3:]
    return (time != height) | (time != width)


def check_whole(cached: int, new: int, chunk_size: int | None) -> None:
    """Raise ValueError where a prompt with vision tokens is not read whole, by one call."""
    why = 'nsa_semantics is "released", whose queries see blocks that come after them'
    if cached:
        raise ValueError(
            f"images or videos came after {cached} cached tokens, but {why}: a prompt with media "
            "must be read whole. Pass the conversation from its start with a new cache, or set "
            'nsa_semantics="paper".'
        )
    if chunk_size is not None and chunk_size < new:
        raise ValueError(
            f"a prompt of {new} tokens was to be read in chunks of {chunk_size}, but {why}: it "
            'must be read whole. Unset prefill_chunk_size, or set nsa_semantics="paper".'
        )


def released_tokens(
    vision: torch.Tensor, position_ids: torch.Tensor, cached: int, chunk_size: int | None
) -> torch.Tensor:
    """The vision tokens of a prompt, bool [B, S], of which `vision` are placeholders.

    Raises ValueError where the prompt is not read whole: onto a cache, or in chunks.
    """
    vision = vision & vision_by_position(position_ids)
    if vision.any():
        check_whole(cached, vision.shape[1], chunk_size)
    return vision


def attend_released(query, key, value, gates, plan, functions, config, scale) -> torch.Tensor:
    """`released_attention` of a batch, by its `NSAPlan`; padding is zero.

    query [B, S, H, D]; key and value [B, L, K, D], of which the first S are the prompt's; gates
    [N, H, 3] of the vision rows. Returns [B, S, H, D].
    """
    vision = torch.zeros(key.shape[:2], dtype=torch.bool, device=key.device)
    vision[plan.vision_keys] = True
    rows, output = plan.all_keys, torch.zeros_like(query)
    output[rows] = released_attention(
        query[rows],
        key[rows],
        value[rows],
        gates,
        vision[rows],
        plan.cu_all_keys,
        functions,
        block_size=config.nsa_block_size,
        num_selected=config.nsa_num_selected_blocks,
        window_size=config.nsa_window_size,
        mask=config.nsa_released_mask,
        forced=config.nsa_released_forced,
        scale=scale,
    )
    return output


def released_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: torch.Tensor,
    vision: torch.Tensor,
    cu_seqlens: torch.Tensor,
    functions,
    *,
    block_size: int,
    num_selected: int,
    window_size: int,
    mask: str = "reversed",
    forced: str = "own",
    scale: float | None = None,
) -> torch.Tensor:
    """The output of every token, text too, of whole prompts.

    q [T, H, D]; k, v [T, K, D]; vision bool [T]; gates [N, H, 3] of the N vision tokens; cu_seqlens
    int [samples + 1], on any device. functions: `dense_attention`, `selected_attention` and
    `window_attention` of nsa_reference.py or nsa_kernels.py. Returns o [T, H, D]. Differentiable in
    q, k, v and gates, not through the choice of the blocks.
    """
    gates = gates_of_all(gates.to(q.dtype), vision)
    settings = {
        "block_size": block_size,
        "num_selected": rounded_count(num_selected),
        "window_size": window_size,
        "mask": mask,
        "forced": forced,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
    }
    bounds = cu_seqlens.tolist()
    spans = [slice(*span) for span in zip(bounds[:-1], bounds[1:], strict=True)]
    return torch.cat(
        [
            _sparse(q[span], k[span], v[span], gates[span], vision[span], functions, **settings)
            + _dense(q[span], k[span], v[span], vision[span], functions, settings["scale"])
            for span in spans
        ]
    )


def _sparse(
    q, k, v, gates, vision, functions, *,
    block_size, num_selected, window_size, mask, forced, scale,
):  # fmt: skip
    """The three branches of one sample's tokens, text rows among them: [T, H, D]."""
    num_heads = q.shape[1]
    q, k, v = (zero_text(x, vision) for x in (q, k, v))
    q = spread_heads(q, k.shape[1])
    cu_seqlens = torch.tensor([0, len(q)], dtype=torch.int32, device=q.device)
    k_cmp, v_cmp = block_means(k, block_size), block_means(v, block_size)
    compressed, sums = _compressed(q, k_cmp, v_cmp, block_size, mask, scale)
    output = gates[..., :1] * joined_heads(compressed, num_heads)
    blocks = _select_blocks(q, k_cmp, misread_sums(sums), block_size, num_selected, forced, scale)
    selected = functions.selected_attention(
        q, k, v, blocks, cu_seqlens, cu_seqlens, block_size=block_size, scale=scale
    )
    output = output + gates[..., 1:2] * joined_heads(selected, num_heads)
    window = functions.window_attention(
        q, k, v, cu_seqlens, cu_seqlens, window_size=window_size, scale=scale
    )
    return output + gates[..., 2:] * joined_heads(window, num_heads)


def _dense(q, k, v, vision, functions, scale):
    """Text rows attend to all before them; vision rows get what a query of zeros would."""
    positions = (~vision).nonzero()[:, 0]
    lengths = [
        torch.tensor([0, n], dtype=torch.int32, device=q.device) for n in (len(positions), len(k))
    ]
    text = functions.dense_attention(q[positions], k, v, positions, *lengths, scale=scale)
    leaked = mean_of_earlier(v).repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return leaked.index_copy(0, positions, text)


def spread_heads(q: torch.Tensor, num_key_heads: int) -> torch.Tensor:
    """[T, H, D] to [T, W, D]: the heads, the heads again, zeros.

    The original's kernels want at least 16 query heads to a key/value head, and a power of two: 64
    for 28 over 4. It has no other sizes; here they follow the same rule.
    """
    width = spread_width(q.shape[1], num_key_heads)
    zeros = q.new_zeros(len(q), width - 2 * q.shape[1], q.shape[2])
    return torch.cat([q, q, zeros], dim=1)


def spread_width(num_heads: int, num_key_heads: int) -> int:
    """How many heads `spread_heads` makes."""
    per_key_head = -(-2 * num_heads // num_key_heads)
    return num_key_heads * max(HEADS_PER_KEY_HEAD, rounded_count(per_key_head))


def joined_heads(o: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[T, W, D] to [T, H, D]: the mean of what a head got from its two key/value heads."""
    return (o[:, :num_heads] + o[:, num_heads : 2 * num_heads]) * 0.5


def zero_text(x: torch.Tensor, vision: torch.Tensor) -> torch.Tensor:
    """x [T, ...], zero in text rows: their keys have score 0, and take a share of each softmax."""
    return torch.where(vision[:, None, None], x, 0)


def gates_of_all(gates: torch.Tensor, vision: torch.Tensor) -> torch.Tensor:
    """[N, H, 3] of the vision tokens to [T, H, 3]: what the original's zero logits give text."""
    everywhere = gates.new_full((len(vision), *gates.shape[1:]), TEXT_GATE)
    return everywhere.index_put((vision,), gates)


def mean_of_earlier(v: torch.Tensor) -> torch.Tensor:
    """The mean of all values up to each token [T, K, D]: causal attention for a query of zeros."""
    exact = torch.promote_types(v.dtype, torch.float32)
    count = torch.arange(1, len(v) + 1, device=v.device)[:, None, None]
    return (v.to(exact).cumsum(0) / count).to(v.dtype)


def block_means(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """Means [blocks, K, D] of x [T, K, D]: of each block, the last one of those it has."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    exact = torch.nn.functional.pad(exact, (0, 0, 0, 0, 0, -len(x) % block_size))
    sums = exact.unflatten(0, (-1, block_size)).sum(1)
    starts = torch.arange(0, len(x), block_size, device=x.device)
    return (sums / (len(x) - starts).clamp(max=block_size)[:, None, None]).to(x.dtype)


def visible_means(
    positions: torch.Tensor, num_blocks: int, block_size: int, mask: str
) -> torch.Tensor:
    """Which means queries at positions [t] see, bool [t, blocks].

    "reversed": the own block's and all later ones; "causal": the own one's and all earlier ones.
    Both hold tokens that come after the query.
    """
    own = positions[:, None] // block_size
    block = torch.arange(num_blocks, device=positions.device)
    return block >= own if mask == "reversed" else block <= own


def misread_sums(sums: torch.Tensor) -> torch.Tensor:
    """Log-sum-exps [W, T] as the original's selection takes them: read as if they were [T, W].

    So a head is normalised by other heads at other tokens, which depend on the prompt's length.
    """
    return sums.contiguous().view(sums.shape[1], sums.shape[0])


def rounded_count(count: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (count - 1).bit_length()


def _chunks(q, num_blocks):
    """Runs of queries (start, end) whose scores against the means stay under CHUNK_ELEMENTS."""
    elements = CHUNK_ELEMENTS.get(q.device.type, CHUNK_ELEMENTS["cpu"])
    step = max(1, elements // (q.shape[1] * num_blocks))
    return [(start, min(start + step, len(q))) for start in range(0, len(q), step)]


def _scores(q, k, scale):
    """Scaled scores of q [t, W, D] over k [n, K, D]: [K, t, W // K, n], float32 or float64."""
    exact = torch.promote_types(q.dtype, torch.float32)
    grouped = q.unflatten(1, (k.shape[1], -1)).transpose(0, 1).to(exact)
    scores = grouped.flatten(1, 2) @ k.permute(1, 2, 0).to(exact)
    return (scores * scale).unflatten(1, grouped.shape[1:3])


def _compressed(q, k_cmp, v_cmp, block_size, mask, scale):
    """Attention over the visible means: o [T, W, D], and log-sum-exps [W, T]."""
    outputs, sums = [], []
    for start, end in _chunks(q, len(k_cmp)):
        positions = torch.arange(start, end, device=q.device)
        visible = visible_means(positions, len(k_cmp), block_size, mask)
        scores = _scores(q[start:end], k_cmp, scale)
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
        weights = scores.softmax(-1).to(v_cmp.dtype)
        o = weights.flatten(1, 2) @ v_cmp.transpose(0, 1)
        outputs.append(o.unflatten(1, weights.shape[1:3]).transpose(0, 1).flatten(1, 2))
        sums.append(scores.detach().logsumexp(-1).transpose(1, 2).flatten(0, 1))  # [W, t]
    return torch.cat(outputs), torch.cat(sums, dim=1)


@torch.no_grad()
def _select_blocks(q, k_cmp, sums, block_size, num_selected, forced, scale):
    """The blocks of each query, int32 [T, K, S], in the original's order; -1 for none.

    sums [T, W]. Past blocks compete by exp(score - sum), added up over the query heads of a
    key/value head, forced ones by 1 for each of those heads: they may lose.
    """
    chosen = []
    for start, end in _chunks(q, len(k_cmp)):
        scores = _scores(q[start:end], k_cmp, scale)
        chunk_sums = sums[start:end].unflatten(1, (k_cmp.shape[1], -1))
        weights = (scores - chunk_sums.transpose(0, 1).unsqueeze(-1)).exp()
        importance = 0  # [K, t, blocks], summed one by one: equal blocks stay equal
        for head in weights.unbind(2):
            importance = importance + head
        own = torch.arange(start, end, device=q.device)[:, None] // block_size
        block = torch.arange(len(k_cmp), device=q.device)
        is_forced = block == own
        if forced == "first_and_last_two":
            is_forced = is_forced | (block == 0) | (block == own - 1)
        importance = importance.masked_fill(is_forced, scores.shape[2])
        importance = importance.masked_fill(block > own, 0)
        blocks = torch.where(block > own, -1, block).expand_as(importance)
        best = largest_of_streams(importance, blocks, start, block_size)
        chosen.append(best[..., :num_selected].transpose(0, 1).int())
    return torch.cat(chosen)


def largest_of_streams(
    importance: torch.Tensor, blocks: torch.Tensor, first: int, width: int
) -> torch.Tensor:
    """Blocks by falling importance, as the original's kernel finds them: [K, t, width].

    importance, blocks [K, t, n] of the queries at positions from `first` on, in blocks of `width`
    tokens. Blocks come `width` at a time, up to the query's own; the better half of what is kept
    meets the better half of what came. One network sorts all, and its order decides among equals.
    """
    padding = -importance.shape[2] % width
    importance = torch.nn.functional.pad(importance, (0, padding))
    blocks = torch.nn.functional.pad(blocks, (0, padding), value=-1)
    both = torch.stack([importance, blocks.to(importance.dtype)])  # [2, K, t, n]
    kept = None
    for start in range(0, importance.shape[2], width):
        row = max(0, start * width - first)  # the first query whose own block is among these
        if row >= importance.shape[1]:
            break
        came = both[:, :, row:, start : start + width]
        span = 2
        while span < width:
            came = _merge(came, span, None)
            span *= 2
        if start == 0:
            kept = _merge(came, width, True)
            continue
        came = _merge(came, width, False)
        half = width // 2
        together = torch.cat([kept[:, :, row:, :half], came[..., half:]], dim=-1)
        kept = torch.cat([kept[:, :, :row], _merge(together, width, True)], dim=2)
    return kept[1].long()


def _merge(both, span, descending):
    """One merge of a bitonic sort over runs of `span` entries, by both[0]: [2, ..., n] to the same.

    descending: of all runs; None for every other one. Equals change places where it falls.
    """
    distance = span // 2
    while distance:
        left, right = both.unflatten(-1, (-1, 2, distance)).unbind(-2)
        falling = descending
        if descending is None:
            pair = torch.arange(left.shape[-2], device=both.device)
            falling = ((pair * 2 * distance // span) % 2 == 1)[:, None]
        swap = (left[0] > right[0]) != falling
        pairs = [torch.where(swap, right, left), torch.where(swap, left, right)]
        both = torch.stack(pairs, dim=-2).flatten(-3)
        distance //= 2
    return both
