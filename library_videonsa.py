"""What the model takes from transformers beyond its documented interface, in one place.

Read in transformers 5.17 and 5.24; the private methods of `generate` that the model replaces are
in generation_videonsa.py. tests/test_library_hooks.py fails by name where a newer version has
dropped or changed one.
"""

import torch
from transformers.cache_utils import DynamicLayer
from transformers.conversion_mapping import WeightRenaming, register_checkpoint_conversion_mapping
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import eager_attention_forward
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_position_ids,
    get_vision_window_index,
)

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "DynamicLayer",
    "cache_of",
    "capture_outputs",
    "create_masks_for_generate",
    "eager_attention_forward",
    "get_vision_cu_seqlens",
    "get_vision_position_ids",
    "get_vision_window_index",
    "kept_from_quantizers",
    "map_published_keys",
    "merge_with_config_defaults",
    "observed",
    "order_offloaded_layers",
    "output_with_cache",
]


def cache_of(container):
    """The key/value cache among keyword arguments or outputs: `past_key_values`, or `cache` (5.24).

    None where there is none.
    """
    # Not by asking for it: newer outputs warn of the old name, even where it is not there.
    names = ("cache", "past_key_values")
    return next((x for name, x in container.items() if name in names and x is not None), None)


def output_with_cache(hidden_states: torch.Tensor, cache) -> BaseModelOutputWithPast:
    """What a language model returns: [B, S, hidden], and the cache under the version's name."""
    fields = BaseModelOutputWithPast.__dataclass_fields__
    name = "cache" if "cache" in fields else "past_key_values"
    return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{name: cache})


def observed(model: torch.nn.Module) -> bool:
    """Whether a hook, of the user or of accelerate, wants to see each call of a part of the model.

    The library's own, which collect hidden states where a call asks for them, do not count.
    """
    for module in model.modules():
        if hasattr(module, "_hf_hook") or module._forward_pre_hooks:
            return True
        origins = {getattr(hook, "__module__", None) for hook in module._forward_hooks.values()}
        if origins - {capture_outputs.__module__}:
            return True
    return False


def order_offloaded_layers(cache, device: torch.device) -> None:
    """Make an offloaded cache fetch a layer only once it is stored, as 5.24 does by itself."""
    if getattr(cache, "offloading", False):
        cache.prefetch_stream.wait_stream(torch.cuda.current_stream(device))


def kept_from_quantizers(quantize_vision_tower: bool) -> list[str]:
    """Patterns of the modules that no quantizer of the library replaces, whatever a user lists.

    They go into a model's `_keep_in_fp32_modules`, which every quantizer adds to its own list, and
    which makes float32 of nothing where `_get_dtype_plan` says so.
    """
    patterns = [r".*\bg_proj_[12]", r".*\blm_head"]
    return patterns if quantize_vision_tower else [*patterns, r".*\bvisual"]


def map_published_keys(class_name: str) -> None:
    """Let a class load Qwen2.5-VL's published checkpoints, whose keys are `visual.*`, `model.*`.

    The library has this mapping for its own classes; remote code has to bring it.
    """
    register_checkpoint_conversion_mapping(
        class_name,
        [
            WeightRenaming(source_patterns=r"^visual", target_patterns="model.visual"),
            WeightRenaming(
                source_patterns=r"^model(?!\.(language_model|visual))",
                target_patterns="model.language_model",
            ),
        ],
        overwrite=True,
    )
