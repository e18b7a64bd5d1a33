"""Records what a model attends to, reduced while it runs.

    layout = locate_vision(model.config, inputs)
    with AttentionWatch(model, layout) as watch:
        ids = model.generate(**inputs)
    watch.record().save("folder")

Nothing of size N x N is kept, and nothing is waited for: each layer and chunk of a prompt adds to
sums on its device. What comes of it is an `AttentionRecord` (attention_record.py, with the letters
that are used for shapes here).
"""

import functools

import numpy as np
import torch

from commands.attention_layout import VisionLayout
from commands.attention_record import AttentionRecord
from commands.attention_sinks import SinkSums

BINS = 64  # of neighbouring steps, at most
MOST_QUESTION_ROWS = 256  # of a longer text after the last image or video, the last ones
STILL = 1e-3  # a head whose gates deviate less has its branch open or closed for good
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**24}  # scores of text rows that are held at once


class AttentionWatch:
    """Records what a model attends to while it is entered, in one run of one conversation.

    It wraps `attend_sparse` and `attend_dense` of every layer, and hooks the layers, so that
    decoding runs layer by layer: a recorded step would show nothing. Not for two threads at once.

    model: a VideoNSAForConditionalGeneration, or adapters around one.
    layout: of the whole conversation, its cached part too.
    sinks: whether to look for attention sinks, which compares every pair of vision tokens.
    """

    def __init__(self, model, layout: VisionLayout, sinks: bool = False):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config, self.layout = base.config.text_config, layout
        if self.config.nsa_semantics != "paper":
            raise ValueError(
                f"nsa_semantics is {self.config.nsa_semantics!r}, under which text has a part in "
                "the blocks; attention is recorded with nsa_semantics='paper' only."
            )
        self.layers = [layer.self_attn for layer in base.model.language_model.layers]
        if not all(hasattr(layer, "watch_blocks") for layer in self.layers):
            raise ValueError(
                f"{type(self.layers[0]).__module__} does not hand out the blocks that it selects; "
                "use the code of this repository."
            )
        steps = layout.num_steps
        self.bins = min(BINS, steps)
        self.bin_of_step = np.arange(steps) * self.bins // steps
        self.blocks = -(-len(layout.packed) // self.config.nsa_block_size)
        last_vision = int(np.flatnonzero(layout.step_of_token >= 0)[-1])
        self.first_row = max(last_vision + 1, layout.length - MOST_QUESTION_ROWS)
        self.chosen_tokens = self._choose_tokens()
        self.sums = [None] * len(self.layers)
        self.rows = [{} for _ in self.layers]  # of each layer, position to the row's attention
        self.constants = {}
        self.sinks = [None] * len(self.layers) if sinks else None

    def __enter__(self):
        self.hooks = []
        for index, layer in enumerate(self.layers):
            layer.attend_sparse = functools.partial(self._sparse, index, layer.attend_sparse)
            layer.attend_dense = functools.partial(self._dense, index, layer.attend_dense)
            hook = functools.partial(self._after_stock, index)
            self.hooks.append(layer.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *error):
        for layer, hook in zip(self.layers, self.hooks, strict=True):
            del layer.attend_sparse, layer.attend_dense  # the class's own are found again
            hook.remove()

    def record(self) -> AttentionRecord:
        """All that was seen; waits for the device."""
        config = self.config
        settings = {
            "block_size": config.nsa_block_size,
            "num_selected": config.nsa_num_selected_blocks,
            "window_size": config.nsa_window_size,
            "num_initial": config.nsa_num_initial_blocks,
            "num_local": config.nsa_num_local_blocks,
            "layers": len(self.layers),
            "heads": config.num_attention_heads,
            "key_value_heads": config.num_key_value_heads,
        }
        sums = [s or _Sums(self, torch.device("cpu")) for s in self.sums]
        means, deviations, correlations = zip(*(s.gates() for s in sums), strict=True)
        positions = sorted(self.rows[0])
        steps = self.layout.num_steps
        attention = np.zeros((len(self.layers), len(positions), steps + 1), np.float32)
        for layer, rows in enumerate(self.rows):
            if positions:
                attention[layer] = torch.stack([rows[p] for p in positions]).cpu().numpy()
        return AttentionRecord(
            layout=self.layout,
            settings=settings,
            bin_of_step=self.bin_of_step,
            selections=np.stack([s.selections() for s in sums]),
            chosen_tokens=self.chosen_tokens,
            chosen_blocks=np.stack([s.chosen.cpu().numpy() for s in sums]),
            gate_means=np.stack(means),
            gate_deviations=np.stack(deviations),
            gate_correlations=np.stack(correlations),
            text_positions=np.array(positions, dtype=np.int64),
            text_attention=attention,
            num_question_rows=sum(p < self.layout.length for p in positions),
            **self._count_sinks(),
        )

    def _count_sinks(self):
        if self.sinks is None or None in self.sinks:
            return {}
        layout = self.layout
        of_token, of_block = layout.packed_steps, layout.block_steps(self.config.nsa_block_size)
        ratios, counts = [], []
        for layer in self.sinks:
            found = [sinks.double().numpy() for sinks in layer.find()]
            ratios.append([sinks.sum(1) / max(sinks.shape[1], 1) for sinks in found])
            means, *others = (sinks.sum(0) for sinks in found)
            counts.append(
                [
                    means @ of_block[: len(means)],
                    *(np.bincount(of_token, sinks, layout.num_steps) for sinks in others),
                ]
            )
        return {"sink_ratios": np.array(ratios), "sink_counts": np.array(counts)}

    def _choose_tokens(self):
        """The middle one of each bin's packed tokens, -1 where it has none."""
        bins = self.bin_of_step[self.layout.packed_steps]
        bounds = np.searchsorted(bins, np.arange(self.bins + 1))
        return np.where(bounds[1:] > bounds[:-1], (bounds[1:] + bounds[:-1] - 1) // 2, -1)

    def _on(self, device):
        """What is the same for all layers, on their device."""
        if device not in self.constants:
            self.constants[device] = _Constants(self, device)
        return self.constants[device]

    def _sparse(self, index, attend_sparse, query, key, value, gates, plan):
        _check_one(query)
        first = _count(plan.vision_keys) - _count(plan.vision_queries)
        if first + len(gates) > len(self.layout.packed):
            raise ValueError(
                f"{first + len(gates)} vision tokens ran, but the layout has "
                f"{len(self.layout.packed)}; make it of the prompt that runs."
            )
        if self.sums[index] is None:
            self.sums[index] = _Sums(self, query.device)
        sums, layer = self.sums[index], self.layers[index]
        sums.add_gates(first, gates.detach())
        blocks = []

        def watch_blocks(chosen):
            sums.add_blocks(first, chosen)
            blocks.append(chosen)

        layer.watch_blocks = watch_blocks
        try:
            output = attend_sparse(query, key, value, gates, plan)
        finally:
            layer.watch_blocks = None
        if self.sinks is not None:
            if self.sinks[index] is None:
                tokens, scale = len(self.layout.packed), layer.scaling
                self.sinks[index] = SinkSums(tokens, self.config, scale, query.device)
            rows = (x[plan.vision_keys] for x in (key, value))
            self.sinks[index].add(first, query[plan.vision_queries], *rows, gates, blocks[0])
        return output

    def _dense(self, index, attend_dense, query, key, value, plan):
        start, end = plan.num_keys - plan.num_queries, plan.num_keys
        if end > self.first_row:
            rows = slice(max(self.first_row, start), end)
            queries = query[0, rows.start - start :]
            self._add_rows(index, rows, queries, key[0, :end])
        return attend_dense(query, key, value, plan)

    def _after_stock(self, index, layer, args, kwargs, output):
        """A call without new vision tokens, which ran the stock attention."""
        if kwargs.get("nsa_plan") is not None:
            return
        hidden, layer = kwargs["hidden_states"], self.layers[index]
        _check_one(hidden)
        cache = next((kwargs[x] for x in ("past_key_values", "cache") if kwargs.get(x)), None)
        if cache is None:
            raise ValueError("attention is recorded with a cache only; leave use_cache on.")
        end = int(cache.get_seq_length(layer.layer_idx))
        start = max(self.first_row, end - hidden.shape[1])
        if start >= end:
            return
        hidden = hidden[:, start - end :]
        angles = (x[:, start - end :] for x in kwargs["position_embeddings"])
        query = layer._project(hidden, tuple(angles))[0]
        key = cache.layers[layer.layer_idx].keys[0, :, :end]
        self._add_rows(index, slice(start, end), query[0].transpose(0, 1), key.transpose(0, 1))

    @torch.no_grad()
    def _add_rows(self, index, rows, query, key):
        """query [r, H, D] of these tokens; key [end, K, D] of all tokens up to the last of them."""
        constants, scale = self._on(key.device), self.layers[index].scaling
        vision = constants.vision_tokens, constants.vision_steps
        found = step_attention(query, key, rows.start, *vision, self.layout.num_steps, scale)
        self.rows[index] |= zip(range(rows.start, rows.stop), found, strict=True)


class _Constants:
    """Numbers of the layout on one device, so that no layer has to send them."""

    def __init__(self, watch, device):
        layout = watch.layout
        vision = np.flatnonzero(layout.step_of_token >= 0)
        self.vision_tokens = torch.from_numpy(vision).to(device)
        self.vision_steps = torch.from_numpy(layout.step_of_token[vision]).to(device)
        self.bin_of_token = torch.from_numpy(watch.bin_of_step[layout.packed_steps]).to(device)
        self.chosen_tokens = torch.from_numpy(watch.chosen_tokens)


class _Sums:
    """What one layer adds up on its device."""

    def __init__(self, watch, device):
        config, self.watch = watch.config, watch
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.bins, self.blocks, self.near = watch.bins, watch.blocks, None
        with torch.inference_mode(False):
            counts = (kv_heads, watch.bins, watch.blocks + 1)  # the last is of unused slots
            self.counts = torch.zeros(counts, dtype=torch.int32, device=device)
            chosen = (kv_heads, watch.bins, config.nsa_num_selected_blocks)
            self.chosen = torch.full(chosen, -1, dtype=torch.int32, device=device)
            self.gate_sums = torch.zeros(watch.bins, heads * 3, device=device)
            self.gate_products = torch.zeros(3, heads, heads, device=device)
            self.queries = torch.zeros(watch.bins, device=device)

    @torch.no_grad()
    def add_gates(self, first, gates):
        """gates [n, H, 3] of the packed tokens from `first` on."""
        bins = self.watch._on(gates.device).bin_of_token[first : first + len(gates)]
        member = torch.arange(self.bins, device=gates.device)[:, None] == bins
        gates, member = gates.float(), member.float()
        self.gate_sums += member @ gates.flatten(1)  # a product, because it has one order
        self.queries += member.sum(1)
        if self.near is None:  # near the mean of all, so that float32 holds the differences
            self.near = gates.mean(0)
        gates = gates - self.near
        self.gate_products += torch.einsum("nhb,nib->bhi", gates, gates)

    @torch.no_grad()
    def add_blocks(self, first, blocks):
        """blocks int32 [n, K, S] of the packed tokens from `first` on, -1 for none."""
        constants, (n, kv_heads, _) = self.watch._on(blocks.device), blocks.shape
        bins = constants.bin_of_token[first : first + n, None, None]
        head = torch.arange(kv_heads, device=blocks.device)[:, None]
        column = blocks % (self.blocks + 1)  # -1 goes to the last
        flat = ((head * self.bins + bins) * (self.blocks + 1) + column).flatten()
        one = torch.ones((), dtype=torch.int32, device=blocks.device).expand_as(flat)
        self.counts.view(-1).scatter_add_(0, flat, one)
        chosen = constants.chosen_tokens
        for place in ((chosen >= first) & (chosen < first + n)).nonzero().flatten().tolist():
            self.chosen[:, place] = blocks[int(chosen[place]) - first]

    def selections(self):
        return self.counts[..., :-1].cpu().numpy()

    def gates(self):
        """Means [3, H, T], deviations [3, H] and correlations [3, H, H]; NaN without tokens.

        A correlation with a head whose gates hardly change (STILL) is NaN, too.
        """
        sums = self.gate_sums.double().cpu().unflatten(1, (-1, 3)).permute(2, 1, 0)
        queries, products = self.queries.double().cpu(), self.gate_products.double().cpu()
        off = sums.sum(-1) / queries.sum()
        if self.near is not None:
            off = off - self.near.double().cpu().T
        covariance = products / queries.sum() - off[:, :, None] * off[:, None]
        deviation = covariance.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
        changing = deviation.where(deviation > STILL, torch.nan)
        correlation = covariance / (changing[:, :, None] * changing[:, None])
        return tuple(x.numpy() for x in (sums / queries, deviation, correlation))


@torch.no_grad()
def step_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    position: int,
    vision_tokens: torch.Tensor,
    vision_steps: torch.Tensor,
    num_steps: int,
    scale: float,
) -> torch.Tensor:
    """Dense causal attention of text rows, summed over the keys of each step, mean over heads.

    query [r, H, D] at positions from `position` on, behind all vision; key [L, K, D]; vision_tokens
    and vision_steps int64 [V], which keys are vision, and of which steps. Returns float32
    [r, num_steps + 1], the last for text. Rows are taken in chunks, heads one group at a time.
    """
    length, kv_heads, _ = key.shape
    group = query.shape[1] // kv_heads
    size = max(1, CHUNK_ELEMENTS.get(key.device.type, 2**22) // (group * length))
    found = torch.zeros(len(query), num_steps + 1, device=key.device)
    for start in range(0, len(query), size):
        rows = query[start : start + size].to(key.device).unflatten(1, (kv_heads, group))
        own = torch.arange(len(rows), device=key.device) + position + start
        hidden = torch.arange(length, device=key.device) > own[:, None]
        for head in range(kv_heads):
            scores = rows[:, head].float() @ key[:, head].float().T * scale  # [r, G, L]
            weights = scores.masked_fill_(hidden[:, None], -torch.inf).softmax(-1).mean(1)
            weights = weights[:, vision_tokens] / kv_heads
            found[start : start + size].index_add_(1, vision_steps, weights)
    found[:, -1] = 1 - found[:, :-1].sum(1)
    return found


def _count(index):
    """Rows that an `Index` of packing_videonsa.py picks."""
    place = index[1]
    return place.stop - place.start if isinstance(place, slice) else len(place)


def _check_one(x):
    if len(x) != 1:
        raise ValueError(
            f"a batch of {len(x)} rows ran; attention is recorded of one row: one prompt, without "
            "beams and with one returned sequence."
        )
