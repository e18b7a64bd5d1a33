"""How a batch is laid out for the sparse attention, for all layers at once.

A layer's tensors are [B, S, ...], with padding, and text and vision mixed. The attention takes
the vision tokens of each sample one after the other, packed without padding, and the text tokens
likewise. `make_plan` finds which rows those are, once per forward pass; what is padding is read
from the attention mask by `valid_tokens`, and samples packed into one batch row are told apart by
`packed_samples`.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from .sharding_videonsa import Shard

Index = tuple[torch.Tensor | int, torch.Tensor | slice]


class NSAPlan(NamedTuple):
    """Which rows of a batch are which, for every layer of one forward pass.

    An `Index` picks rows [rows, ...] of a tensor [B, S, ...], by (batch, position) tensors; or by
    (0, slice) where they are contiguous in the only batch row, which copies nothing. Queries are
    positions among the S new tokens, keys among all L. The cumulative lengths are int32
    [samples + 1].
    """

    num_queries: int  # S, new tokens per batch row
    num_keys: int  # L, cached and new tokens per batch row
    vision_queries: Index
    vision_keys: Index
    cu_vision_queries: torch.Tensor
    cu_vision_keys: torch.Tensor
    text_queries: Index
    text_positions: torch.Tensor  # int64, of each text query among its sample's keys
    all_keys: Index
    cu_text_queries: torch.Tensor
    cu_all_keys: torch.Tensor
    shard: "Shard | None" = None  # the rows that this process runs, of those that all of them do

    @property
    def is_all_vision(self) -> bool:
        """Whether every query is a vision token, of the only batch row."""
        _, position = self.vision_queries
        return isinstance(position, slice) and position == slice(0, self.num_queries)


def make_plan(
    vision: torch.Tensor,
    num_queries: int,
    valid: torch.Tensor | None = None,
    sample: torch.Tensor | None = None,
    device: torch.device | None = None,
) -> NSAPlan | None:
    """The plan of one forward pass; None without new vision tokens, when all attend densely.

    vision bool [B, L]: the vision tokens among the cached and the `num_queries` new ones.
    valid bool [B, L]: no padding; everything by default.
    sample int64 [B, L]: which sample a token belongs to, ascending; a batch row each by default.
    device: of the plan's tensors, by default that of `vision`. The plan is made on the CPU, so only
        a mask that lies elsewhere is waited for.
    """
    device = device or vision.device
    vision, valid, sample = (None if x is None else x.cpu() for x in (vision, valid, sample))
    if not vision[:, -num_queries:].any():
        return None
    rows, num_keys = vision.shape
    if valid is None:
        valid = torch.ones_like(vision)
    if sample is None:
        sample = torch.arange(rows)[:, None].expand(rows, num_keys)
    num_samples = int(sample.max()) + 1
    num_cached = num_keys - num_queries
    new = torch.arange(num_keys) >= num_cached

    def find(mask):
        found = mask.nonzero(as_tuple=True)
        counts = torch.bincount(sample[found], minlength=num_samples)
        return found, nn.functional.pad(counts.cumsum(0), (1, 0)).int()

    vision_keys, cu_vision_keys = find(vision & valid)
    vision_queries, cu_vision_queries = find(vision & valid & new)
    text_queries, cu_text_queries = find(~vision & valid & new)
    all_keys, cu_all_keys = find(valid)
    rank = valid.flatten().cumsum(0).view_as(valid) - 1

    def index(found, first=0):
        """The `Index` of (batch, position) tensors into a tensor that starts at `first`."""
        batch, position = found[0], found[1] - first
        if rows == 1 and len(position) and position[-1] - position[0] + 1 == len(position):
            return 0, slice(int(position[0]), int(position[-1]) + 1)
        return send(batch, device), send(position, device)

    return NSAPlan(
        num_queries=num_queries,
        num_keys=num_keys,
        vision_queries=index(vision_queries, first=num_cached),
        vision_keys=index(vision_keys),
        cu_vision_queries=send(cu_vision_queries, device),
        cu_vision_keys=send(cu_vision_keys, device),
        text_queries=index(text_queries, first=num_cached),
        text_positions=send(rank[text_queries] - cu_all_keys[sample[text_queries]], device),
        all_keys=index(all_keys),
        cu_text_queries=send(cu_text_queries, device),
        cu_all_keys=send(cu_all_keys, device),
    )


def send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on `device`; one of the CPU without waiting for what runs there to end."""
    if x.is_cuda or torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def valid_tokens(attention_mask: torch.Tensor | dict | None, length: int) -> torch.Tensor | None:
    """bool [B, length], False at padding; None where nothing is padded.

    The mask covers the cached and the new tokens. It may be 2-D [B, length], or 4-D as the library
    makes it for static caches, whose last query sees every token that is not padding.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask["full_attention"]
    if attention_mask is None:
        return None
    if attention_mask.ndim == 4:
        seen = attention_mask[:, 0, -1, :length]
        return seen if seen.dtype == torch.bool else seen == 0
    return attention_mask.bool()


def mask_of_chunk(
    attention_mask: torch.Tensor | dict | None, start: int, end: int, cache, cached: int
) -> torch.Tensor | dict | None:
    """The mask of the new tokens from start to end, after `cached` ones, in the form it came in."""
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask["full_attention"]
    if attention_mask is None:  # also where the library left a causal mask out
        return None
    if attention_mask.ndim == 4:
        attention_mask = attention_mask[:, :, start:end]
        if not cache.is_compileable:  # a static cache always has all of its keys
            attention_mask = attention_mask[..., : cached + end]
        return {"full_attention": attention_mask}
    return attention_mask[:, : cached + end]


def packed_samples(
    attention_mask: torch.Tensor | dict | None, position_ids: torch.Tensor | None
) -> torch.Tensor | None:
    """int64 [B, S], the sample of each token where positions restart within a row, else None.

    For a call without a cache. The library's rule: without a mask, row 0 of [4, B, S] position ids
    that does not go up by one starts a new sample.
    """
    if attention_mask is not None or position_ids is None:
        return None
    if position_ids.ndim != 3 or position_ids.shape[0] != 4:
        return None
    starts = torch.ones_like(position_ids[0], dtype=torch.bool)
    starts[:, 1:] = position_ids[0].diff(dim=-1) != 1
    starts[0, 0] = False  # samples count from zero
    return starts.flatten().cumsum(0).view_as(starts)
