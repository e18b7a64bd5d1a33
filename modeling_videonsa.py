"""VideoNSA: Qwen2.5-VL whose language model attends to vision tokens through three sparse branches.

Only what differs from Qwen2.5-VL stands here:

- `VideoNSATextModel`: the language model, of `Qwen2_5_VLDecoderLayer`s over `VideoNSAAttention`
  (attention_videonsa.py). On a GPU `generate` records its decoding steps (decoding_videonsa.py).
- `VideoNSAModel`: finds the vision tokens, gives every token its position, lays the rows out, and
  reads long prompts in chunks. What a later turn needs is kept with the cache.
- `VideoNSAForConditionalGeneration`: the whole model, with `generate` of generation_videonsa.py,
  and `shard_sequences` for several processes (sharding_videonsa.py).

Which rows are which is found in packing_videonsa.py, positions are counted in
positions_videonsa.py, and images and videos are encoded piece by piece by
media_features_videonsa.py. What the branches compute is specified in nsa_reference.py.
"""

import functools

import torch
from torch import nn
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as stock
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLPreTrainedModel,
    Qwen2_5_VLTextModel,
)
from transformers.utils import can_return_tuple, logging

from .attention_videonsa import VideoNSAAttention
from .cache_videonsa import use_buffers
from .call_checks_videonsa import (
    check_cache,
    check_chunk_size,
    check_exact_cache,
    check_mask,
    check_media,
    check_pixels,
    check_positions,
    check_room,
    check_tokens,
    check_types,
    check_vocabulary,
)
from .configuration_videonsa import VideoNSAConfig, VideoNSATextConfig
from .decoding_videonsa import recorder_of
from .fused_videonsa import VideoNSAMLP, VideoNSARMSNorm
from .generation_videonsa import VideoNSAGenerationMixin
from .library_videonsa import (
    cache_of,
    kept_from_quantizers,
    map_published_keys,
    output_with_cache,
)
from .media_features_videonsa import (
    PIXELS,
    chunks_of,
    has_media,
    placeholders_of,
    put_features,
    take_media,
)
from .nsa_released import released_tokens
from .packing_videonsa import NSAPlan, make_plan, mask_of_chunk, packed_samples, valid_tokens
from .positions_videonsa import positions_of_new_tokens, rope_index, state_in, state_of
from .sharding_videonsa import check_same_call, checked_group, shard_plan
from .vision_videonsa import VideoNSAVisionTower

logger = logging.get_logger(__name__)


class Qwen2_5_VLDecoderLayer(stock.Qwen2_5_VLDecoderLayer):
    """Qwen2.5-VL's layer over `VideoNSAAttention`; its second norm adds the residual too.

    It keeps the stock name, by which device maps and FSDP's policies find the layers.
    """

    def __init__(self, config: VideoNSATextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = VideoNSAAttention(config, layer_idx)
        self.mlp = VideoNSAMLP(config)
        self.input_layernorm = VideoNSARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = VideoNSARMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """hidden_states [B, S, hidden] to the same; the attention takes the other arguments."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states, normed = self.post_attention_layernorm(attended, residual=hidden_states)
        return hidden_states + self.mlp(normed)


class VideoNSATextModel(Qwen2_5_VLTextModel):
    """Qwen2.5-VL's language model over `VideoNSAAttention`."""

    config: VideoNSATextConfig
    config_class = VideoNSATextConfig
    _supports_attention_backend = False
    _supports_context_parallel = False

    def __init__(self, config: VideoNSATextConfig):
        config.validate_nsa()
        super().__init__(config)
        _refuse_foreign_attention(config)
        self.nsa_group = None  # of processes that share out sequences: see `shard_sequences`
        self.norm = VideoNSARMSNorm(config.hidden_size, config.rms_norm_eps)
        for index in range(len(self.layers)):
            self.layers[index] = Qwen2_5_VLDecoderLayer(config, index)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        nsa_plan: NSAPlan | None = None,
        **kwargs,
    ):
        """Stock, but for nsa_plan, the layout of a call with new vision tokens.

        With a plan's shard, the layers run for its rows alone; what comes in and what is returned
        are all rows. A step of one token a row is replayed where `generate` has a recorder for it.
        """
        cache = cache_of(kwargs)
        use_buffers(cache)
        if nsa_plan is None and (recorder := recorder_of(self)) is not None:
            replayed = recorder.replay(inputs_embeds, position_ids, attention_mask, kwargs)
            if replayed is not None:
                return output_with_cache(replayed, cache)
        if nsa_plan is not None:
            _refuse_paged_cache(cache)
        if nsa_plan is not None and self.config.nsa_enabled:
            _refuse_foreign_attention(self.config)
            if kwargs.get("output_attentions", self.config.output_attentions):
                logger.warning_once(
                    "output_attentions has nothing to give for a call with images or videos: the "
                    "sparse attention computes no weights of all pairs of tokens."
                )
            # The plan stands for the mask, and one of all pairs of tokens would be enormous.
            attention_mask = {"full_attention": None}
            kwargs["nsa_plan"] = nsa_plan
        shard = None if "nsa_plan" not in kwargs else nsa_plan.shard
        if shard is not None:
            inputs_embeds = shard.take(inputs_embeds)
            position_ids = shard.take_positions(position_ids)
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return outputs if shard is None else shard.gather_outputs(outputs)


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
        self.rope_deltas = None  # always: stock reads it, but positions go on from an `NSAState`
        self._keep_in_fp32_modules = kept_from_quantizers(config.quantize_vision_tower)
        self.post_init()

    @can_return_tuple
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
            this many tokens (`chunks_of`), onto the cache, so that memory does not grow with the
            prompt. The result is that of one pass; the hidden states returned are the last chunk's.
        """
        call = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "image_grid_thw": image_grid_thw,
            "video_grid_thw": video_grid_thw,
            **kwargs,
        }
        cache = cache_of(kwargs)
        check_tokens(self.config, input_ids, inputs_embeds)
        check_chunk_size(nsa_chunk_size)
        tokens = inputs_embeds if input_ids is None else input_ids
        rows, new = tokens.shape[:2]
        group = self.language_model.nsa_group
        check_positions(position_ids, rows, new)
        check_cache(cache, rows)
        check_pixels(self.config, call)
        goes_on = position_ids is None and getattr(cache, "nsa_state", None) is not None
        cached = _cached_length(cache, new, wait=goes_on or has_media(call))
        check_room(cache, cached, new)
        if group is not None and new > 1:
            kinds = PIXELS.values(), (f"{kind}_grid_thw" for kind in PIXELS)
            media = [[call[x] for x in names if call.get(x) is not None] for names in kinds]
            check_same_call(group, tokens, int(cached), *media)
        if not getattr(cache, "is_compileable", False):  # a static cache takes masks of its length
            check_mask(attention_mask, rows, cached + new)
        if has_media(call) or _is_prompt(tokens, cached):
            check_vocabulary(self.config, input_ids)
            check_media(self, {**call, "mm_token_type_ids": mm_token_type_ids}, refuse=False)

        # State: which tokens are vision and which are padding, cached and new.
        state = state_in(cache, cached)  # None as long as there was only text
        vision = self._vision_tokens(mm_token_type_ids, call)
        valid = None
        if vision is not None or (state is not None and position_ids is None):
            cached = int(cached)
            check_mask(attention_mask, rows, cached + new)
            valid = valid_tokens(attention_mask, cached + new)
            state = state_of(cache, cached, valid, tokens)

        # Positions: those of the new tokens, after the largest of the cached ones.
        if position_ids is None and state is not None:
            position_ids = positions_of_new_tokens(
                self.config,
                state,
                new,
                valid,
                None if vision is None else input_ids,  # grids without media say nothing
                image_grid_thw=image_grid_thw,
                video_grid_thw=video_grid_thw,
                second_per_grid_ts=second_per_grid_ts,
            )
        if vision is not None and self.config.text_config.nsa_semantics == "released":
            vision = released_tokens(vision, position_ids, cached, nsa_chunk_size)
        if vision is not None:
            state = state.followed_by(vision, position_ids, valid)
            if cache is not None:
                # Before the cache is filled: an interrupted call leaves a part of it, which counts.
                cache.nsa_state = state

        # Run: in chunks, or whole.
        call["position_ids"] = position_ids
        seen = None if vision is None else state.vision
        if nsa_chunk_size is not None and new > nsa_chunk_size:
            return self._forward_in_chunks(nsa_chunk_size, int(cached), seen, valid, **call)
        for name in PIXELS.values():
            if call.get(name) is not None:
                call[name] = torch.as_tensor(call[name][:]).to(tokens.device)
        outputs = self._forward_whole(new, seen, valid, call)
        if vision is not None and (cache := cache_of(outputs)) is not None:
            cache.nsa_state = state  # the library may have made the cache
        return outputs

    def _forward_whole(self, new, vision, valid, call):
        """vision and valid bool [B, cached + new] or None; call: the arguments that stock takes."""
        if vision is None:
            return super().forward(return_dict=True, **call)
        sample = None
        if cache_of(call) is None:
            sample = packed_samples(call["attention_mask"], call["position_ids"])
        plan = self._make_plan(vision, new, valid, sample)
        return super().forward(nsa_plan=plan, return_dict=True, **call)

    def _forward_in_chunks(
        self,
        size,
        cached,
        vision,
        valid,
        input_ids=None,
        inputs_embeds=None,
        attention_mask=None,
        position_ids=None,
        **kwargs,
    ):
        """vision and valid bool [B, cached + new] or None; returns the last chunk's outputs."""
        cache = cache_of(kwargs)
        if cache is None:
            raise ValueError(
                "the prompt cannot be read in chunks without a cache: leave use_cache on, or unset "
                "prefill_chunk_size."
            )
        check_exact_cache(cache)
        media = take_media(self, input_ids, inputs_embeds, kwargs)
        tokens = inputs_embeds if input_ids is None else input_ids
        # Read once: the host prepares a chunk while the GPU runs the one before.
        vision, valid = (None if x is None else x.cpu() for x in (vision, valid))
        for start, end in chunks_of(tokens.shape[1], size):
            if inputs_embeds is None:
                embeds = self.get_input_embeddings()(input_ids[:, start:end])
            else:
                embeds = inputs_embeds[:, start:end]
            seen, present = (None if x is None else x[:, : cached + end] for x in (vision, valid))
            plan = None
            if seen is not None:
                plan = self._make_plan(seen, end - start, present, device=tokens.device)
            outputs = super().forward(
                inputs_embeds=put_features(embeds, media, start, end),
                attention_mask=mask_of_chunk(attention_mask, start, end, cache, cached),
                position_ids=None if position_ids is None else position_ids[..., start:end],
                nsa_plan=plan,
                return_dict=True,
                **kwargs,
            )
        return outputs

    def _make_plan(self, vision, new, valid, sample=None, device=None):
        """`make_plan`, or this process's part of it."""
        group, device = self.language_model.nsa_group, device or vision.device
        if group is None:
            return make_plan(vision, new, valid, sample, device)
        whole = make_plan(vision, new, valid, sample, device="cpu")
        return shard_plan(whole, len(vision), group, device)

    def _vision_tokens(self, mm_token_type_ids, call):
        """bool [B, S]: the placeholders of the modalities in nsa_modalities; None without any.

        A call without images, videos or their features holds none, whatever its ids: a generated
        or guessed placeholder is text.
        """
        input_ids, inputs_embeds = call["input_ids"], call["inputs_embeds"]
        given = has_media(call)
        if not given and (inputs_embeds is None or inputs_embeds.shape[1] == 1):
            return None
        if input_ids is None and mm_token_type_ids is not None:
            check_types(mm_token_type_ids, inputs_embeds)
            types = {"image": 1, "video": 2}
            found = {modality: mm_token_type_ids == kind for modality, kind in types.items()}
        elif input_ids is not None or given:
            found = placeholders_of(self, input_ids, inputs_embeds)
        else:
            logger.warning_once(
                "inputs_embeds came without input_ids and without mm_token_type_ids: every token "
                "is taken for text and attends densely. Pass mm_token_type_ids to say which are "
                "images (1) and videos (2)."
            )
            return None
        masks = [found[modality] for modality in self.config.text_config.nsa_modalities]
        return functools.reduce(torch.logical_or, masks)

    def get_rope_index(
        self,
        input_ids: torch.Tensor,
        mm_token_type_ids: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As stock, by `rope_index`: positions int64 [3, B, S], and the deltas of stock [B, 1]."""
        media = (image_grid_thw, video_grid_thw, second_per_grid_ts)
        return rope_index(self.config, input_ids, attention_mask, *media)


class VideoNSAForConditionalGeneration(VideoNSAGenerationMixin, Qwen2_5_VLForConditionalGeneration):
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

    def _get_dtype_plan(self, dtype):
        """None: what `kept_from_quantizers` names keeps the dtype that was asked for."""
        return {}

    @classmethod
    @functools.wraps(Qwen2_5_VLForConditionalGeneration.from_pretrained.__func__)
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        """Stock, but refuses to quantise a checkpoint without gates: nothing could train them."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = [name for name in info["missing_keys"] if ".g_proj_" in name]
        if missing and getattr(model, "is_quantized", False):
            raise ValueError(
                f"{model.name_or_path} has no gates ({missing[0]} and {len(missing) - 1} others), "
                "and was to be loaded quantised, which is for trained weights: the gates would be "
                "random numbers. Convert it first, with convert_checkpoint.py, train the gates, "
                "and load what comes of that."
            )
        return (model, info) if output_loading_info else model

    def shard_sequences(self, group: "torch.distributed.ProcessGroup | None" = None) -> None:
        """Share out the tokens of every later call with images or videos over a group's processes.

        Each process has the model, on a device of its own, and makes the same calls with the same
        inputs; it gets the outputs, and the whole cache, that one process alone would have. The
        group is that of all processes by default; a group of one process shares nothing out. Calls
        of text alone and decoding are not shared out.
        """
        text = self.model.language_model
        text.nsa_group = self.model.visual.nsa_group = checked_group(text.config, group)

    def save_pretrained(self, *args, **kwargs):
        """Stock, with the keys of the state dict: other keys would not resume in the Trainer."""
        kwargs.setdefault("save_original_format", False)
        return super().save_pretrained(*args, **kwargs)


def _cached_length(cache, new, wait):
    """Tokens in the cache: an int, or of a static cache while decoding a tensor on its device."""
    length = 0 if cache is None else cache.get_seq_length()
    if torch.is_tensor(length) and not torch.compiler.is_compiling():
        if wait or new > 1 or length.device.type == "cpu":
            length = int(length)
    return length


def _is_prompt(tokens, cached):
    """Whether a call's tokens [B, S, ...] are surely a user's, not generated or guessed."""
    if torch.compiler.is_compiling() or tokens.device.type == "meta":
        return False
    return tokens.shape[1] > 1 and cached == 0


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


map_published_keys("VideoNSAForConditionalGeneration")
VideoNSAForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
