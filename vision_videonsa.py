"""Qwen2.5-VL's vision tower, the same to rounding, without a Python loop over its windows.

- Windows of one length attend in one call. Patches are sorted by the length of their window, so
  that the windows of one length are a view; the layers that attend within whole frames gather.
- Which patch is where is worked out once per call (`Layout`) for all blocks.
- Without gradients, frames go through the tower in chunks, which bounds memory.
- On CUDA, norms, rotary embedding and activation take one pass each (fused_videonsa.py), and the
  MLP's columns are padded with zeros to a multiple of 64, which aligned matrix kernels need.

Parameters, their names and the block class are the stock tower's. Shapes: N patches of a chunk,
D head size; a token is spatial_merge_unit neighbouring patches (4 in the published models).
"""

import contextlib
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionPatchEmbed,
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLMLP,
    Qwen2_5_VLVisionAttention,
)
from transformers.utils import logging

from .fused_videonsa import VideoNSARMSNorm, rotary, swiglu_halves
from .library_videonsa import (
    ALL_ATTENTION_FUNCTIONS,
    capture_outputs,
    eager_attention_forward,
    get_vision_cu_seqlens,
    get_vision_position_ids,
    get_vision_window_index,
    merge_with_config_defaults,
)
from .memory_videonsa import (
    LEAST_PATCHES,
    PATCHES_PER_CHUNK,
    PATCHES_SHARE,
    free_memory,
    patch_bytes,
    units_that_fit,
)
from .packing_videonsa import send
from .sharding_videonsa import gather_parts, share_frames

logger = logging.get_logger(__name__)

SEQUENCES_PER_CALL = 32768  # CUDA's attention kernels take fewer than 65,536 sequences
ALIGNED_COLUMNS = 64


class Sequences(NamedTuple):
    """Windows or frames, which attend within themselves, sorted by length."""

    shapes: list[tuple[int, int]]  # (how many sequences, their length), lengths ascending
    rows: torch.Tensor | None  # int64 [N]: which row of the chunk comes next; None: they are sorted
    restore: torch.Tensor | None  # int64 [N]: the inverse

    def to(self, device: torch.device) -> "Sequences":
        if self.rows is None:
            return self
        return self._replace(rows=send(self.rows, device), restore=send(self.restore, device))


class Layout(NamedTuple):
    """In which order the tokens of a chunk of whole frames are kept in the tower.

    "Processor order" is that of the pixels and of the features, "window order" that of stock.
    """

    order: torch.Tensor  # int64 [tokens]: the kept tokens, as numbers in processor order
    tokens: torch.Tensor  # int64 [tokens]: the inverse, from kept to processor order
    windows: torch.Tensor  # int64 [tokens]: from kept to window order
    attention: dict[str, Sequences]  # "window" and "frame"

    def to(self, device: torch.device) -> "Layout":
        attention = {name: sequences.to(device) for name, sequences in self.attention.items()}
        return Layout(*(send(x, device) for x in self[:3]), attention)


def make_layout(
    window_index: torch.Tensor,
    window_lengths: torch.Tensor,
    frame_lengths: torch.Tensor,
    unit: int,
    by_length: bool = True,
) -> Layout:
    """Lay out whole frames; all tensors int64 on the CPU.

    window_index [tokens]: processor-order numbers of the tokens in window order.
    window_lengths, frame_lengths: patches of each window and each frame, in window order.
    unit: patches of a token.
    by_length: keep tokens sorted by the length of their window; False keeps window order.
    """
    rows = torch.arange(len(window_index))
    if by_length:
        rows = window_lengths.repeat_interleave(window_lengths // unit).argsort(stable=True)
    windows = rows.argsort()
    order = window_index[rows]
    patches = (windows[:, None] * unit + torch.arange(unit)).flatten()
    attention = {
        "window": _sequences(window_lengths, patches),
        "frame": _sequences(frame_lengths, patches),
    }
    return Layout(order, order.argsort(), windows, attention)


def _sequences(lengths, patches):
    """Sort sequences by length; patches int64 [N]: the rows of the first, of the second, ..."""
    values, counts = lengths.unique(return_counts=True)
    shapes = list(zip(counts.tolist(), values.tolist(), strict=True))
    rows = patches[lengths.repeat_interleave(lengths).argsort(stable=True)]
    if torch.equal(rows, torch.arange(len(rows))):
        return Sequences(shapes, None, None)
    return Sequences(shapes, rows, rows.argsort())


class VideoNSAVisionPatchEmbed(Qwen2_5_VisionPatchEmbed):
    """Patches to features as one matrix product, which the convolution is."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not _is_plain(self.proj, nn.Conv3d):
            return super().forward(hidden_states)
        weight = self.proj.weight
        return nn.functional.linear(hidden_states.to(weight.dtype), weight.flatten(1))


class VideoNSAVisionAttention(Qwen2_5_VLVisionAttention):
    """One attention call for all sequences of one length."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        sequences: Sequences,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cu_seqlens: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """hidden_states [N, hidden], cos and sin float32 [N, D]; returns [N, hidden]."""
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1))
        cos, sin = (x.float() for x in position_embeddings)  # mixed precision may have cast them
        query, key = rotary(qkv[:, 0], qkv[:, 1], cos, sin)
        states = query, key, qkv[:, 2]
        if sequences.rows is not None:
            states = [x[sequences.rows] for x in states]
        sizes = [count * length for count, length in sequences.shapes]
        parts = zip(*(x.split(sizes) for x in states), sequences.shapes, strict=True)
        outputs = [self._attend(*part, kwargs) for part in parts]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if sequences.restore is not None:
            output = output[sequences.restore]
        return self.proj(output)

    def _attend(self, query, key, value, shape, kwargs):
        """[count * length, H, D] each to [count * length, H * D]."""
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        states = (x.unflatten(0, shape).transpose(1, 2) for x in (query, key, value))
        outputs = [
            attention(
                self,
                *piece,
                attention_mask=None,
                scaling=self.scaling,
                dropout=self.attention_dropout if self.training else 0.0,
                is_causal=False,
                **kwargs,
            )[0]
            for piece in zip(*(x.split(SEQUENCES_PER_CALL) for x in states), strict=True)
        ]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return output.flatten(2).flatten(0, 1)


class VideoNSAVisionMLP(Qwen2_5_VLMLP):
    """Gate and up projection as one product of aligned width, and the activation in one pass."""

    def __init__(self, config, bias=False):
        super().__init__(config, bias)
        self.is_swiglu = config.hidden_act == "silu"

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        linears = self.gate_proj, self.up_proj, self.down_proj
        if not self.is_swiglu or not all(_is_plain(x, nn.Linear) for x in linears):
            if self.is_swiglu and hidden_state.is_cuda and any(map(_is_quantized, linears)):
                logger.warning_once(
                    "The vision tower has quantised weights: its MLPs run layer by layer, without "
                    "the fused activation and aligned widths, which takes longer. Without "
                    "quantize_vision_tower it stays in 16 bit."
                )
            return super().forward(hidden_state)
        return self.fused(hidden_state)

    def fused(self, hidden_state: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to [..., hidden]. Zero columns pad each half: silu(0) * 0 adds nothing."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        padding = -gate.out_features % ALIGNED_COLUMNS
        rows = gate.weight.new_zeros(padding, gate.in_features)
        weight = torch.cat([gate.weight, rows, up.weight, rows])
        bias = None
        if gate.bias is not None:
            bias = torch.cat([gate.bias, rows[:, 0], up.bias, rows[:, 0]])
        activation = swiglu_halves(nn.functional.linear(hidden_state, weight, bias))
        weight = nn.functional.pad(down.weight, (0, padding))
        return nn.functional.linear(activation, weight, down.bias)


class VideoNSAVisionTower(Qwen2_5_VisionTransformerPretrainedModel):
    """Qwen2.5-VL's vision tower."""

    def __init__(self, config, *inputs, **kwargs):
        super().__init__(config, *inputs, **kwargs)
        self.patch_embed = VideoNSAVisionPatchEmbed(
            config.patch_size, config.temporal_patch_size, config.in_channels, config.hidden_size
        )
        for block in self.blocks:
            block.norm1 = VideoNSARMSNorm(config.hidden_size, eps=1e-6)
            block.norm2 = VideoNSARMSNorm(config.hidden_size, eps=1e-6)
            block.attn = VideoNSAVisionAttention(config)
            block.mlp = VideoNSAVisionMLP(config, bias=True)
        self.merger.ln_q = VideoNSARMSNorm(config.hidden_size, eps=1e-6)
        self.nsa_group = None  # of processes that share out frames: see `shard_sequences`
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, hidden_states: torch.Tensor, grid_thw: torch.Tensor, **kwargs
    ) -> BaseModelOutputWithPooling:
        """hidden_states [patches, pixels of a patch], grid_thw int64 [media, 3] in patches.

        Returns `last_hidden_state` [patches, hidden], in window order, and `pooler_output`
        [tokens, out_hidden_size], in processor order.
        """
        grid = grid_thw.cpu()
        if len(hidden_states) != (patches := int(grid.prod(-1).sum())):
            raise ValueError(
                f"the vision tower got {len(hidden_states)} patches, but grid_thw stands for "
                f"{patches}. Pass the grids of exactly these patches."
            )
        unit = self.spatial_merge_unit
        positions = get_vision_position_ids(grid, self.spatial_merge_size, kwargs=kwargs).cpu()
        frames = get_vision_cu_seqlens(grid, kwargs=kwargs).cpu().long()
        index, windows = get_vision_window_index(
            grid, self.spatial_merge_size, self.window_size, self.patch_size, kwargs=kwargs
        )
        index, windows = index.cpu(), windows.cpu().long()
        for name in ("max_seqlen", "max_window_seqlen"):  # only the stock tower reads them
            kwargs.pop(name, None)

        records = any(
            kwargs.get(f"output_{name}", getattr(self.config, f"output_{name}", False))
            for name in self._can_record_outputs
        )
        trains = torch.is_grad_enabled() and (
            hidden_states.requires_grad or any(x.requires_grad for x in self.parameters())
        )
        shares = None if records else share_frames(frames, self.nsa_group)
        begin, end = (0, len(frames) - 1) if shares is None else shares[self.nsa_group.rank()]
        chunks = [(begin, end)]
        if not (trains or records or _is_sharded(self.blocks)):
            free = free_memory(hidden_states.device)
            size = patch_bytes(self.config, self.dtype.itemsize)
            most = units_that_fit(PATCHES_PER_CHUNK, LEAST_PATCHES, size, free, PATCHES_SHARE)
            pieces = _chunks(frames[begin : end + 1], most)
            chunks = [(begin + first, begin + last) for first, last in pieces]
        outputs = []
        with contextlib.nullcontext() if trains else torch.no_grad():
            for first, last in chunks:
                start, stop = frames[first].item(), frames[last].item()
                inside = windows[(windows >= start) & (windows <= stop)]
                layout = make_layout(
                    index[start // unit : stop // unit] - start // unit,
                    inside.diff(),
                    frames[first : last + 1].diff(),
                    unit,
                    by_length=not records,
                )
                outputs.append(
                    self._encode(hidden_states[start:stop], positions[start:stop], layout, kwargs)
                )
        last, merged = zip(*outputs, strict=True)
        if len(outputs) == 1:
            last, merged = outputs[0]
        else:
            last, merged = torch.cat(last), torch.cat(merged)
        if shares is not None:
            patches = [int(frames[stop] - frames[start]) for start, stop in shares]
            last = gather_parts(last, patches, self.nsa_group)
            merged = gather_parts(merged, [count // unit for count in patches], self.nsa_group)
        return BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=merged)

    def _encode(self, pixels, positions, layout, kwargs):
        """The two outputs of `forward` for a chunk of whole frames."""
        layout = layout.to(pixels.device)

        def reorder(x, index):
            return x.unflatten(0, (-1, self.spatial_merge_unit))[index].flatten(0, 1)

        hidden_states = reorder(self.patch_embed(pixels), layout.order)
        angles = self.rotary_pos_emb(hidden_states, send(positions, pixels.device))
        angles = tuple(reorder(x, layout.order) for x in angles)
        for number, block in enumerate(self.blocks):
            full = number in self.fullatt_block_indexes
            hidden_states = block(
                hidden_states,
                cu_seqlens=None,
                position_embeddings=angles,
                sequences=layout.attention["frame" if full else "window"],
                **kwargs,
            )
        merged = self.merger(hidden_states)[layout.tokens]
        return reorder(hidden_states, layout.windows), merged


def _chunks(frames, most):
    """Ranges of frames: as few as hold at most `most` patches each, of about one size.

    A small chunk takes the host longer than the GPU. frames int64 [frames + 1]: cumulative patches.
    """
    chunks, first = [], 0
    bounds = frames.tolist()
    while first < len(bounds) - 1:
        left = bounds[-1] - bounds[first]
        share = left / -(-left // most)
        last = first + 1
        while bounds[last] - bounds[first] < share:
            if bounds[last + 1] - bounds[first] > most:
                break
            last += 1
        chunks.append((first, last))
        first = last
    return chunks


def _is_plain(module, kind):
    """Whether `module` is a `kind` on CUDA without adapter or hook, so its weight can be read.

    ZeRO-3 (`ds_id`) and offloading fetch a weight when its module is called, and not before.
    """
    return (
        type(module) is kind
        and not _is_quantized(module)
        and module.weight.is_cuda
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not hasattr(module.weight, "ds_id")
    )


def _is_quantized(module):
    """Whether a layer's weight is no plain tensor of floats, whatever the class of the layer."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return False
    return type(weight) not in (nn.Parameter, torch.Tensor) or not weight.is_floating_point()


def _is_sharded(blocks):
    """Whether calling a block gathers weights: then every process must call it equally often."""
    names = {base.__name__ for block in blocks for base in type(block).__mro__}
    return bool(names & {"FSDPModule", "FullyShardedDataParallel"}) or any(
        hasattr(weight, "ds_id") for weight in blocks.parameters()
    )
