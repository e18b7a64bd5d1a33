"""What a call of `forward` or `generate` must look like; checked before anything is computed.

A ValueError says what was given and what was wanted. Shapes and dtypes cost nothing; numbers that
lie on a device are read once for a prompt, and never while decoding.
"""

import torch
from transformers.cache_utils import QuantizedCache, StaticLayer
from transformers.utils import logging

from .media_features_videonsa import PIXELS, has_media, placeholders_of

logger = logging.get_logger(__name__)

_HOW_TO_CALL = (
    "Pass pixels, grids and input_ids as the processor returned them together. With a cache, "
    "generate takes the media of the whole conversation or of the new turn, and forward those of "
    "the new tokens alone."
)


def check_tokens(config, input_ids, inputs_embeds) -> None:
    """Raise ValueError unless ids are integers [B, S], or embeddings are floats [B, S, hidden]."""
    if input_ids is None and inputs_embeds is None:
        raise ValueError(f"neither input_ids nor inputs_embeds came. {_HOW_TO_CALL}")
    integers = (torch.int32, torch.int64)
    if input_ids is not None and not (
        torch.is_tensor(input_ids) and input_ids.ndim == 2 and input_ids.dtype in integers
    ):
        raise ValueError(
            f"input_ids is {_describe(input_ids)}; wanted a tensor of integers [batch, tokens], as "
            "the processor returns it with return_tensors='pt'. Of one prompt give input_ids[None]."
        )
    hidden = config.text_config.hidden_size
    if inputs_embeds is not None and not (
        torch.is_tensor(inputs_embeds)
        and inputs_embeds.ndim == 3
        and inputs_embeds.shape[2] == hidden
        and inputs_embeds.is_floating_point()
    ):
        raise ValueError(
            f"inputs_embeds is {_describe(inputs_embeds)}; wanted a tensor of floats "
            f"[batch, tokens, {hidden}]."
        )
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    if not tokens.numel():
        name = "input_ids" if inputs_embeds is None else "inputs_embeds"
        raise ValueError(f"{name} is {_describe(tokens)}; wanted at least one row and one token.")


def check_vocabulary(config, input_ids: torch.Tensor | None) -> None:
    """Raise ValueError where an id is none of the vocabulary's. Waits for the ids' device."""
    if input_ids is None:
        return
    size = config.text_config.vocab_size
    strange = (input_ids < 0) | (input_ids >= size)
    if strange.any():
        raise ValueError(
            f"input_ids hold {int(input_ids[strange][0])}, but the vocabulary has the ids from 0 "
            f"to {size - 1}. Use the processor of the same checkpoint; -100 is for labels alone."
        )


def check_mask(attention_mask, rows: int, *lengths: int) -> None:
    """Raise ValueError unless a 2-D attention mask is [rows, one of these lengths]; others pass.

    lengths: how many tokens there are; two where a cache may or may not be counted among them.
    """
    if attention_mask is None or isinstance(attention_mask, dict):
        return
    if not torch.is_tensor(attention_mask) or attention_mask.ndim not in (2, 4):
        given = f"is a {type(attention_mask).__name__}"
        if torch.is_tensor(attention_mask):
            given = f"has shape {list(attention_mask.shape)}"
        raise ValueError(
            f"attention_mask {given}; wanted [batch, tokens], a tensor that is 0 at padding."
        )
    if attention_mask.ndim == 4:
        return
    given_rows, given = attention_mask.shape
    if given not in lengths:
        counted = " or ".join(str(length) for length in lengths)
        raise ValueError(
            f"attention_mask covers {given} tokens, but the cached and the new ones are {counted}. "
            "It needs a column for each."
        )
    if given_rows != rows:
        raise ValueError(
            f"attention_mask has {given_rows} rows, but there are {rows} of tokens. It needs one "
            "for each."
        )


def check_types(mm_token_type_ids, inputs_embeds: torch.Tensor) -> None:
    """Raise ValueError unless there is a type for each of the embeddings [B, S, hidden]."""
    shape = inputs_embeds.shape[:2]
    if not torch.is_tensor(mm_token_type_ids) or mm_token_type_ids.shape != shape:
        raise ValueError(
            f"mm_token_type_ids is {_describe(mm_token_type_ids)}; wanted {list(shape)}, a type "
            "for each of inputs_embeds."
        )


def check_positions(position_ids, rows: int, new: int) -> None:
    """Raise ValueError unless positions are [1 or rows, new], or 3 or 4 of those."""
    if position_ids is None:
        return
    fits = torch.is_tensor(position_ids) and position_ids.ndim in (2, 3)
    fits = fits and position_ids.shape[-1] == new and position_ids.shape[-2] in (1, rows)
    if not fits or (position_ids.ndim == 3 and position_ids.shape[0] not in (3, 4)):
        raise ValueError(
            f"position_ids is {_describe(position_ids)} for {rows} rows of {new} new tokens; "
            f"wanted [{rows}, {new}] for text, or [3, {rows}, {new}] over time, height and width."
        )


def check_cache(cache, rows: int | None = None) -> None:
    """Raise ValueError unless this is a cache, either empty or of as many rows as given."""
    if cache is None:
        return
    if not hasattr(cache, "get_seq_length"):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}; wanted a cache of transformers, as "
            "DynamicCache()."
        )
    keys = getattr(next(iter(getattr(cache, "layers", [])), None), "keys", None)
    if rows is not None and keys is not None and keys.numel() and len(keys) != rows:
        raise ValueError(
            f"the cache has {len(keys)} rows, but there are {rows} of tokens. Pass the cache of "
            "this batch, or one that is new."
        )


def check_exact_cache(cache) -> None:
    """Raise ValueError where a cache gives back other keys and values than it got."""
    if isinstance(cache, QuantizedCache):
        raise ValueError(
            "a QuantizedCache rounds the keys and values of a prompt's first chunk before its next "
            "one is read, and all of them anew with each chunk. Read a prompt of several chunks "
            "onto the default cache, or keep that in the host's memory with "
            'cache_implementation="offloaded"; or give fewer tokens than prefill_chunk_size.'
        )


def check_room(cache, cached: int | torch.Tensor, new: int) -> None:
    """Raise ValueError where a static cache has no room; a length on a device is not waited for."""
    layer = next(iter(getattr(cache, "layers", [])), None)
    if not isinstance(cached, int) or type(layer) is not StaticLayer:
        return
    if cached + new > layer.max_cache_len:
        raise ValueError(
            f"the static cache has room for {layer.max_cache_len} tokens, but {cached} are in it "
            f"and {new} are new. Make one with a larger max_cache_len, or a DynamicCache."
        )


def check_chunk_size(size) -> None:
    """Raise ValueError unless a prompt can be cut into chunks of `size` tokens; None cuts none."""
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError(
            f"prefill_chunk_size (of generate; nsa_chunk_size of forward) is {size!r}; wanted a "
            "whole number of tokens, at least 1, or None."
        )


def check_pixels(config, call: dict) -> None:
    """Raise ValueError unless the pixels and grids among a call's arguments fit each other.

    Pixels are [patches, pixels of a patch], grids int64 [media, 3], patches over time, height and
    width; the patches of all images, or of all videos, follow each other.
    """
    vision = config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    for modality, name in PIXELS.items():
        pixels, grid = call.get(name), call.get(f"{modality}_grid_thw")
        if pixels is None and grid is None:
            continue
        if grid is None:
            raise ValueError(f"{name} came without {modality}_grid_thw. {_HOW_TO_CALL}")
        whole = torch.is_tensor(grid) and not grid.is_floating_point()
        if not whole or grid.ndim != 2 or not len(grid) or grid.shape[1] != 3:
            raise ValueError(
                f"{modality}_grid_thw is {_describe(grid)}; wanted an integer tensor "
                f"[{modality}s, 3] of patches over time, height and width. {_HOW_TO_CALL}"
            )
        if pixels is None:
            continue
        grid = grid.cpu()
        odd = (grid < 1).any(1) | (grid[:, 1:] % vision.spatial_merge_size).any(1)
        if odd.any():
            raise ValueError(
                f"{modality}_grid_thw holds {grid[odd][0].tolist()}; wanted at least one temporal "
                f"step, and a height and width in multiples of {vision.spatial_merge_size} patches."
                f" {_HOW_TO_CALL}"
            )
        wanted = [int(grid.prod(-1).sum()), width]
        if _shape(pixels) != wanted:
            raise ValueError(
                f"{name} is {_shape(pixels)}, but {modality}_grid_thw ({len(grid)} {modality}s) "
                f"stands for {wanted}: {wanted[0]} patches of {width} numbers. {_HOW_TO_CALL}"
            )
        if "int" in str(getattr(pixels, "dtype", None)):
            raise ValueError(
                f"{name} is of {pixels.dtype}; wanted the floats that the processor makes of the "
                f"colours. {_HOW_TO_CALL}"
            )


def check_media(model, call: dict, refuse: bool = True) -> None:
    """Raise ValueError unless a call's images and videos fit the placeholders in its tokens.

    For tokens that a user gives: each of their placeholders is one of this call's media. The grids
    of earlier turns may come again without their pixels. Waits for the tokens' device.
    refuse: also where no media came at all; a notice says that placeholders are text then, as they
    are to stock Qwen2.5-VL's forward.
    """
    encoded = call.get("mm_encoder_outputs") or {}
    input_ids, inputs_embeds = call.get("input_ids"), call.get("inputs_embeds")
    if inputs_embeds is not None and not (has_media(call) or _has_grids(call)):
        return  # features may be among the embeddings already
    new = (inputs_embeds if input_ids is None else input_ids).shape[1]
    placeholders = placeholders_of(model, input_ids, inputs_embeds)
    mask, types = call.get("attention_mask"), call.get("mm_token_type_ids")
    for kind, name in PIXELS.items():
        pixels, grid = call.get(name), call.get(f"{kind}_grid_thw")
        if encoded.get(kind) is not None:
            continue
        if pixels is None and inputs_embeds is not None and (grid is None or input_ids is not None):
            continue  # likewise
        found = placeholders[kind]
        if torch.is_tensor(mask) and mask.ndim == 2:
            found = found & mask[:, -new:].bool()
        if pixels is None and torch.is_tensor(types) and types.shape[1] >= new:
            found = found & (types[:, -new:] != 0)  # the name of the token in a text about it
        found = int(found.sum())
        if pixels is None and found:
            grids = "" if grid is None else f"{kind}_grid_thw came without {name}. "
            message = (
                f"{grids}input_ids hold {found} placeholders of {kind}s, but no {name} came for "
                f"them. {_HOW_TO_CALL}"
            )
            if refuse or grids or has_media(call):
                raise ValueError(message)
            logger.warning_once(f"{message} They are read as text.")
        if pixels is None:
            continue
        tokens = int(grid.prod(-1).sum()) // model.config.vision_config.spatial_merge_size**2
        if found != tokens:
            raise ValueError(
                f"the {len(grid)} {kind}s given have {tokens} tokens, but the new tokens hold "
                f"{found} placeholders of {kind}s. {_HOW_TO_CALL}"
            )


def _has_grids(call):
    return any(call.get(f"{kind}_grid_thw") is not None for kind in PIXELS)


def _shape(x):
    return list(x.shape) if hasattr(x, "shape") else f"a {type(x).__name__}"


def _describe(x):
    """The shape and dtype of a tensor, or the type of something else."""
    return f"{list(x.shape)} of {x.dtype}" if torch.is_tensor(x) else f"a {type(x).__name__}"
