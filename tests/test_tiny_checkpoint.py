"""The tiny checkpoint at the root: its files come from a seed, and read back as what they are."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, GenerationConfig
from videonsa.configuration_videonsa import VideoNSAConfig
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration

import make_tiny_checkpoint
from make_tiny_checkpoint import ADDED, SPECIAL, VOCABULARY
from paths import ROOT

QUESTION = {
    "role": "user",
    "content": [
        {"type": "video", "video": np.zeros((4, 112, 112, 3), np.uint8)},
        {"type": "text", "text": "What colour is the circle?"},
    ],
}
SYSTEM_TURN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    make_tiny_checkpoint.write_checkpoint(folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)


def test_the_same_seed_writes_the_same_bytes(made, tmp_path):
    make_tiny_checkpoint.write_checkpoint(tmp_path, seed=0)
    names = sorted(path.name for path in made.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert "model.safetensors" in names and "chat_template.jinja" in names
    for name in names:
        assert (made / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_another_seed_writes_other_weights(made, tmp_path):
    make_tiny_checkpoint.write_checkpoint(tmp_path, seed=1)
    one, other = (load_file(folder / "model.safetensors") for folder in (made, tmp_path))
    name = "model.visual.patch_embed.proj.weight"
    assert not torch.equal(one[name], other[name])
    assert (made / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_the_root_has_the_files_that_the_script_writes(made):
    for path in made.iterdir():
        if path.suffix == ".json":
            assert json.loads(path.read_text()) == json.loads((ROOT / path.name).read_text())
    template = "chat_template.jinja"
    assert (made / template).read_text() == (ROOT / template).read_text()


def test_the_weights_are_the_models_in_fp16():
    config = VideoNSAConfig(**json.loads((ROOT / "config.json").read_text()))
    with torch.device("meta"):
        wanted = VideoNSAForConditionalGeneration(config).state_dict()
    wanted.pop("lm_head.weight")  # tied
    with safe_open(ROOT / "model.safetensors", "pt") as weights:
        found = {name: weights.get_slice(name) for name in weights.keys()}
        assert {name: tuple(x.get_shape()) for name, x in found.items()} == {
            name: tuple(x.shape) for name, x in wanted.items()
        }
        assert {x.get_dtype() for x in found.values()} == {"F16"}
    for name, tensor in load_file(ROOT / "model.safetensors").items():
        assert tensor.isfinite().all(), name
    assert (ROOT / "model.safetensors").stat().st_size < 5e6


def test_the_models_shape_is_the_one_that_makes_sparsity_real():
    text = AutoConfig.from_pretrained(ROOT, trust_remote_code=True).text_config
    assert text.num_attention_heads // text.num_key_value_heads == 7
    # At 16 frames, 128 vision tokens, the selected blocks hold half and the window a quarter.
    assert text.nsa_block_size * text.nsa_num_selected_blocks == 64
    assert text.nsa_window_size == 32


def test_special_tokens_are_found_by_name(processor):
    tokenizer = processor.tokenizer
    assert len(tokenizer) == VOCABULARY
    for token in SPECIAL + ADDED:
        (number,) = tokenizer(token).input_ids
        assert tokenizer.convert_ids_to_tokens(number) == token
    hidden = tokenizer("".join(SPECIAL + ADDED)).input_ids
    assert tokenizer.decode(hidden, skip_special_tokens=True) == "".join(ADDED)
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    by_name = tokenizer.convert_tokens_to_ids
    assert config.video_token_id == processor.video_token_id == by_name("<|video_pad|>")
    assert config.image_token_id == processor.image_token_id == by_name("<|image_pad|>")
    assert config.vision_start_token_id == by_name("<|vision_start|>")
    assert config.vision_end_token_id == by_name("<|vision_end|>")
    generation = GenerationConfig.from_pretrained(ROOT)
    assert generation.eos_token_id == by_name(["<|im_end|>", "<|endoftext|>"])
    assert generation.pad_token_id == tokenizer.pad_token_id == by_name("<|endoftext|>")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.padding_side == "left"
    assert not generation.do_sample


@pytest.mark.parametrize(
    "text",
    [
        "What colour is the circle?",
        "déjà vu: naïve Übergröße, 12,5 %",
        "视频里的圆是什么颜色？",
        "  two spaces,\n\ttabs\r\nand an emoji \N{ROCKET} ",
    ],
)
def test_text_survives_the_tokenizer(processor, text):
    ids = processor.tokenizer(text).input_ids
    assert processor.tokenizer.decode(ids) == text
    assert AutoTokenizer.from_pretrained(ROOT)(text).input_ids == ids


def test_the_words_of_the_clips_are_single_tokens(processor):
    tokens = processor.tokenizer.tokenize("Which way does the orange shape move? 31")
    assert tokens == "Which Ġway Ġdoes Ġthe Ġorange Ġshape Ġmove ? Ġ 3 1".split()


def test_the_template_writes_a_conversation(processor):
    turns = [QUESTION, {"role": "assistant", "content": "red"}]
    question = (
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>"
        "What colour is the circle?<|im_end|>\n"
    )
    asked = processor.apply_chat_template(turns[:1], add_generation_prompt=True)
    assert asked == SYSTEM_TURN + question + "<|im_start|>assistant\n"
    told = processor.apply_chat_template(turns)
    assert told == asked + "red<|im_end|>\n"
    parts = [QUESTION, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    assert processor.apply_chat_template(parts) == told


def test_the_template_keeps_a_system_turn_and_marks_images(processor):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    ]
    assert processor.apply_chat_template(turns) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n"
    )


def test_a_clip_of_the_clips_size_is_taken_as_it_is(processor):
    inputs = processor.apply_chat_template(
        [QUESTION], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert type(processor).__name__ == "VideoNSAProcessor"
    assert inputs["video_grid_thw"].tolist() == [[2, 8, 8]]
    assert (inputs["input_ids"] == processor.video_token_id).sum() == 32
