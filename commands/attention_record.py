"""What a model attended to in one run, reduced while it runs: gates, selections, what text read.

    layout = locate_vision(model.config, inputs)                 # commands/attention_layout.py
    with AttentionWatch(model, layout) as watch:
        output = model.generate(**inputs, return_dict_in_generate=True)
    record = watch.record()
    record.save("folder")                                         # attention.npz, attention.json

Nothing of size N x N is kept, and nothing is waited for: each layer and chunk of a prompt adds to
sums on its device. The queries are counted in at most `BINS` *bins* of neighbouring steps (a step
is two frames of a video, or an image), so that the sums do not grow with the square of a video.

Shapes of `AttentionRecord`, numpy arrays under the same names in attention.npz:
    Y layers, H query heads, K key/value heads, T bins, S selected blocks, R text rows,
    blocks of `block_size` packed vision tokens, steps as VisionLayout numbers them.

    bin_of_step      int64   [steps]           the bin that a step's queries are counted in
    selections       int32   [Y, K, T, blocks] how often the bin's queries selected a block
    chosen_tokens    int64   [T]               one packed vision token of each bin, -1 without any
    chosen_blocks    int32   [Y, K, T, S]      the blocks that this token selected, then -1
    gate_means       float64 [Y, 3, H, T]      of the bin's queries, by branch (nsa_rules.BRANCHES)
    gate_deviations  float64 [Y, 3, H]         standard deviation over all vision tokens
    gate_correlations float64 [Y, 3, H, H]     of two heads' gates over all vision tokens
    text_positions   int64   [R]               tokens of the prompt and answer that attend densely
    text_attention   float32 [Y, R, steps + 1] the mean over heads of their attention to each step,
                                               and last to all text; each row adds up to 1
    sink_ratios      float64 [Y, 5, H]         the part of a head's keys that are sinks, by branch
    sink_counts      float64 [Y, 5, steps]     sinks of all heads by step; both as in SINK_BRANCHES
                                               of attention_sinks.py, None where not asked for
    num_question_rows int    the rows of the prompt; the last of them and all later ones each
                             predict a token of the answer
    layout           VisionLayout              its fields are layout_... in attention.npz
    settings         dict    block_size, num_selected, window_size, num_initial, num_local, and the
                             numbers of layers, heads and key_value_heads
"""

import functools
import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from commands.attention_layout import VisionLayout
from commands.attention_sinks import SINK_BRANCHES, SinkSums
from nsa_rules import BRANCHES, count_visits

BINS = 64
MOST_QUESTION_ROWS = 256  # of a longer text after the last image or video, the last ones
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**24}  # scores of text rows that are held at once


@dataclass
class AttentionRecord:
    """What `AttentionWatch` saw; the arrays are described at the top of this file."""

    layout: VisionLayout
    settings: dict
    bin_of_step: np.ndarray
    selections: np.ndarray
    chosen_tokens: np.ndarray
    chosen_blocks: np.ndarray
    gate_means: np.ndarray
    gate_deviations: np.ndarray
    gate_correlations: np.ndarray
    text_positions: np.ndarray
    text_attention: np.ndarray
    num_question_rows: int
    sink_ratios: np.ndarray | None = None
    sink_counts: np.ndarray | None = None

    @property
    def is_sparse(self) -> bool:
        """Whether vision tokens attended sparsely; not with nsa_enabled=false."""
        return bool(self.selections.any())

    def selection_shares(self) -> np.ndarray:
        """float64 [Y, K, T, steps]: the share of a bin's selections that each step received.

        A block that crosses steps gives each its part. A query's own block is always selected, so
        that part of a bin's share is its own; a bin without queries has zeros.
        """
        counts = self.selections @ self.layout.block_steps(self.settings["block_size"])
        return counts / np.maximum(counts.sum(-1, keepdims=True), 1)

    def selection_rates(self) -> np.ndarray:
        """float64 [Y, K, steps]: how often a step's blocks were selected, of all who could.

        Only choices count: not a query's own block and others that are always selected. 0 to 1;
        NaN where no query could choose. Unlike a share, it does not favour early steps, which
        more queries can see.
        """
        could, forced = self._choices()
        by_step = self.layout.block_steps(self.settings["block_size"])
        chosen = (self.selections.sum(2) - forced) @ by_step
        could = could @ by_step
        return np.divide(chosen, could, out=np.full(chosen.shape, np.nan), where=could > 0)

    def answer_reads(self) -> np.ndarray:
        """float32 [Y, answer tokens, steps + 1]: what each token of the answer was read from."""
        return self.text_attention[:, max(self.num_question_rows - 1, 0) :]

    def selected_patches(
        self, place: int, layer: int | None = None, group: int | None = None
    ) -> list[np.ndarray]:
        """What the token of bin `place` selected: for each step float64 [height, width], the share
        of layers and key/value heads that selected a token's block, up to that token itself.

        layer, group: the numbers of one layer and one key/value head; all of them for None.
        """
        layout, blocks = self.layout, self.chosen_blocks[:, :, place]
        blocks = blocks if layer is None else blocks[layer : layer + 1]
        blocks = blocks if group is None else blocks[:, group : group + 1]
        size, end = self.settings["block_size"], self.chosen_tokens[place] + 1
        counts = np.bincount(blocks[blocks >= 0], minlength=-(-len(layout.packed) // size))
        shares = np.zeros(layout.length)
        choices = blocks.shape[0] * blocks.shape[1]
        shares[layout.packed[:end]] = np.repeat(counts / choices, size)[:end]
        steps = zip(layout.first_token, layout.height, layout.width, strict=True)
        return [shares[first : first + h * w].reshape(h, w) for first, h, w in steps]

    def keys_read(self) -> dict:
        """Keys that a vision query reads in each branch, on average, measured; and if dense.

        A key in several branches counts in each, as in finetune.py's `keys_attended`.
        """
        rule = self._rule()
        positions = torch.arange(len(self.layout.packed))
        compressed, _, window = count_visits(positions, **rule).sum(0).tolist()
        # Past blocks are read whole, a query's own up to itself.
        size, layers = rule["block_size"], self.selections.shape[0] * self.selections.shape[1]
        hidden = int((size - 1 - positions % size).sum())
        selected = int(self.selections.sum(dtype=np.int64)) * size / layers - hidden
        n = len(positions)
        read = {"compressed": compressed / n, "selected": selected / n, "window": window / n}
        return read | {"dense": (n + 1) / 2}

    def gate_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """float64 [Y, 3] each: mean and standard deviation over all heads and vision tokens."""
        tokens = np.bincount(
            self.bin_of_step[self.layout.packed_steps], minlength=len(self.chosen_tokens)
        )
        by_head = np.nansum(self.gate_means * tokens, -1) / tokens.sum()  # [Y, 3, H]
        mean = by_head.mean(-1)
        square = (self.gate_deviations**2 + by_head**2).mean(-1)
        return mean, np.sqrt(np.maximum(square - mean**2, 0))

    def overlaps(self) -> np.ndarray:
        """float64 [Y, K, K]: the part of one head's choices that another head made too.

        Over the tokens in `chosen_tokens`, without the blocks that are always selected; NaN where
        none had a choice.
        """
        own = self.chosen_tokens // self.settings["block_size"]
        blocks = self.chosen_blocks  # [Y, K, T, S]
        free = (blocks >= self.settings["num_initial"]) & (blocks >= 0)
        free &= blocks <= (own - self.settings["num_local"])[:, None]
        kinds = max(int(blocks.max()), 0) + 1
        member = np.zeros((*blocks.shape[:3], kinds))
        np.put_along_axis(member, np.where(free, blocks, 0), 1, -1)
        member[..., 0] = (free & (blocks == 0)).any(-1)
        shared = np.einsum("yktb,yltb->ykl", member, member)
        mine = np.einsum("yktb->yk", member)[..., None]
        return np.divide(shared, mine, out=np.full(shared.shape, np.nan), where=mine > 0)

    def summary(self) -> dict:
        """What attention.json holds: lists and numbers, NaN as null."""
        seconds = self.layout.seconds
        reads = self.answer_reads()[..., :-1].mean((0, 1)) if len(self.text_positions) else []
        found = {
            "settings": self.settings,
            "steps": [
                {"medium": int(medium), "from": begin, "to": end}
                for medium, (begin, end) in zip(self.layout.medium, seconds.tolist(), strict=True)
            ],
            "answer_attention_by_step": np.asarray(reads).tolist(),
        }
        if self.is_sparse:
            found |= {
                "selection_rate_by_step": self.selection_rates().mean((0, 1)).tolist(),
                "gate_means_by_layer": [
                    dict(zip(BRANCHES, branches, strict=True))
                    for branches in self.gate_statistics()[0].tolist()
                ],
                "keys_read": self.keys_read(),
            }
        if self.sink_ratios is not None:
            ratios = self.sink_ratios.mean((0, 2)).tolist()
            found["sink_ratios"] = dict(zip(SINK_BRANCHES, ratios, strict=True))
        return _without_nan(found)

    def save(self, folder) -> None:
        """Writes attention.npz and attention.json into a folder, which is made."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {
            name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)
        }
        layout = {f"layout_{name}": value for name, value in vars(self.layout).items()}
        settings = json.dumps(self.settings)
        np.savez_compressed(
            folder / "attention.npz",
            num_question_rows=self.num_question_rows,
            settings=settings,
            **arrays,
            **layout,
        )
        text = json.dumps(self.summary(), indent=1)
        (folder / "attention.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder) -> "AttentionRecord":
        """Reads attention.npz of a folder that `save` wrote."""
        with np.load(Path(folder, "attention.npz"), allow_pickle=False) as data:
            names = [field.name for field in fields(VisionLayout)]
            layout = {name: data[f"layout_{name}"] for name in names}
            layout["length"] = int(layout["length"])
            own = {field.name: data[field.name] for field in fields(cls) if field.name in data}
        own["settings"] = json.loads(str(own["settings"]))
        own["num_question_rows"] = int(own["num_question_rows"])
        return cls(layout=VisionLayout(**layout), **own)

    def _rule(self):
        return {name: self.settings[name] for name in ("block_size", "num_selected", "window_size")}

    def _choices(self):
        """int64 [blocks] each: queries that could choose a block, and those that had to take it."""
        size, initial = self.settings["block_size"], self.settings["num_initial"]
        local, blocks = self.settings["num_local"], self.selections.shape[-1]
        own = np.bincount(np.arange(len(self.layout.packed)) // size, minlength=blocks)
        later = own[::-1].cumsum()[::-1]  # queries whose own block is this one or a later one
        could = np.append(later[local:], np.zeros(min(local, blocks), int))[:blocks]
        forced = later - could
        forced[:initial], could[:initial] = later[:initial], 0
        return could, forced


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
        """Means [3, H, T], deviations [3, H] and correlations [3, H, H]; NaN without tokens."""
        sums = self.gate_sums.double().cpu().unflatten(1, (-1, 3)).permute(2, 1, 0)
        queries, products = self.queries.double().cpu(), self.gate_products.double().cpu()
        off = sums.sum(-1) / queries.sum()
        if self.near is not None:
            off = off - self.near.double().cpu().T
        covariance = products / queries.sum() - off[:, :, None] * off[:, None]
        deviation = covariance.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
        correlation = covariance / (deviation[:, :, None] * deviation[:, None])
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


def _without_nan(value):
    if isinstance(value, dict):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and value != value else value
