"""How `generate` differs from Qwen2.5-VL's.

- Positions are the model's own, after those of the cache (positions_videonsa.py).
- Media that the cache has already are not read again when the whole conversation is passed.
- Images and videos are encoded as the prompt is read, a chunk at a time
  (media_features_videonsa.py).
- Processes that share out the prompt (sharding_videonsa.py) draw the same random numbers.

`generate` and `create_masks_for_generate` are public. The methods that begin with `_` are private
ones of transformers' GenerationMixin, as versions 5.17 to 5.24 call them (5.17 has no
`_maybe_prepare_encoder_kwargs_for_generation`, and encodes nothing before the prompt is read);
tests/test_library_hooks.py fails by name where a newer version has dropped or changed one.
"""

import copy
import functools

import torch
from torch import nn
from transformers import GenerationMixin

from .cache_videonsa import use_buffers
from .call_checks_videonsa import (
    check_cache,
    check_mask,
    check_media,
    check_pixels,
    check_tokens,
    check_vocabulary,
)
from .decoding_videonsa import recording
from .library_videonsa import cache_of, create_masks_for_generate
from .media_features_videonsa import PIXELS, has_media
from .memory_videonsa import (
    COPIED_LAYERS,
    PREFILL_CHUNK_SIZE,
    UNUSABLE_SHARE,
    cache_bytes,
    free_memory,
    prefill_tokens,
)
from .packing_videonsa import valid_tokens
from .positions_videonsa import check_prompt, positions_of_new_tokens, state_in, state_of
from .sharding_videonsa import draw_alike

MAX_RESERVED = 1024  # tokens of an answer that the cache has room for from the start


class VideoNSAGenerationMixin(GenerationMixin):
    """`generate` for a Qwen2.5-VL model whose `model` is a `VideoNSAModel`."""

    @functools.wraps(GenerationMixin.generate)
    def generate(self, inputs=None, generation_config=None, *args, **kwargs):
        config = generation_config or self.generation_config
        if cache_of(kwargs) is not None and kwargs.get("use_cache", config.use_cache) is False:
            raise ValueError(
                "past_key_values came with use_cache=False: every step would read the whole prompt "
                "onto the cache again. Leave one of them away."
            )
        input_ids = kwargs.get("input_ids", inputs)
        if config.is_assistant and input_ids is not None and not has_media(kwargs):
            # It drafts for a turn whose media the main model has cached: it goes on without them.
            kwargs["mm_token_type_ids"] = torch.zeros_like(input_ids)
        if kwargs.get("cache_implementation") != "paged":  # which serves text, also as lists
            self._check_turn(input_ids, kwargs)
        if (group := self.model.language_model.nsa_group) is not None:
            draw_alike(group, self.device)
        with recording(self.model.language_model):
            return super().generate(inputs, generation_config, *args, **kwargs)

    def _check_turn(self, input_ids, kwargs):
        """Raise ValueError unless a call's tokens, cache and media fit; drop media of old turns.

        input_ids [B, S]: the whole conversation, or what is new since the cache was filled.
        """
        check_pixels(self.config, kwargs)
        cache, mask = cache_of(kwargs), kwargs.get("attention_mask")
        embeds = kwargs.get("inputs_embeds")
        if input_ids is None and embeds is None:
            return  # the library begins with a token of its own, or says what it wants
        check_tokens(self.config, input_ids, embeds)
        check_vocabulary(self.config, input_ids)
        check_cache(cache)
        rows, length = (input_ids if embeds is None else embeds).shape[:2]
        cached = 0 if cache is None else int(cache.get_seq_length())
        state_in(cache, cached)  # forgets what was cropped
        check_mask(mask, rows, length, *([cached + length] if cached and embeds is None else []))
        if mask is not None and mask.shape[1] != length:
            check_media(self.model, {**kwargs, "input_ids": input_ids})
            return  # of the new tokens alone
        if cached and length <= cached:
            raise ValueError(
                f"{length} tokens came, but the cache has {cached} already. Pass the whole "
                "conversation, longer than what is cached; or new input_ids with an attention_mask "
                f"[{rows}, {cached + length}] of the cached and the new ones."
            )
        if input_ids is None:
            return
        if cached:
            check_prompt(cache, input_ids, cached, mask)
            _drop_cached_media(self.config, input_ids, cached, kwargs)
        check_media(self.model, {**kwargs, "input_ids": input_ids[:, cached:]})

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # the library reads its names
    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, **kwargs):
        """As the library, but for assisted decoding, which would read again what is cached."""
        cache, positions = cache_of(kwargs), kwargs.get("position_ids")
        if next_sequence_length is None and cache is not None and positions is not None:
            cached = int(cache.get_seq_length())
            if cached and positions.shape[-1] == input_ids.shape[1]:  # the whole conversation
                next_sequence_length = input_ids.shape[1] - cached
        return super().prepare_inputs_for_generation(input_ids, next_sequence_length, **kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """Positions of every token so far, int64 [4, B, L]: as text, then time, height and width.

        Those of cached tokens are not read again.
        """
        text = GenerationMixin._prepare_position_ids_for_generation(
            self, inputs_tensor, model_kwargs
        )
        input_ids = model_kwargs.get("input_ids")
        if input_ids is None and inputs_tensor.ndim == 2:
            input_ids = inputs_tensor
        if input_ids is not None and not input_ids.shape[1]:
            input_ids = None  # embeddings alone: their positions are those of text, as in stock
        cache = cache_of(model_kwargs)
        cached = 0 if cache is None else int(cache.get_seq_length())
        new = text.shape[1] - cached
        if input_ids is not None:
            input_ids = input_ids[:, -new:]
        valid = valid_tokens(model_kwargs.get("attention_mask"), text.shape[1])
        media = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        vision = positions_of_new_tokens(
            self.config,
            state_of(cache, cached, valid, inputs_tensor),
            new,
            valid,
            input_ids,
            **{name: model_kwargs.get(name) for name in media},
        )
        vision = nn.functional.pad(vision, (cached, 0))
        return torch.cat([text.expand(vision.shape[1], -1)[None], vision])

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor, model_kwargs, model_input_name, generation_config
    ):
        """The library encodes all media before the prompt is read, so that the beams or sequences
        of one prompt share them. For one sequence nothing is encoded here, but as it is read.
        """
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
        """Leaves reading in chunks to the model, which encodes the media chunk by chunk.

        The library would cut the prompt before its media are encoded, or refuse to.
        """
        cache = cache_of(model_kwargs)
        mask, given = model_kwargs.get("attention_mask"), input_ids.shape[1]
        prompt = given if mask is None else mask.shape[1]  # cached tokens with it, given or not
        use_buffers(cache, prompt + min(generation_config.max_length - given, MAX_RESERVED))
        if cache is None or not cache.get_seq_length():
            is_first_iteration = True  # an assistant (draft) model would lose its images
        size = generation_config.prefill_chunk_size
        if size is not None:
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
        elif (
            cache is not None
            and not (generation_config.output_hidden_states or generation_config.output_attentions)
            and self.config.text_config.nsa_semantics == "paper"  # others read a prompt whole
        ):
            if any(model_kwargs.get(pixels) is not None for pixels in PIXELS.values()):
                size = self._prefill_chunk_size(cache, prompt)
        if size is not None:
            model_kwargs = {**model_kwargs, "nsa_chunk_size": size}
        outputs = super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        if cache is not None and cache.get_seq_length() == input_ids.shape[1]:
            cache.nsa_prompt = input_ids  # the whole conversation: `check_prompt` compares the next
        return outputs

    def _prefill_chunk_size(self, cache, prompt):
        """Tokens to read at a time, fewer where the device is nearly full; prompt: all to cache."""
        text, itemsize = self.config.text_config, self.dtype.itemsize
        # Processes that share a prompt out read the same chunks, whatever each of them has left.
        shared = self.model.language_model.nsa_group is not None
        free = None if shared else free_memory(self.device)
        if free is not None:
            if getattr(self, "is_quantized", False):
                free -= UNUSABLE_SHARE * torch.cuda.memory_allocated(self.device)
            layers = self.model.language_model.layers
            here = sum(next(layer.parameters()).device == self.device for layer in layers)
            kept = COPIED_LAYERS if getattr(cache, "offloading", False) else here
            new = prompt - int(cache.get_seq_length())
            free -= kept * cache_bytes(text, new, itemsize) / len(layers)
            free -= COPIED_LAYERS * cache_bytes(text, prompt, itemsize) / len(layers)
        return prefill_tokens(PREFILL_CHUNK_SIZE, text, itemsize, free)


def _drop_cached_media(config, input_ids, cached, kwargs):
    """Drop from a call's kwargs the images and videos of which the cache has the tokens."""
    for modality, pixels in PIXELS.items():
        grid = kwargs.get(f"{modality}_grid_thw")
        if grid is None or kwargs.get(pixels) is None:
            continue
        placeholder = input_ids == getattr(config, f"{modality}_token_id")
        old, new = placeholder[:, :cached].sum(1), placeholder[:, cached:].sum(1)
        patches = grid.prod(-1)
        tokens = patches // config.vision_config.spatial_merge_size**2
        if tokens.sum() == new.sum():
            continue  # only the new turn's were passed
        # Media come in the order of their placeholders: a row's cached ones, its new ones.
        bounds = torch.stack([old, new], dim=1).flatten().cumsum(0)
        ends = tokens.cumsum(0).to(bounds.device)
        whole = torch.isin(bounds, nn.functional.pad(ends, (1, 0))).all()
        if not whole or ends[-1] != bounds[-1]:
            raise ValueError(
                f"the {modality}s given have {int(ends[-1])} tokens; input_ids hold "
                f"{int(old.sum())} placeholders in the cached part and {int(new.sum())} "
                "after it. Pass either all of the conversation's or only the new turn's, and "
                "a cache that does not end within one of them."
            )
        keep = torch.searchsorted(bounds, ends) % 2 == 1
        _keep_media(kwargs, modality, keep, patches)


def _keep_media(kwargs, modality, keep, patches):
    """Drop the images or videos that bool `keep` does not mark; `patches` are their sizes."""
    pixels, grid = PIXELS[modality], f"{modality}_grid_thw"
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
