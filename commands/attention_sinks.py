"""Attention sinks: keys that take much attention and give little, counted by branch.

The definition of the VideoNSA paper (finding 6): a key is a sink of a head where

    a > 0.1   and   |v| < median(|v|) - 2 * IQR(|v|)

a is the average attention that the key receives, |v| the norm of its value, with median and
interquartile range over the keys of the head. The paper leaves open what the average is taken over;
here it is the queries that attend to the key in that branch: all later ones for dense attention and
for the weighted sum of the branches, those of the window, those that selected its block, and for a
block's mean those that come after the block. A key/value head's values serve all its query heads.

Every pair of tokens is looked at, a chunk of queries at a time: work grows with the square of the
tokens, memory does not.
"""

import torch

from nsa_rules import BRANCHES, is_complete

SINK_BRANCHES = (*BRANCHES, "combined", "dense")  # combined: the branches weighted by their gates
MIN_ATTENTION, IQRS = 0.1, 2.0
CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}  # scores of one key/value head held at once


class SinkSums:
    """The attention that each vision key of one layer receives, summed over queries.

    Shapes: N packed vision tokens, M complete blocks of them, H heads, K key/value heads, n
    queries of a call, G = H // K.
    """

    def __init__(self, num_tokens, config, scale, device):
        self.config, self.scale, self.size = config, scale, config.nsa_block_size
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        blocks = num_tokens // self.size
        with torch.inference_mode(False):
            self.means = torch.zeros(heads, blocks, device=device)
            self.keys = torch.zeros(4, heads, num_tokens, device=device)  # SINK_BRANCHES[1:]
            self.selecting = torch.zeros(kv_heads, num_tokens, device=device)  # queries, by key
            self.mean_norms = torch.zeros(kv_heads, blocks, device=device)
            self.norms = torch.zeros(kv_heads, num_tokens, device=device)

    @torch.no_grad()
    def add(self, first, q, k, v, gates, blocks):
        """q [n, H, D], gates [n, H, 3] and blocks [n, K, S] of the packed tokens from `first` on;
        k, v [first + n, K, D] of all up to the last of them."""
        group, count = q.shape[1] // k.shape[1], len(k)
        complete = count // self.size
        step = max(1, CHUNK_ELEMENTS.get(q.device.type, 2**20) // (group * count))
        for head in range(k.shape[1]):
            keys, values = k[:, head].float(), v[:, head].float()
            means, value_means = (
                x[: complete * self.size].unflatten(0, (-1, self.size)).mean(1)
                for x in (keys, values)
            )
            self.norms[head, :count] = values.norm(dim=1)
            self.mean_norms[head, :complete] = value_means.norm(dim=1)
            own = slice(head * group, (head + 1) * group)
            for start in range(0, len(q), step):
                rows = slice(start, start + step)
                self._add_chunk(
                    head,
                    own,
                    first + start,
                    q[rows, own].float(),
                    keys,
                    means,
                    gates[rows, own].float(),
                    blocks[rows, head],
                )

    def _add_chunk(self, head, own, first, q, keys, means, gates, blocks):
        """q [t, G, D] of one key/value head, keys [L, D], means [M, D], blocks [t, S]."""
        place = torch.arange(len(keys), device=q.device)
        position = torch.arange(first, first + len(q), device=q.device)[:, None]
        causal = place <= position
        member = torch.zeros(len(q), len(keys) // self.size + 2, device=q.device)
        member.scatter_(1, blocks.long() % member.shape[1], 1)  # -1 is the last, and no block
        selected = member.bool()[:, place // self.size] & causal
        window = causal & (position - place < self.config.nsa_window_size)
        scores = q @ keys.T * self.scale  # [t, G, L]
        by_branch = [_softmax(scores, visible) for visible in (selected, window, causal)]
        visible = is_complete(len(means), position[:, 0], self.size)
        compressed = _softmax(q @ means.T * self.scale, visible)
        combined = by_branch[0] * gates[..., 1:2] + by_branch[1] * gates[..., 2:]
        spread = (compressed * gates[..., :1] / self.size).repeat_interleave(self.size, -1)
        combined[..., : spread.shape[-1]] += spread
        self.means[own, : len(means)] += compressed.sum(0)
        for place, weights in enumerate((*by_branch[:2], combined, by_branch[2])):
            self.keys[place, own, : len(keys)] += weights.sum(0)
        self.selecting[head, : len(keys)] += selected.sum(0)

    def find(self) -> list[torch.Tensor]:
        """bool [H, keys] on the CPU, of each of SINK_BRANCHES: the means, else the tokens."""
        group = len(self.means) // len(self.norms)
        tokens = self.norms.shape[1]
        later = tokens - torch.arange(tokens, device=self.norms.device)
        ends = (torch.arange(self.means.shape[1], device=self.norms.device) + 1) * self.size - 1
        queries = [
            tokens - ends,
            self.selecting.repeat_interleave(group, 0),
            later.clamp(max=self.config.nsa_window_size),
            later,
            later,
        ]
        small_means = _small(self.mean_norms).repeat_interleave(group, 0)
        small = _small(self.norms).repeat_interleave(group, 0)
        found = []
        for index, (received, number) in enumerate(
            zip((self.means, *self.keys), queries, strict=True)
        ):
            much = received / number.clamp(min=1) > MIN_ATTENTION
            found.append((much & (small if index else small_means)).cpu())
        return found


def _small(norms):
    """bool [K, n]: norms that are far below those of the head's other keys."""
    if not norms.shape[1]:
        return norms.bool()
    low, median, high = norms.quantile(norms.new_tensor([0.25, 0.5, 0.75]), dim=1)
    return norms < (median - IQRS * (high - low))[:, None]


def _softmax(scores, visible):
    """Over the last axis of [t, G, n], where visible [t, n]; zero in a row that sees nothing."""
    hidden = ~visible[:, None]
    weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
    return weights.masked_fill(hidden, 0)
