"""Videos reach an engine as they reach the processor: its settings, reader, frames as arrays."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from vllm.multimodal import MULTIMODAL_REGISTRY

from conversations import ask
from engines import greedy

MESSAGES = ask("circle.mp4", "What colour is the shape?")


@pytest.fixture(scope="module")
def llm(engine):
    """With settings for all videos, and encoding measured on the largest that they allow."""
    with engine(mm_processor_kwargs={"max_tokens": 64}, skip_mm_profiling=False) as llm:
        yield llm


def test_settings_of_the_start_are_the_processors(llm, reference):
    (output,) = llm.chat([MESSAGES], greedy(), use_tqdm=False)
    reference.check(output, MESSAGES, processor_kwargs={"max_tokens": 64})


def test_a_requests_settings_come_before_those_of_the_start(llm, reference):
    settings = {"max_tokens": 32, "video_end": 6.0}
    options = {"mm_processor_kwargs": settings, "use_tqdm": False}
    (output,) = llm.chat([MESSAGES], greedy(), **options)
    reference.check(output, MESSAGES, processor_kwargs=settings)


def test_no_video_is_larger_than_what_the_encoder_has_room_for(llm):
    info = MULTIMODAL_REGISTRY.create_processor(llm.llm_engine.model_config).info
    assert info.get_mm_max_tokens_per_item(2048, {"video": 1, "image": 1})["video"] == 64
    assert info.largest_video(2048, {"video": 1}) == (64, 28)


def test_frames_that_are_given_as_an_array(llm, reference):
    frames = np.random.default_rng(0).integers(0, 256, (8, 112, 112, 3), dtype=np.uint8)
    metadata = {"fps": 2.0, "total_num_frames": 8, "frames_indices": list(range(8))}
    text = reference.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "So?"}]}],
        add_generation_prompt=True,
    )
    prompt = {"prompt": text, "multi_modal_data": {"video": [(frames, metadata)]}}
    (output,) = llm.generate([prompt], greedy(), use_tqdm=False)
    inputs = reference.processor(
        text=[text], videos=[frames], video_metadata=[metadata], max_tokens=64, return_tensors="pt"
    )
    reference.check_inputs(output, inputs)


def test_all_pictures_of_a_video_that_comes_as_pictures(llm, reference):
    """vLLM takes the first 32 where a request does not say how many."""
    pictures, frames = [], []
    for number in range(40):
        file = io.BytesIO()
        Image.new("RGB", (28, 28), (6 * number, 0, 255 - 6 * number)).save(file, "jpeg")
        pictures.append(base64.b64encode(file.getvalue()).decode())
        frames.append(np.asarray(Image.open(file)))
    url = "data:video/jpeg;base64," + ",".join(pictures)
    video = {"type": "video_url", "video_url": {"url": url}}
    messages = [{"role": "user", "content": [video, {"type": "text", "text": "So?"}]}]
    (output,) = llm.chat([messages], greedy(), use_tqdm=False)
    text = reference.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "So?"}]}],
        add_generation_prompt=True,
    )
    metadata = {"fps": 1.0, "total_num_frames": 40, "frames_indices": list(range(40))}
    inputs = reference.processor(
        text=[text],
        videos=[np.stack(frames)],
        video_metadata=[metadata],
        max_tokens=64,
        return_tensors="pt",
    )
    assert inputs["video_grid_thw"][0, 0] == 20
    reference.check_inputs(output, inputs)
