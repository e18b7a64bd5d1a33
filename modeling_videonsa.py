"""VideoNSA: Qwen2.5-VL whose language model attends to vision tokens through three sparse branches.

Only what differs from Qwen2.5-VL stands here:

- `VideoNSAAttention`: vision rows through `nsa_attention`, text rows through `dense_attention`. A
  call without new vision tokens (text, decoding) runs the stock attention, untouched.
- `VideoNSATextModel`: lays out which rows are which (`NSAPlan`), once for all layers.
- `VideoNSAModel`: finds the vision tokens, gives every token its position, and keeps what a later
  turn needs of both (`NSAState`) with the cache, so that one model serves many conversations.
- `VideoNSAForConditionalGeneration`: what `generate` needs beyond that.

What the branches compute is specified in nsa_reference.py.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.masking_utils import create_masks_for_generate
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLAttention,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLPreTrainedModel,
    Qwen2_5_VLTextModel,
)
from transformers.utils import logging

from .configuration_videonsa import VideoNSAConfig, VideoNSATextConfig
from .fused_videonsa import VideoNSAMLP, VideoNSARMSNorm, rotary
from .nsa_reference import gate_weights
from .vision_videonsa import VideoNSAVisionTower

try:
    from transformers.conversion_mapping import (
        WeightRenaming,
        register_checkpoint_conversion_mapping,
    )
except ImportError:
    register_checkpoint_conversion_mapping = None

logger = logging.get_logger(__name__)

MEDIA = {"image": "pixel_values", "video": "pixel_values_videos"}

# Tokens of a longer prompt with media that `generate` reads at a time.
PREFILL_CHUNK_SIZE = 16384


class NSAPlan(NamedTuple):
    """Which rows of a batch [B, S] are which, for every layer of one forward pass.

    Rows are an index of [B, S, ...] that gives [rows, ...]: a pair of tensors, (batch, position in
    the cache), or where they follow each other in one batch row its number and a slice, which
    copies nothing. Queries count from the first new token. The cumulative lengths are int32
    [samples + 1].
    """

    num_queries: int  # S, new tokens per batch row
    num_keys: int  # cached and new tokens per batch row
    vision_queries: tuple
    vision_keys: tuple
    cu_vision_queries: torch.Tensor
    cu_vision_keys: torch.Tensor
    text_queries: tuple
    text_positions: torch.Tensor  # of each text query among its sample's keys
    all_keys: tuple
    cu_text_queries: torch.Tensor
    cu_all_keys: torch.Tensor


def make_plan(vision, num_queries, valid=None, sample=None):
    """Lay out a batch.

    vision bool [B, L]: the vision tokens among the cached and the `num_queries` new ones.
    valid bool [B, L]: no padding; everything by default.
    sample int64 [B, L]: which sample a token belongs to, ascending; a batch row each by default.
    """
    rows, num_keys = vision.shape
    if valid is None:
        valid = torch.ones_like(vision)
    if sample is None:
        sample = torch.arange(rows, device=vision.device)[:, None].expand(rows, num_keys)
    num_samples = int(sample.max()) + 1
    new = torch.arange(num_keys, device=vision.device) >= num_keys - num_queries

    def find(mask):
        found = mask.nonzero(as_tuple=True)
        counts = torch.bincount(sample[found], minlength=num_samples)
        return found, nn.functional.pad(counts.cumsum(0), (1, 0)).int()

    def rows_of(found, first=0):
        batch, position = found[0], found[1] - first
        if rows == 1 and len(position) and position[-1] - position[0] + 1 == len(position):
            return 0, slice(int(position[0]), int(position[-1]) + 1)
        return batch, position

    vision_keys, cu_vision_keys = find(vision & valid)
    vision_queries, cu_vision_queries = find(vision & valid & new)
    text_queries, cu_text_queries = find(~vision & valid & new)
    all_keys, cu_all_keys = find(valid)
    rank = valid.flatten().cumsum(0).view_as(valid) - 1
    return NSAPlan(
        num_queries=num_queries,
        num_keys=num_keys,
        vision_queries=rows_of(vision_queries, first=num_keys - num_queries),
        vision_keys=rows_of(vision_keys),
        cu_vision_queries=cu_vision_queries,
        cu_vision_keys=cu_vision_keys,
        text_queries=rows_of(text_queries, first=num_keys - num_queries),
        text_positions=rank[text_queries] - cu_all_keys[sample[text_queries]],
        all_keys=rows_of(all_keys),
        cu_text_queries=cu_text_queries,
        cu_all_keys=cu_all_keys,
    )


@dataclass
class NSAState:
    """What a cache remembers of its first n tokens; tokens after those are text.

    vision bool [B, n]: which are vision tokens.
    reach int64 [B, n]: the largest position, over time, height and width, up to each token.
    """

    vision: torch.Tensor
    reach: torch.Tensor

    def until(self, length, valid=None):
        """The state of exactly the first `length` tokens; valid bool [B, >= length] or None."""
        known = min(length, self.vision.shape[1])
        text = self.vision.new_ones(len(self.vision), length - known)
        text = text if valid is None else valid[:, known:length]
        nowhere = self.reach.new_full((len(self.reach), 1), -1)
        last = self.reach[:, known - 1 : known] if known else nowhere
        return NSAState(
            torch.cat([self.vision[:, :known], torch.zeros_like(text)], dim=1),
            torch.cat([self.reach[:, :known], last + text.long().cumsum(1)], dim=1),
        )

    def followed_by(self, vision, reach):
        """The state of these tokens and of new ones."""
        reach = torch.cat([self.reach, reach], dim=1).cummax(1).values
        return NSAState(torch.cat([self.vision, vision], dim=1), reach)


class VideoNSAAttention(Qwen2_5_VLAttention):
    """Qwen2.5-VL's attention with gates, and a sparse path for calls that bring an `NSAPlan`."""

    def __init__(self, config: VideoNSATextConfig, layer_idx: int | None = None):
        super().__init__(config, layer_idx)
        self.g_proj_1 = nn.Linear(self.hidden_size, self.hidden_size)
        self.g_proj_2 = nn.Linear(self.hidden_size, self.num_heads * 3)

    def gates(self, hidden_states):
        """Weights of the compressed, selected and window branch, [..., hidden] to [..., H, 3]."""
        logits = self.g_proj_2(nn.functional.gelu(self.g_proj_1(hidden_states)))
        return gate_weights(logits, self.config.nsa_gate_temperature)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        nsa_plan: NSAPlan | None = None,
        **kwargs,
    ):
        """hidden_states [B, S, hidden] to ([B, S, hidden], attention weights or None)."""
        cache = _cache(kwargs)
        if getattr(cache, "offloading", False):
            # As newer caches do by themselves: fetch a layer only once it is stored.
            cache.prefetch_stream.wait_stream(torch.cuda.current_stream(hidden_states.device))
        if nsa_plan is None:
            output, weights = super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            if self.training:
                # Distributed training wants every parameter in every graph, a text-only one too.
                output = output + 0 * self.gates(hidden_states[:, :1]).sum()
            return output, weights

        heads = (*hidden_states.shape[:2], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        query, key = (rotary(x, *position_embeddings) for x in (query, key))
        if cache is not None:
            # Contiguous, because a cache that grows copies other views at a quarter of the speed.
            key, value = cache.update(key.contiguous(), value.contiguous(), self.layer_idx)
        if query.shape[2] != nsa_plan.num_queries or key.shape[2] < nsa_plan.num_keys:
            raise ValueError(
                f"layer {self.layer_idx} got {query.shape[2]} queries and {key.shape[2]} keys, but "
                f"its vision tokens were found among {nsa_plan.num_queries} and "
                f"{nsa_plan.num_keys}: something cut the sequence into shards, which the sparse "
                "attention does not support. Turn context or sequence parallelism off."
            )
        gates = self.gates(hidden_states[nsa_plan.vision_queries])
        device = query.device.type
        # As torch's own attention does: one dtype for all, and softmax in float32 under autocast.
        dtype = query.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            output = self._attend(*(x.to(dtype) for x in (query, key, value, gates)), nsa_plan)
        return self.o_proj(output.flatten(2)), None

    def _attend(self, query, key, value, gates, plan):
        """query [B, H, S, D], key and value [B, K, L, D]; returns [B, S, H, D], padding zero."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        output = torch.zeros_like(query)
        output[plan.vision_queries] = self.attend_sparse(query, key, value, gates, plan)
        output[plan.text_queries] = self.attend_dense(query, key, value, plan)
        return output

    def attend_sparse(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        gates: torch.Tensor,
        plan: NSAPlan,
    ) -> torch.Tensor:
        """The output of the vision rows: three sparse branches over vision keys, weighted by gates.

        query [B, S, H, D]; key and value [B, L, K, D], cached and new; gates [N, H, 3] as `gates`
        returns them, for the N rows of `plan.vision_queries`. Returns [N, H, D] in their order;
        `plan.cu_vision_queries` says how many of them each sample has.
        """
        config = self.config
        nsa_attention, _ = attention_functions(config.nsa_backend, query.device)
        return nsa_attention(
            query[plan.vision_queries],
            key[plan.vision_keys],
            value[plan.vision_keys],
            gates,
            plan.cu_vision_queries,
            plan.cu_vision_keys,
            block_size=config.nsa_block_size,
            num_selected=config.nsa_num_selected_blocks,
            window_size=config.nsa_window_size,
            num_initial=config.nsa_num_initial_blocks,
            num_local=config.nsa_num_local_blocks,
            scale=self.scaling,
        )

    def attend_dense(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: NSAPlan
    ) -> torch.Tensor:
        """The output of the text rows, over all earlier keys; shapes as for `attend_sparse`."""
        _, dense_attention = attention_functions(self.config.nsa_backend, query.device)
        return dense_attention(
            query[plan.text_queries],
            key[plan.all_keys],
            value[plan.all_keys],
            plan.text_positions,
            plan.cu_text_queries,
            plan.cu_all_keys,
            scale=self.scaling,
        )


class VideoNSATextModel(Qwen2_5_VLTextModel):
    """Qwen2.5-VL's language model over `VideoNSAAttention`, in the stock decoder layers."""

    config: VideoNSATextConfig
    config_class = VideoNSATextConfig
    _supports_attention_backend = False
    _supports_context_parallel = False

    def __init__(self, config: VideoNSATextConfig):
        super().__init__(config)
        _refuse_foreign_attention(config)
        self.norm = VideoNSARMSNorm(config.hidden_size, config.rms_norm_eps)
        for index, layer in enumerate(self.layers):
            layer.self_attn = VideoNSAAttention(config, index)
            layer.mlp = VideoNSAMLP(config)
            layer.input_layernorm = VideoNSARMSNorm(config.hidden_size, config.rms_norm_eps)
            layer.post_attention_layernorm = VideoNSARMSNorm(
                config.hidden_size, config.rms_norm_eps
            )
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        nsa_vision: torch.Tensor | None = None,
        **kwargs,
    ):
        """Stock, but for nsa_vision bool [B, L], the vision among the cached and the new tokens."""
        if inputs_embeds is None:  # as in stock, vision tokens come as embeddings
            return super().forward(input_ids, attention_mask, position_ids, **kwargs)
        call = {"inputs_embeds": inputs_embeds, "position_ids": position_ids, **kwargs}
        new = inputs_embeds.shape[1]
        if nsa_vision is None or not nsa_vision[:, -new:].any():
            return super().forward(attention_mask=attention_mask, **call)

        _refuse_paged_cache(_cache(kwargs))
        if not self.config.nsa_enabled:
            return super().forward(attention_mask=attention_mask, **call)
        _refuse_foreign_attention(self.config)
        plan = make_plan(
            nsa_vision,
            new,
            valid=_valid_tokens(attention_mask, nsa_vision.shape[1]),
            sample=_packed_samples(attention_mask, position_ids, _cache(kwargs)),
        )
        # The plan stands for the mask, and a mask over all pairs of tokens would be enormous.
        return super().forward(attention_mask={"full_attention": None}, nsa_plan=plan, **call)


class MediaFeatures:
    """Features of images or videos, [tokens, hidden], encoded when a slice of them is read.

    encode: `get_image_features` or `get_video_features` of the model.
    pixels: the rows that it takes, a tensor or a `PixelStream`; they may lie on another device.
    grid: int64 [media, 3], patches over time, height and width.
    patches: of a token.
    device: where to encode.
    """

    def __init__(self, encode, pixels, grid, patches, device):
        self.encode, self.pixels, self.grid = encode, pixels, grid.tolist()
        self.patches, self.device = patches, device

    def __len__(self):
        return sum(time * height * width for time, height, width in self.grid) // self.patches

    def __getitem__(self, tokens):
        """Encodes the temporal steps that hold these tokens; frames do not see each other."""
        first, last, _ = tokens.indices(len(self))
        grid, before, done = [], 0, 0  # tokens before those steps; tokens of earlier media
        for time, height, width in self.grid:
            step = height * width // self.patches
            start = max((first - done) // step, 0)
            end = min(-((done - last) // step), time)
            if start < end:
                before = before if grid else done + start * step
                grid.append([end - start, height, width])
            done += time * step
        row = before * self.patches
        rows = sum(time * height * width for time, height, width in grid)
        pixels = self.pixels[row : row + rows].to(self.device)
        grid = torch.tensor(grid, device=pixels.device)
        features = torch.cat(self.encode(pixels, grid, return_dict=True).pooler_output)
        return features[first - before : last - before]


class VideoNSAModel(Qwen2_5_VLModel):
    """Qwen2.5-VL's vision tower and a `VideoNSATextModel`."""

    config: VideoNSAConfig
    config_class = VideoNSAConfig
    _supports_attention_backend = False
    _supports_context_parallel = False

    def __init__(self, config: VideoNSAConfig):
        # Not the parent's, which would build a dense language model first.
        Qwen2_5_VLPreTrainedModel.__init__(self, config)
        self.visual = VideoNSAVisionTower._from_config(config.vision_config)
        self.language_model = VideoNSATextModel._from_config(config.text_config)
        self.rope_deltas = None  # stock keeps state here; ours is with the cache
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        nsa_chunk_size: int | None = None,
        **kwargs,
    ):
        """Stock, but for two arguments; those that are not listed are passed on as they are.

        pixel_values_videos: a tensor, or a `PixelStream` of the processor.
        nsa_chunk_size: encode the media and pass the new tokens through the layers in chunks of
            this many tokens, onto the cache, so that memory does not grow with the prompt. The
            result is that of one pass; the hidden states returned are the last chunk's.
        """
        cache = _cache(kwargs)
        tokens = inputs_embeds if input_ids is None else input_ids
        length = 0 if cache is None else cache.get_seq_length()
        if tokens.shape[1] > 1 and not torch.compiler.is_compiling():
            length = int(length)  # a static cache counts on the device, which may take its time
        state = getattr(cache, "nsa_state", None)
        if isinstance(length, int) and state is not None and length < state.vision.shape[1]:
            # The cache was cropped into what the state describes, or reset.
            state = cache.nsa_state = state.until(length) if length else None

        vision = self._vision_tokens(input_ids, inputs_embeds, mm_token_type_ids, kwargs)
        if vision is not None or (position_ids is None and state is not None):
            length = int(length)
            valid = _valid_tokens(attention_mask, length + tokens.shape[1])
            state = _state_until(state, length, valid, tokens)
            if position_ids is None:
                position_ids = self.vision_position_ids(
                    input_ids,
                    _text_positions(tokens, length, valid),
                    state,
                    valid,
                    image_grid_thw=image_grid_thw if vision is not None else None,
                    video_grid_thw=video_grid_thw if vision is not None else None,
                    second_per_grid_ts=second_per_grid_ts,
                )
        if vision is not None:
            reach = position_ids[-3:].amax(0) if position_ids.ndim == 3 else position_ids
            state = state.followed_by(vision, reach.expand(len(vision), -1))
            kwargs["nsa_vision"] = state.vision
            if cache is not None:
                # Before the cache is filled: an interrupted call leaves a part of it, which counts.
                cache.nsa_state = state

        call = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "image_grid_thw": image_grid_thw,
            "video_grid_thw": video_grid_thw,
            **kwargs,
        }
        if nsa_chunk_size is not None and tokens.shape[1] > nsa_chunk_size:
            outputs = self._forward_in_chunks(nsa_chunk_size, length, **call)
        else:
            for pixels in MEDIA.values():
                if call.get(pixels) is not None and not torch.is_tensor(call[pixels]):
                    call[pixels] = call[pixels][:].to(tokens.device)
            outputs = super().forward(
                mm_token_type_ids=mm_token_type_ids, second_per_grid_ts=second_per_grid_ts, **call
            )
        if vision is not None and (cache := _cache(outputs)) is not None:
            cache.nsa_state = state
        return outputs

    def _forward_in_chunks(
        self,
        size,
        past,
        input_ids=None,
        inputs_embeds=None,
        attention_mask=None,
        position_ids=None,
        nsa_vision=None,
        **kwargs,
    ):
        if _cache(kwargs) is None:
            raise ValueError(
                "the prompt cannot be read in chunks without a cache: leave use_cache on, or unset "
                "prefill_chunk_size."
            )
        tokens = inputs_embeds if input_ids is None else input_ids
        media = self._media_features(input_ids, inputs_embeds, tokens.device, kwargs)
        for start in range(0, tokens.shape[1], size):
            end = min(start + size, tokens.shape[1])
            if inputs_embeds is None:
                embeds = self.get_input_embeddings()(input_ids[:, start:end])
            else:
                embeds = inputs_embeds[:, start:end]
            for placeholders, features in media:
                here = placeholders[:, start:end]
                if here.any():
                    embeds = embeds.masked_scatter(
                        here[..., None],
                        _rows_of_features(placeholders, features, start, end, embeds),
                    )
            outputs = super().forward(
                inputs_embeds=embeds,
                attention_mask=_mask_of_chunk(attention_mask, start, end, past),
                position_ids=None if position_ids is None else position_ids[..., start:end],
                nsa_vision=None if nsa_vision is None else nsa_vision[:, : past + end],
                **kwargs,
            )
        return outputs

    def _media_features(self, input_ids, inputs_embeds, device, kwargs):
        """Pairs of placeholders, bool [B, S], and their features, [tokens, hidden] by slices.

        Takes what describes the media out of kwargs.
        """
        given = kwargs.pop("mm_encoder_outputs", None) or {}
        encode = {"image": self.get_image_features, "video": self.get_video_features}
        media = []
        for modality, pixels in MEDIA.items():
            pixels, grid = kwargs.pop(pixels, None), kwargs.pop(f"{modality}_grid_thw", None)
            if given.get(modality) is not None:
                features = torch.cat(given[modality].pooler_output)
            elif pixels is not None:
                merged = self.visual.spatial_merge_size**2
                features = MediaFeatures(encode[modality], pixels, grid, merged, device)
            else:
                continue
            if input_ids is None:
                masks = self.get_placeholder_mask(None, inputs_embeds=inputs_embeds)
                placeholders = masks[list(MEDIA).index(modality)].squeeze(-1)
            else:
                placeholders = input_ids == getattr(self.config, f"{modality}_token_id")
            if placeholders.sum() != len(features):
                raise ValueError(
                    f"{modality.capitalize()} features and {modality} tokens do not match, tokens: "
                    f"{int(placeholders.sum())}, features: {len(features)}"
                )
            if len(placeholders) > 1 and isinstance(features, MediaFeatures):
                features.pixels = features.pixels[:]  # batch rows take turns, a stream does not
            media.append((placeholders, features))
        return media

    def _vision_tokens(self, input_ids, inputs_embeds, mm_token_type_ids, kwargs):
        """bool [B, S]: the placeholders of the modalities in nsa_modalities; None without any.

        A call without images, videos or their features holds none, whatever its ids: a generated
        or guessed placeholder is text.
        """
        has_media = any(kwargs.get(pixels) is not None for pixels in MEDIA.values()) or any(
            output is not None for output in (kwargs.get("mm_encoder_outputs") or {}).values()
        )
        if not has_media and (inputs_embeds is None or inputs_embeds.shape[1] == 1):
            return None
        ids = {"image": self.config.image_token_id, "video": self.config.video_token_id}
        modalities = self.config.text_config.nsa_modalities
        if input_ids is not None:
            masks = [input_ids == ids[modality] for modality in modalities]
        elif mm_token_type_ids is not None:
            types = {"image": 1, "video": 2}
            masks = [mm_token_type_ids == types[modality] for modality in modalities]
        elif has_media:
            image, video = self.get_placeholder_mask(None, inputs_embeds=inputs_embeds)
            found = {"image": image.squeeze(-1), "video": video.squeeze(-1)}
            masks = [found[modality] for modality in modalities]
        else:
            logger.warning_once(
                "inputs_embeds came without input_ids and without mm_token_type_ids: every token "
                "is taken for text and attends densely. Pass mm_token_type_ids to say which are "
                "images (1) and videos (2)."
            )
            return None
        return functools.reduce(torch.logical_or, masks)

    def vision_position_ids(self, input_ids, text_positions, state, valid, **media):
        """Positions of the new tokens over time, height and width, int64 [3, B, S].

        text_positions [B or 1, S] are those of a model without vision; state is the `NSAState` of
        the cached tokens, valid bool [B, L] or None; media are the new images' and videos' grids
        and seconds as `get_rope_index` takes them. New text goes on where the cached tokens end.
        """
        length = state.vision.shape[1]
        cached = length if valid is None else valid[:, :length].sum(1, keepdim=True)
        start = state.reach[:, -1:] + 1 if length else 0
        grids = [media.get(f"{modality}_grid_thw") for modality in MEDIA]
        if input_ids is None or all(grid is None for grid in grids):
            return text_positions.expand(3, -1, -1) + (start - cached)
        mask = None if valid is None else valid[:, length:]
        return self.get_rope_index(input_ids, attention_mask=mask, **media)[0] + start

    def get_rope_index(
        self,
        input_ids: torch.Tensor,
        mm_token_type_ids: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ):
        """Positions as Qwen2.5-VL was trained with them.

        Two things differ from the library's own: the text after an image or video starts past its
        largest position, time included, and seconds are not cut to whole ones.
        Returns int64 [3, B, S], zero at padding, and the deltas [B, 1] between the position after
        the last token and the number of tokens.
        """
        grids = {
            self.config.image_token_id: _rows(image_grid_thw),
            self.config.video_token_id: _rows(video_grid_thw),
        }
        seconds = iter([] if second_per_grid_ts is None else second_per_grid_ts)
        positions = torch.zeros(3, *input_ids.shape, dtype=torch.long, device=input_ids.device)
        deltas = []
        for row, ids in enumerate(input_ids):
            kept = torch.ones_like(ids, dtype=torch.bool)
            if attention_mask is not None:
                kept = attention_mask[row].bool()
            spans = self._position_spans(ids[kept], grids, seconds)
            positions[:, row, kept] = torch.cat(spans, dim=1).to(positions.device)
            deltas.append(positions[:, row].max() + 1 - kept.sum())
        return positions, torch.stack(deltas)[:, None]

    def _position_spans(self, ids, grids, seconds):
        """The positions of one sample without padding: [3, n] for each run of text, each medium."""
        kinds = torch.zeros_like(ids)
        for token_id in grids:
            kinds[ids == token_id] = token_id
        kinds, counts = torch.unique_consecutive(kinds, return_counts=True)
        spans, start = [torch.empty(3, 0, dtype=torch.long, device=ids.device)], 0
        for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True):
            while count > 0:
                if kind in grids:
                    grid = next(grids[kind], None)
                    if grid is None:
                        raise ValueError(
                            f"input_ids hold {count} tokens with id {kind} that no grid accounts "
                            "for. Pass the image_grid_thw and video_grid_thw of every placeholder, "
                            "as the processor returns them with input_ids."
                        )
                    is_video = kind == self.config.video_token_id
                    span = self._medium_positions(grid, next(seconds, 1.0) if is_video else None)
                else:
                    span = torch.arange(count)[None].expand(3, -1)
                span = span.to(ids.device)
                spans.append(span + start)
                start += int(span.max()) + 1
                count -= span.shape[1]
        return spans

    def _medium_positions(self, grid, second_per_grid):
        """[3, t * h * w] of one image (without seconds) or video, from its patch grid."""
        vision = self.config.vision_config
        time, height, width = grid
        height, width = height // vision.spatial_merge_size, width // vision.spatial_merge_size
        step = 1 if second_per_grid is None else vision.tokens_per_second * second_per_grid
        axes = (
            (torch.arange(time) * torch.as_tensor(step, device="cpu")).long(),
            torch.arange(height),
            torch.arange(width),
        )
        return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)


class VideoNSAForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with learned sparse attention over vision tokens (VideoNSA, arXiv 2510.02295)."""

    config: VideoNSAConfig
    config_class = VideoNSAConfig
    _supports_attention_backend = False
    _supports_context_parallel = False

    def __init__(self, config: VideoNSAConfig):
        Qwen2_5_VLPreTrainedModel.__init__(self, config)
        self.model = VideoNSAModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    @functools.wraps(GenerationMixin.generate)
    def generate(self, inputs=None, *args, **kwargs):
        # With a filled cache and the whole conversation as input, the media of earlier turns are
        # in the cache already.
        input_ids = kwargs.get("input_ids", inputs)
        if (cache := _cache(kwargs)) is not None and input_ids is not None:
            self._drop_cached_media(input_ids, int(cache.get_seq_length()), kwargs)
        return super().generate(inputs, *args, **kwargs)

    def _drop_cached_media(self, input_ids, length, kwargs):
        mask = kwargs.get("attention_mask")
        if not length or (mask is not None and mask.shape[1] != input_ids.shape[1]):
            return  # nothing cached, or only the new tokens were passed
        for modality, pixels in MEDIA.items():
            grid = kwargs.get(f"{modality}_grid_thw")
            if grid is None or kwargs.get(pixels) is None:
                continue
            placeholder = input_ids == getattr(self.config, f"{modality}_token_id")
            cached, new = placeholder[:, :length].sum(1), placeholder[:, length:].sum(1)
            patches = grid.prod(-1)
            tokens = patches // self.config.vision_config.spatial_merge_size**2
            if tokens.sum() == new.sum():
                continue  # only the new turn's were passed
            # Media come in the order of their placeholders: a row's cached ones, its new ones.
            bounds = torch.stack([cached, new], dim=1).flatten().cumsum(0)
            ends = tokens.cumsum(0).to(bounds.device)
            whole = torch.isin(bounds, nn.functional.pad(ends, (1, 0))).all()
            if not whole or ends[-1] != bounds[-1]:
                raise ValueError(
                    f"the {modality}s given have {int(ends[-1])} tokens; input_ids hold "
                    f"{int(cached.sum())} placeholders in the cached part and {int(new.sum())} "
                    "after it. Pass either all of the conversation's or only the new turn's, and "
                    "a cache that does not end within one of them."
                )
            keep = torch.searchsorted(bounds, ends) % 2 == 1
            _keep_media(kwargs, modality, keep, patches)

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        # Positions of every token so far, [4, B, L]: as text, then over time, height and width.
        # Those of cached tokens are not read again.
        text = GenerationMixin._prepare_position_ids_for_generation(
            self, inputs_tensor, model_kwargs
        )
        input_ids = model_kwargs.get("input_ids")
        if input_ids is None and inputs_tensor.ndim == 2:
            input_ids = inputs_tensor
        if input_ids is not None and not input_ids.shape[1]:
            input_ids = None  # embeddings alone: their positions are those of text, as in stock
        cache = _cache(model_kwargs)
        length = 0 if cache is None else int(cache.get_seq_length())
        new = text.shape[1] - length
        valid = _valid_tokens(model_kwargs.get("attention_mask"), text.shape[1])
        state = _state_until(getattr(cache, "nsa_state", None), length, valid, inputs_tensor)
        vision = self.model.vision_position_ids(
            None if input_ids is None else input_ids[:, -new:],
            text[:, length:],
            state,
            valid,
            image_grid_thw=model_kwargs.get("image_grid_thw"),
            video_grid_thw=model_kwargs.get("video_grid_thw"),
            second_per_grid_ts=model_kwargs.get("second_per_grid_ts"),
        )
        vision = nn.functional.pad(vision, (length, 0))
        return torch.cat([text.expand(vision.shape[1], -1)[None], vision])

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor, model_kwargs, model_input_name, generation_config
    ):
        # The library would encode all media before the prompt is read. Several sequences of one
        # prompt share what was encoded; one sequence has its media encoded as it is read.
        if (generation_config.num_beams or 1) * (generation_config.num_return_sequences or 1) == 1:
            return model_kwargs
        return super()._maybe_prepare_encoder_kwargs_for_generation(
            inputs_tensor, model_kwargs, model_input_name, generation_config
        )

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, **kwargs):
        """The mask that `generate` lays out for a static cache: the library's, for one new token.

        A prompt keeps its padding mask [B, L]: one of all pairs of its tokens would be enormous,
        vision needs none, and text lays out its own, a chunk at a time.
        """
        if inputs_embeds.shape[1] > 1:
            return attention_mask
        return create_masks_for_generate(
            config=config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs
        )

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        # The library would cut the prompt before its media are encoded; the model encodes and
        # reads chunk by chunk, in every version of the library.
        size = generation_config.prefill_chunk_size
        if size is not None:
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
        elif _cache(model_kwargs) is not None and not (
            generation_config.output_hidden_states or generation_config.output_attentions
        ):
            if any(model_kwargs.get(pixels) is not None for pixels in MEDIA.values()):
                size = PREFILL_CHUNK_SIZE
        if size is not None:
            model_kwargs = {**model_kwargs, "nsa_chunk_size": size}
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)

    def save_pretrained(self, *args, **kwargs):
        """Stock, with the keys of the state dict: other keys would not resume in the Trainer."""
        kwargs.setdefault("save_original_format", False)
        return super().save_pretrained(*args, **kwargs)


def _rows_of_features(placeholders, features, start, end, like):
    """The features of the placeholders from column start to end, row after row."""
    counts = placeholders.sum(1)
    firsts = counts.cumsum(0) - counts + placeholders[:, :start].sum(1)
    lasts = firsts + placeholders[:, start:end].sum(1)
    pieces = [
        features[first:last].to(like.device, like.dtype)
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)
        if last > first
    ]
    return torch.cat(pieces)


def _cache(container):
    """The key/value cache among keyword arguments or outputs, by its old or its new name."""
    # Not by asking for it: newer outputs warn of the old name, even where it is not there.
    names = ("cache", "past_key_values")
    return next((x for name, x in container.items() if name in names and x is not None), None)


def _rows(grid):
    """An iterator over the [t, h, w] lists of a grid tensor, or over nothing."""
    return iter([] if grid is None else grid.tolist())


def _valid_tokens(attention_mask, length):
    """bool [B, length], False at padding; None where nothing is padded.

    The mask may be 2-D [B, length], or 4-D as the library makes it for static caches, whose last
    query sees every token that is not padding.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask["full_attention"]
    if attention_mask is None:
        return None
    if attention_mask.ndim == 4:
        seen = attention_mask[:, 0, -1, :length]
        return seen if seen.dtype == torch.bool else seen == 0
    if attention_mask.shape[1] != length:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} tokens, but the cached and the new "
            f"ones are {length}. It needs a column for each."
        )
    return attention_mask.bool()


def _text_positions(tokens, length, valid):
    """int64 [B, S]: what the new tokens' positions would be without vision."""
    if valid is None:
        new = torch.arange(length, length + tokens.shape[1], device=tokens.device)
        return new[None].expand(tokens.shape[0], -1)
    return (valid.long().cumsum(1) - 1).clamp(min=0)[:, length:]


def _state_until(state, length, valid, tokens):
    """The `NSAState` of a cache's first `length` tokens, one without a state holding only text."""
    if state is None or length == 0:
        none = torch.zeros(tokens.shape[0], 0, dtype=torch.long, device=tokens.device)
        state = NSAState(none.bool(), none)
    return state.until(length, valid)


def _keep_media(kwargs, modality, keep, patches):
    """Drop the images or videos that bool `keep` does not mark; `patches` are their sizes."""
    pixels, grid = MEDIA[modality], f"{modality}_grid_thw"
    if not keep.any():
        del kwargs[pixels], kwargs[grid]
        return
    if not torch.is_tensor(kwargs[pixels]):
        raise ValueError(
            f"{pixels} is a stream of all {modality}s of the conversation, and the cache has some "
            "of them. Make a stream of the new turn's alone, or a tensor (without stream=True)."
        )
    rows = keep.repeat_interleave(patches.to(keep.device))
    kwargs[pixels] = kwargs[pixels][rows.to(kwargs[pixels].device)]
    kwargs[grid] = kwargs[grid][keep.to(kwargs[grid].device)]
    if modality == "video" and kwargs.get("second_per_grid_ts") is not None:
        seconds = torch.as_tensor(kwargs["second_per_grid_ts"])
        kwargs["second_per_grid_ts"] = seconds[keep.to(seconds.device)]


def _packed_samples(attention_mask, position_ids, cache):
    """int64 [B, S], the sample of each token where positions restart within a row, else None.

    The library's rule: without a mask and without a cache, row 0 of [4, B, S] position ids that
    does not go up by one starts a new sample.
    """
    if attention_mask is not None or cache is not None or position_ids is None:
        return None
    if position_ids.ndim != 3 or position_ids.shape[0] != 4:
        return None
    starts = torch.ones_like(position_ids[0], dtype=torch.bool)
    starts[:, 1:] = position_ids[0].diff(dim=-1) != 1
    starts[0, 0] = False  # samples count from zero
    return starts.flatten().cumsum(0).view_as(starts)


def _mask_of_chunk(attention_mask, start, end, past):
    """The mask for the new tokens from start to end, in whichever form the whole came."""
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask["full_attention"]
    if attention_mask is None:  # also where the library left a causal mask out, whole as it was
        return None
    if attention_mask.ndim == 4:
        return {"full_attention": attention_mask[:, :, start:end]}
    return attention_mask[:, : past + end]


def attention_functions(backend: str, device: torch.device) -> tuple[Callable, Callable]:
    """(nsa_attention, dense_attention) of a backend; "auto" is Triton on a CUDA device."""
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        from .nsa_kernels import dense_attention, nsa_attention
    else:
        from .nsa_reference import dense_attention, nsa_attention
    return nsa_attention, dense_attention


def _refuse_foreign_attention(config):
    implementation = config._attn_implementation or ""
    if implementation.startswith(("vllm", "sglang", "paged|")):
        raise ValueError(
            f"attn_implementation is {implementation!r}, which would run its own dense attention "
            "in place of VideoNSA's sparse one. Use 'sdpa', 'eager' or a flash attention (they "
            "serve text and decoding), and generate() for serving."
        )


def _refuse_paged_cache(cache):
    if "Paged" in type(cache).__name__:
        raise ValueError(
            f"a {type(cache).__name__} cannot hold images or videos of VideoNSA: continuous "
            "batching serves text only. Use generate() for prompts with images or videos."
        )


if register_checkpoint_conversion_mapping is not None:
    # Qwen2.5-VL's published checkpoints have `visual.*` and `model.*`; the library does not map
    # the keys of remote code by itself.
    register_checkpoint_conversion_mapping(
        "VideoNSAForConditionalGeneration",
        [
            WeightRenaming(source_patterns=r"^visual", target_patterns="model.visual"),
            WeightRenaming(
                source_patterns=r"^model(?!\.(language_model|visual))",
                target_patterns="model.language_model",
            ),
        ],
        overwrite=True,
    )

VideoNSAForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
