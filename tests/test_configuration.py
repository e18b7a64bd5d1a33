"""The configuration: Qwen2.5-VL's own layouts are read, and nonsense is refused by name."""

import math
from collections import namedtuple

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextConfig, configuration_utils
from videonsa.configuration_videonsa import VideoNSAConfig, VideoNSATextConfig, _described
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration

from tiny import config_fields


def test_defaults_are_the_7b_with_the_papers_branches():
    text = VideoNSAConfig().text_config
    assert (text.num_hidden_layers, text.hidden_size, text.intermediate_size) == (28, 3584, 18944)
    assert (text.num_attention_heads, text.num_key_value_heads) == (28, 4)
    assert text.rope_parameters["mrope_section"] == [16, 24, 24]
    assert (text.nsa_block_size, text.nsa_num_selected_blocks, text.nsa_window_size) == (
        64,
        32,
        256,
    )
    assert (text.nsa_gate_temperature, text.nsa_modalities) == (0.3, ["image", "video"])


def test_engines_that_check_for_qwen_recognise_it():
    config = VideoNSAConfig()
    assert isinstance(config, Qwen2_5_VLConfig)
    assert isinstance(config.text_config, Qwen2_5_VLTextConfig)
    assert isinstance(config.text_config, VideoNSATextConfig)
    assert (config.model_type, config.text_config.model_type) == ("videonsa", "videonsa_text")


def test_a_flat_config_of_the_hub_is_read():
    """The layout that Qwen2.5-VL's checkpoints were published with."""
    config = VideoNSAConfig(
        hidden_size=112,
        num_attention_heads=14,
        num_key_value_heads=2,
        rope_theta=1000.0,
        rope_scaling={"type": "mrope", "mrope_section": [2, 1, 1]},
        vision_config={"depth": 3, "hidden_size": 16},
        tie_word_embeddings=True,
    )
    assert config.text_config.hidden_size == 112
    assert config.text_config.rope_parameters["mrope_section"] == [2, 1, 1]
    assert config.text_config.rope_parameters["rope_theta"] == 1000.0
    assert config.vision_config.depth == 3
    assert config.tie_word_embeddings


def test_fields_survive_a_round_trip(tmp_path):
    fields = {"nsa_window_size": 77, "nsa_enabled": False}
    VideoNSAConfig(text_config=fields).save_pretrained(tmp_path)
    text = VideoNSAConfig.from_pretrained(tmp_path).text_config
    assert (text.nsa_window_size, text.nsa_enabled) == (77, False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nsa_block_size": 0}, "nsa_block_size is 0; it must be at least 1"),
        ({"nsa_window_size": 0}, "nsa_window_size is 0; it must be at least 1"),
        ({"nsa_window_size": -4}, "nsa_window_size is -4"),
        ({"nsa_num_local_blocks": 0}, "nsa_num_local_blocks is 0"),
        ({"nsa_num_initial_blocks": 20, "nsa_num_local_blocks": 20}, "force 40 blocks, more than"),
        ({"nsa_gate_temperature": 0.0}, "nsa_gate_temperature is 0.0; it must be positive"),
        ({"nsa_gate_temperature": math.nan}, "nsa_gate_temperature is nan; it must be positive"),
        ({"nsa_gate_temperature": math.inf}, "nsa_gate_temperature is inf; it must be positive"),
        ({"nsa_blocksize": 64}, "there is no nsa_blocksize; choose from nsa_enabled, nsa_block_"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be at least 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0; it must be at least 1"),
        ({"num_key_value_heads": -4}, "num_key_value_heads is -4"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"hidden_size": 3585}, "an even number of features for each of num_attention_heads"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
        ({"rope_parameters": {"rope_theta": 0.0}}, "rope_theta is 0.0; it must be positive"),
        (
            {"rope_parameters": {"rope_theta": 1e6, "mrope_section": [16, 24]}},
            r"mrope_section is \[16, 24\]; wanted three numbers.* add up to 64",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e6, "mrope_section": [16, 24, 23]}},
            r"mrope_section is \[16, 24, 23\]; wanted",
        ),
        ({"nsa_backend": "flash"}, "nsa_backend holds 'flash'; choose from 'auto', 'triton'"),
        ({"nsa_semantics": "both"}, "nsa_semantics holds 'both'; choose from 'paper', 'released'"),
        ({"nsa_modalities": ["audio"]}, "nsa_modalities holds 'audio'"),
        ({"nsa_modalities": []}, "nsa_modalities is empty"),
        ({"num_key_value_heads": 5}, "must be a multiple of num_key_value_heads"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"use_sliding_window": True, "max_window_layers": 3}, "Set use_sliding_window to false"),
    ],
)
def test_nonsense_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        VideoNSATextConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_config": {"num_heads": 0}}, "num_heads is 0; it must be at least 1"),
        ({"vision_config": {"spatial_merge_size": 0}}, "spatial_merge_size is 0"),
        (
            {"image_token_id": 7, "video_token_id": 7},
            "image_token_id and video_token_id are both 7",
        ),
        ({"nsa_windowsize": 64}, "there is no nsa_windowsize"),
        ({"text_config": {"nsa_windowsize": 64}}, "there is no nsa_windowsize"),
    ],
)
def test_nonsense_of_the_whole_model_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        VideoNSAConfig(**fields)


def test_what_is_plainly_meant_is_taken():
    assert VideoNSATextConfig(nsa_gate_temperature=1).nsa_gate_temperature == 1
    assert VideoNSATextConfig(nsa_modalities="video").nsa_modalities == ["video"]


def test_a_field_that_is_set_later_is_checked_when_a_model_is_made():
    config = VideoNSAConfig(**config_fields())
    config.text_config.nsa_gate_temperature = math.nan
    with pytest.raises(ValueError, match="nsa_gate_temperature is nan"):
        VideoNSAForConditionalGeneration._from_config(config)


def test_fields_given_to_the_whole_model_reach_the_text_config(tmp_path):
    """Beside a text config, in the flat layout, and as settings of from_pretrained."""
    text = {"nsa_window_size": 77, "hidden_size": 112, "num_attention_heads": 14}
    text["num_key_value_heads"] = 2
    for given in (text, VideoNSATextConfig(**text)):
        config = VideoNSAConfig(text_config=given, nsa_block_size=8).text_config
        assert (config.nsa_window_size, config.nsa_block_size, config.hidden_size) == (77, 8, 112)
    flat = VideoNSAConfig(**text, nsa_block_size=8)
    assert flat.text_config.nsa_block_size == 8 and flat.text_config.hidden_size == 112
    flat.save_pretrained(tmp_path)
    loaded = VideoNSAConfig.from_pretrained(tmp_path, nsa_window_size=9, nsa_enabled=False)
    text = loaded.text_config
    assert (text.nsa_window_size, text.nsa_enabled, text.nsa_block_size) == (9, False, 8)


@pytest.mark.parametrize("fields", [{"nsa_block_size": "64"}, {"nsa_enabled": "no"}], ids=str)
def test_a_wrong_type_is_refused_by_name(fields):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(fields))):
        VideoNSATextConfig(**fields)


def test_a_sub_config_is_described_where_the_library_wants_it(monkeypatch):
    """transformers 5.20 asks for descriptions, but makes none of a class; 5.17 has none."""
    spec = namedtuple("SubConfigSpec", "config_class")
    monkeypatch.setattr(configuration_utils, "SubConfigSpec", spec, raising=False)
    assert _described(VideoNSATextConfig) == spec(VideoNSATextConfig)
    monkeypatch.delattr(configuration_utils, "SubConfigSpec")
    assert _described(VideoNSATextConfig) is VideoNSATextConfig
