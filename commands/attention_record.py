"""What a model attended to in one run: gates, selections, what text read.

    record = AttentionRecord.load("folder")
    record.answer_reads()

attention_watch.py makes a record. The queries are counted in a few *bins* of neighbouring steps (a
step is two frames of a video, or an image), so that a record does not grow with the square of a
video.

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

import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from commands.attention_layout import VisionLayout
from commands.attention_sinks import SINK_BRANCHES
from nsa_rules import BRANCHES, count_visits


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


def _without_nan(value):
    if isinstance(value, dict):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and value != value else value
