"""Calls that Qwen2.5-VL's own processor takes give the same tensors with this one."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

from paths import ROOT

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
RANDOM = np.random.default_rng(0)
SIZES = ((56, 84), (100, 60), (112, 112))
ARRAYS = [RANDOM.integers(0, 255, (*size, 3), dtype=np.uint8) for size in SIZES]
IMAGES = [Image.fromarray(array) for array in ARRAYS]
VIDEOS = [RANDOM.integers(0, 255, (count, 56, 84, 3), dtype=np.uint8) for count in (4, 6)]
PICTURE = str(ROOT / "docs" / "branches.png")


@pytest.fixture(scope="module")
def processors():
    """(Qwen2.5-VL's, this one), with the same tokenizer, image processor and bounds."""
    ours = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    video_processor = Qwen2VLVideoProcessor(
        size=dict(ours.video_processor.size),
        patch_size=14,
        temporal_patch_size=2,
        merge_size=2,
        cap_pixels_per_frame=False,
    )
    stock = Qwen2_5_VLProcessor(
        image_processor=ours.image_processor,
        tokenizer=ours.tokenizer,
        video_processor=video_processor,
        chat_template=ours.chat_template,
    )
    return stock, ours


def metadata(count):
    return {"total_num_frames": count, "fps": 2.0, "frames_indices": list(range(count))}


PT = {"return_tensors": "pt"}
PADDED = {"padding": True, **PT}
WHOLE = {"do_sample_frames": False, **PT}
ONE, TWO = [metadata(4)], [metadata(4), metadata(6)]
CALLS = {
    "text": {"text": "hello"},
    "texts": {"text": ["hello", "a b c"], **PADDED},
    "padded left": {"text": ["hello", "a b c d"], "padding_side": "left", **PADDED},
    "padded to a length": {"text": ["hello"], "padding": "max_length", "max_length": 20, **PT},
    "cut": {"text": ["hello there"], "truncation": True, "max_length": 3, **PT},
    "an image alone": {"images": IMAGES[0], **PT},
    "images alone": {"images": IMAGES, **PT},
    "nested images": {
        "text": [IMAGE + "a", 2 * IMAGE],
        "images": [IMAGES[:1], IMAGES[1:]],
        **PADDED,
    },
    "flat images": {"text": [IMAGE + "a", 2 * IMAGE], "images": IMAGES, **PADDED},
    "an array": {"text": IMAGE, "images": ARRAYS[0], **PT},
    "channels first": {"text": IMAGE, "images": ARRAYS[0].transpose(2, 0, 1), **PT},
    "a tensor": {"text": IMAGE, "images": torch.from_numpy(ARRAYS[0]).permute(2, 0, 1), **PT},
    "four axes": {"text": 2 * IMAGE, "images": np.stack([ARRAYS[0]] * 2), **PT},
    "grey": {"text": IMAGE, "images": IMAGES[0].convert("L"), **PT},
    "transparent": {"text": IMAGE, "images": IMAGES[0].convert("RGBA"), **PT},
    "a path": {"text": IMAGE, "images": PICTURE, **PT},
    "rescaled": {"text": IMAGE, "images": ARRAYS[0] / 255, "do_rescale": False, **PT},
    "no types": {"text": IMAGE, "images": IMAGES[0], "return_mm_token_type_ids": False, **PT},
    "types": {"text": [IMAGE], "images": IMAGES[0], "return_mm_token_type_ids": True},
    "text_kwargs": {"text": ["a", "b c"], "text_kwargs": {"padding_side": "left", **PADDED}},
    "images_kwargs": {"text": IMAGE, "images": IMAGES[2], "images_kwargs": {"max_pixels": 3136}},
    "a size": {
        "text": IMAGE,
        "images": IMAGES[2],
        "size": {"shortest_edge": 784, "longest_edge": 3136},
    },
    "NumPy": {"text": IMAGE, "images": IMAGES[2], "return_tensors": "np"},
    "a video": {"text": VIDEO, "videos": VIDEOS[0], "video_metadata": ONE, **WHOLE},
    "a video alone": {"videos": VIDEOS[:1], "video_metadata": ONE, **WHOLE},
    "videos": {
        "text": [VIDEO + "a", VIDEO + "b c"],
        "videos": VIDEOS,
        "video_metadata": TWO,
        "padding": True,
        **WHOLE,
    },
    "frames": {
        "text": VIDEO,
        "videos": [[Image.fromarray(frame) for frame in VIDEOS[0]]],
        "video_metadata": ONE,
        **WHOLE,
    },
    "an odd number": {
        "text": VIDEO,
        "videos": [VIDEOS[0][:3]],
        "video_metadata": [metadata(3)],
        **WHOLE,
    },
    "five axes": {
        "text": 2 * VIDEO,
        "videos": np.stack(VIDEOS[:1] * 2),
        "video_metadata": 2 * ONE,
        **WHOLE,
    },
    "floats": {
        "text": VIDEO,
        "videos": [VIDEOS[0].astype(np.float32)],
        "video_metadata": ONE,
        **WHOLE,
    },
    "not normalized": {
        "text": VIDEO,
        "videos": VIDEOS[:1],
        "video_metadata": ONE,
        "do_normalize": False,
        **WHOLE,
    },
    "both": {
        "text": IMAGE + VIDEO,
        "images": IMAGES[:1],
        "videos": VIDEOS[:1],
        "video_metadata": ONE,
        **WHOLE,
    },
}


@pytest.mark.parametrize("case", CALLS)
def test_calls(processors, case):
    stock, ours = (processor(**CALLS[case]) for processor in processors)
    assert_equal(stock, ours)


def question(*parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]


def image(number):
    return {"type": "image", "image": IMAGES[number]}


TOKENS = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
BATCH = [question(image(0)), question(image(1), image(2)), question()]
SAID = {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}
CHATS = {
    "text": (question(), {}),
    "strings": ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}], {}),
    "an image": (question(image(0)), {"add_generation_prompt": True}),
    "a path": (question({"type": "image", "path": PICTURE}), {}),
    "OpenAI's": (question({"type": "image_url", "image_url": {"url": PICTURE}}), {}),
    "a batch": (BATCH, {"processor_kwargs": {"padding": True}}),
    "padded left": (BATCH, {"processor_kwargs": {"padding": True, "padding_side": "left"}}),
    "going on": ([*question(image(0)), SAID], {"continue_final_message": True}),
    "no types": (question(image(0)), {"processor_kwargs": {"return_mm_token_type_ids": False}}),
    "ids": (question(image(0)), {"return_dict": False}),
    "rendered": (question(image(0), {"type": "video"}), {"tokenize": False}),
    "rendered batch": (BATCH, {"tokenize": False}),
}


@pytest.mark.parametrize("case", CHATS)
def test_conversations(processors, case):
    messages, settings = CHATS[case]
    stock, ours = (p.apply_chat_template(messages, **{**TOKENS, **settings}) for p in processors)
    assert_equal(stock, ours)


def test_empty_lists_are_nothing(processors):
    ours = processors[1]
    for empty in ([], [[]], ()):
        assert_equal(ours(text="a"), ours(text="a", images=empty, videos=empty))
    with pytest.raises(ValueError, match=r"1 <\|video_pad\|> placeholder for 0 videos"):
        ours(text=VIDEO, videos=[])


def assert_equal(stock, ours):
    assert type(stock) is type(ours)
    if not hasattr(stock, "keys"):
        assert torch.equal(stock, ours) if isinstance(stock, torch.Tensor) else stock == ours
        return
    assert list(stock.keys()) == list(ours.keys())
    for key, value in stock.items():
        assert type(value) is type(ours[key])
        if isinstance(value, torch.Tensor):
            assert value.dtype == ours[key].dtype
        assert np.array_equal(np.asarray(value), np.asarray(ours[key])), key
