"""What the code takes from transformers beyond its documented interface, hook by hook.

A hook that a newer version drops, changes or no longer calls fails here by its name, before it
fails anywhere else. Read in transformers 5.17 and 5.24; who uses which is said beside it.
"""

import importlib
import inspect

import pytest
import transformers
from packaging.version import Version
from transformers import DynamicCache
from videonsa.library_videonsa import cache_of

from tiny import Prompts, make_model

VERSION = Version(transformers.__version__)
QWEN = "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"

# Methods that the code replaces: name, parameters in order, first version that must have it.
REPLACED = [
    # generation_videonsa.py
    (
        "transformers.GenerationMixin._prefill",
        "self input_ids generation_config model_kwargs is_first_iteration",
        "5.17",
    ),
    (
        "transformers.GenerationMixin._prepare_position_ids_for_generation",
        "self inputs_tensor model_kwargs",
        "5.17",
    ),
    (
        "transformers.GenerationMixin._maybe_prepare_encoder_kwargs_for_generation",
        "self inputs_tensor model_kwargs model_input_name generation_config",
        "5.24",
    ),
    # processing_videonsa.py
    (
        "transformers.Qwen2VLVideoProcessor._standardize_kwargs",
        "self size min_pixels max_pixels kwargs",
        "5.17",
    ),
    # configuration_videonsa.py
    ("transformers.Qwen2_5_VLTextConfig.convert_rope_params_to_dict", "self kwargs", "5.17"),
    # modeling_videonsa.py
    (
        f"{QWEN}.Qwen2_5_VLModel.get_rope_index",
        "self input_ids mm_token_type_ids image_grid_thw video_grid_thw second_per_grid_ts "
        "attention_mask kwargs",
        "5.17",
    ),
    ("transformers.PreTrainedModel._get_dtype_plan", "self dtype", "5.17"),
    # commands/finetuning_trainer.py
    ("transformers.Trainer._prepare_context_parallel_inputs", "self model inputs", "5.17"),
]
# Functions and classes that the code calls: name, parameters that it passes.
CALLED = [
    # library_videonsa.py
    (
        "transformers.conversion_mapping.register_checkpoint_conversion_mapping",
        "model_type_or_class_name mapping overwrite",
    ),
    ("transformers.conversion_mapping.WeightRenaming", "source_patterns target_patterns"),
    ("transformers.cache_utils.Cache", "offloading"),
    # generation_videonsa.py
    (
        "transformers.masking_utils.create_masks_for_generate",
        "config inputs_embeds attention_mask position_ids",
    ),
    # vision_videonsa.py
    (f"{QWEN}.eager_attention_forward", "module query key value attention_mask scaling dropout"),
    ("transformers.modeling_utils.AttentionInterface.get_interface", "attn_implementation default"),
    ("transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS", ""),
    ("transformers.utils.generic.merge_with_config_defaults", "func"),
    ("transformers.utils.output_capturing.capture_outputs", "func"),
    ("transformers.vision_utils.get_vision_cu_seqlens", "grid_thw kwargs"),
    ("transformers.vision_utils.get_vision_position_ids", "grid_thw spatial_merge_size kwargs"),
    (
        "transformers.vision_utils.get_vision_window_index",
        "grid_thw spatial_merge_size window_size patch_size kwargs",
    ),
    # modeling_videonsa.py, media_features_videonsa.py
    ("transformers.utils.can_return_tuple", "func"),
    ("transformers.PreTrainedModel._from_config", "config"),
    ("transformers.PreTrainedModel.save_pretrained", "save_original_format"),
    (
        "transformers.quantizers.base.HfQuantizer.get_modules_to_not_convert",
        "model skip_modules keep_in_fp32_modules",
    ),
    (f"{QWEN}.Qwen2_5_VLModel.get_placeholder_mask", "input_ids inputs_embeds"),
    (f"{QWEN}.Qwen2_5_VLModel.get_video_features", "pixel_values_videos video_grid_thw"),
    (f"{QWEN}.Qwen2_5_VLModel.get_image_features", "pixel_values image_grid_thw"),
    # processing_videonsa.py, past the resizing of its own parent
    ("transformers.video_processing_utils.BaseVideoProcessor.resize", "image size resample"),
    # commands/finetuning_trainer.py, commands/finetuning_saving.py
    ("transformers.Trainer.save_model", "output_dir _internal_call"),
    ("transformers.Trainer.get_batch_samples", "epoch_iterator num_batches device"),
    ("transformers.TrainingArguments", "save_total_limit hub_strategy"),
]
# Methods of ours that `generate` calls by itself, with what makes it do so.
CALLS = [
    ("_prefill", {}, "5.17"),
    ("_prepare_position_ids_for_generation", {}, "5.17"),
    ("_maybe_prepare_encoder_kwargs_for_generation", {}, "5.24"),
    ("create_masks_for_generate", {"cache_implementation": "static"}, "5.17"),
]


def find(name):
    """The object of a dotted name."""
    parts = name.split(".")
    for size in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:size]))
        except ImportError:
            continue
        for part in parts[size:]:
            found = getattr(found, part, None)
            assert found is not None, f"transformers {VERSION} has no {name}"
        return found


def parameters(name):
    found = find(name)
    return list(inspect.signature(found).parameters) if callable(found) else []


@pytest.mark.parametrize(("name", "wanted", "since"), REPLACED, ids=[x[0] for x in REPLACED])
def test_a_method_that_is_replaced_is_there_as_it_was(name, wanted, since):
    if VERSION < Version(since):
        pytest.skip(f"{name} is of later versions")
    assert parameters(name) == wanted.split(), name


@pytest.mark.parametrize(("name", "wanted"), CALLED, ids=[x[0] for x in CALLED])
def test_a_function_that_is_called_takes_what_it_took(name, wanted):
    assert set(wanted.split()) <= set(parameters(name)), name


@pytest.mark.parametrize(("name", "options", "since"), CALLS, ids=[x[0] for x in CALLS])
def test_generate_calls_the_method_that_replaces_its_own(name, options, since, monkeypatch):
    if VERSION < Version(since):
        pytest.skip(f"{name} is of later versions")
    model, prompts, calls = make_model(), Prompts(), []
    method = getattr(model, name)
    monkeypatch.setattr(model, name, lambda *args, **kw: calls.append(name) or method(*args, **kw))
    inputs = prompts.batch(prompts.row(3, ("video", 2, 2, 2), 2))
    model.generate(**inputs, max_new_tokens=2, do_sample=False, **options)
    assert calls, f"generate of transformers {VERSION} does not call {name}"


def test_a_cache_is_found_under_the_name_that_the_library_gives_it():
    model, prompts = make_model(), Prompts()
    inputs = prompts.batch(prompts.row(5))
    made = cache_of(model(**inputs, use_cache=True))
    assert made.get_seq_length() == 5
    assert cache_of({"past_key_values": made}) is made and cache_of({"cache": made}) is made
    passed = DynamicCache(config=model.config.text_config)
    seen = []
    model.model.language_model.layers[0].self_attn.register_forward_pre_hook(
        lambda layer, args, kwargs: seen.append(cache_of(kwargs)), with_kwargs=True
    )
    model(**inputs, past_key_values=passed)
    assert seen == [passed]


def test_an_offloaded_cache_has_the_stream_that_fetches_its_layers():
    source = inspect.getsource(find("transformers.cache_utils.Cache"))
    assert "self.offloading" in source and "self.prefetch_stream" in source
