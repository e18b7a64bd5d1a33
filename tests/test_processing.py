"""The budget resolver, and what the processor makes of messages, arrays and frames."""

import copy
import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from qwen_vl_utils import process_vision_info
from transformers import AutoProcessor, AutoVideoProcessor, Qwen2_5_VLProcessor
from transformers.utils import logging
from videonsa.processing_videonsa import VideoNSAProcessor, VideoNSAVideoProcessor
from videonsa.video_plan_videonsa import (
    MAX_FRAME_PIXELS,
    VideoPlan,
    check_frame_size,
    plan_video,
)

import clips
from paths import ROOT
from test_video_reading import frames_of


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """5 s at 10 frames a second, 96 x 160 pixels."""
    return str(clips.write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 50))


@pytest.fixture(autouse=True)
def fresh_notices():
    logging.warning_once.cache_clear()


def message(*parts, text="What is shown?"):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def take(processor, messages, **kwargs):
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=kwargs
    )


def numbers(processor, out, video=0):
    return [clips.number_in(frame) for frame in frames_of(processor, out, video)]


def painted(count, height=56, width=84):
    return np.stack([clips.frame_image(n, height, width) for n in range(count)])


PLANS = [
    # duration, frames, height, width, settings, (frames, height, width, tokens, why)
    (412, 12360, 241, 427, {"max_pixels": 50176}, (768, 168, 280, 23040, "frame cap")),
    (412, 12360, 241, 427, {"max_pixels": 50176, "max_frames": 9999}, (824, 168, 280, 24720, "")),
    (5, 50, 96, 160, {}, (10, 252, 420, 675, "")),
    (5, 50, 96, 160, {"max_pixels": 12544}, (10, 84, 140, 75, "")),
    (4.999, 50, 96, 160, {"max_pixels": 12544}, (10, 84, 140, 75, "")),
    (0.1, 1, 96, 160, {"max_pixels": 12544}, (1, 84, 140, 15, "")),
    (1, 25, 96, 160, {"max_pixels": 12544}, (4, 84, 140, 30, "minimum")),
    (0.3, 3, 96, 160, {"max_pixels": 12544}, (2, 84, 140, 15, "minimum")),
    (10, 100, 96, 160, {"max_pixels": 12544, "fps": 30}, (100, 84, 140, 750, "all there are")),
    (5, 50, 96, 160, {"max_pixels": 12544, "num_frames": 7}, (8, 84, 140, 60, "")),
    (5, 50, 96, 160, {"max_pixels": 12544, "num_frames": 80}, (50, 84, 140, 375, "all there are")),
    (5, 50, 96, 160, {"max_pixels": 12544, "max_tokens": 44}, (4, 84, 140, 30, "token budget")),
    (5, 50, 96, 160, {"size": (100, 150)}, (10, 112, 140, 100, "")),
    (5, 50, 96, 160, {"max_pixels": 1}, (10, 28, 28, 5, "")),
    (5, 50, 96, 160, {"max_pixels": 12544, "max_frames": 1}, (2, 84, 140, 15, "frame cap")),
    (5, 50, 56, 84, {"sample": False}, (50, 280, 392, 3500, "")),
    (3600, 90000, 1080, 1920, {"total_pixels": 36000 * 784, "max_pixels": 50176},
     (768, 168, 280, 23040, "frame cap")),
]  # fmt: skip


@pytest.mark.parametrize("case", PLANS, ids=lambda case: str(case[4]))
def test_plans(case):
    *video, settings, expected = case
    plan = plan_video(*video, **settings)
    assert (plan.frames, plan.height, plan.width, plan.tokens, plan.frames_reason) == expected
    assert plan.tokens == -(-plan.frames // 2) * plan.height * plan.width // 784


def test_pictures_too_large_to_decode_are_refused():
    check_frame_size(2, MAX_FRAME_PIXELS // 2, "large.png")
    with pytest.raises(ValueError, match=r"bomb.png has 30,000x30,000 pixels, more than the 178,9"):
        check_frame_size(30000, 30000, "bomb.png")


def test_a_plan_says_what_it_chose_and_why():
    plan = plan_video(412, 12360, 241, 427, max_pixels=50176)
    line = "412 s at 2 fps = 768 of 824 frames (frame cap), 168x280, 23,040 tokens"
    assert plan.describe() == line
    assert plan_video(5, 50, 96, 160, max_pixels=12544).describe() == (
        "5 s at 2 fps = 10 frames, 84x140, 75 tokens"
    )
    assert plan_video(5, 50, 96, 160, num_frames=80, max_pixels=12544).describe() == (
        "5 s = 50 of 80 frames (all there are), 84x140, 375 tokens"
    )
    assert plan_video(0.04, 1, 96, 160, max_pixels=12544).describe() == (
        "0.04 s at 2 fps = 1 frame, 84x140, 15 tokens"
    )
    two_hours = plan_video(7200, 216000, 241, 427, max_pixels=50176).describe()
    assert two_hours.startswith("2:00:00 at 2 fps = 768 of 14400 frames (frame cap), ")
    assert plan_video(599, 17970, 96, 160).describe().startswith("599 s at")
    assert plan_video(601.4, 18042, 96, 160).describe().startswith("0:10:01 at")


def test_total_pixels_shrink_frames_and_then_give_some_up(caplog):
    whole = plan_video(100, 2500, 1080, 1920)
    assert (whole.frames, whole.height * whole.width <= 768 * 784) == (200, True)
    budget = 20000 * 784
    shrunk = plan_video(100, 2500, 1080, 1920, total_pixels=budget)
    assert shrunk.frames == 200 and 17000 < shrunk.tokens <= 20000
    assert "(total pixels)" in shrunk.describe() and not caplog.text
    least = plan_video(100, 2500, 1080, 1920, total_pixels=budget // 2)
    assert least.frames < 200 and least.tokens <= 10000
    assert "frames (total pixels)" in least.describe() and "taking" in caplog.text


def test_a_token_budget_gives_up_frames_and_keeps_their_size():
    whole = plan_video(100, 2500, 240, 320)
    part = plan_video(100, 2500, 240, 320, max_tokens=whole.tokens // 2)
    assert part.frames == whole.frames // 2
    assert (part.height, part.width) == (whole.height, whole.width)
    assert part.seconds[1] == 2 * whole.seconds[1]


def test_an_odd_minimum_of_frames_is_met():
    plan = plan_video(1, 25, 96, 160, min_frames=5)
    assert (plan.frames, plan.frames_reason) == (6, "minimum")


def test_total_pixels_leave_frames_a_little_more_than_the_minimum():
    """As in qwen-vl-utils: at least 1.05 times min_pixels, past which frames are given up."""
    limits = {"min_pixels": 100 * 784, "max_pixels": 400 * 784}
    plan = plan_video(50, 1250, 28 * 7, 28 * 15, total_pixels=2000 * 784, **limits)
    assert (plan.height, plan.width) == (28 * 7, 28 * 15)  # 105 tokens
    assert plan.frames == 2 * (2000 // 105) < plan.requested == 100
    plan = plan_video(50, 1250, 28 * 10, 28 * 11, total_pixels=2000 * 784, **limits)
    assert (plan.height, plan.width) == (28 * 9, 28 * 10)  # 110 tokens are too many


@pytest.mark.parametrize("settings", [{"max_tokens": 14}, {"total_pixels": 14 * 784}])
def test_a_budget_below_two_frames_is_refused_with_what_would_fit(settings):
    limits = {"max_pixels": 12544, "min_pixels": 12544}
    with pytest.raises(ValueError, match=r"84x140 .* 15 tokens.*\(14\): allow 15.*to 10,976"):
        plan_video(5, 50, 96, 160, **limits, **settings)
    assert plan_video(5, 50, 96, 160, **{**limits, "max_pixels": 10976}, **settings).tokens <= 14


@pytest.mark.parametrize(
    "settings", [{"fps": 0}, {"fps": -1.0}, {"num_frames": 0}, {"fps": None, "num_frames": -2}]
)
def test_senseless_requests_are_refused(settings):
    with pytest.raises(ValueError, match=r"must be"):
        plan_video(5, 50, 96, 160, **settings)
    with pytest.raises(ValueError, match="200 times"):
        plan_video(5, 50, 10, 2010)


def test_the_defaults_are_those_of_qwen_vl_utils():
    video_processor = VideoNSAVideoProcessor()
    assert (video_processor.fps, video_processor.min_frames, video_processor.max_frames) == (
        2.0,
        4,
        768,
    )
    assert (video_processor.min_pixels, video_processor.max_pixels) == (128 * 784, 768 * 784)
    assert video_processor.total_pixels == int(128000 * 784 * 0.9)


def test_a_message_sets_its_own_video(processor, clip):
    part = {"type": "video", "video": clip}
    out = take(processor, message(part, {**part, "fps": 4.0, "max_pixels": 56 * 84}))
    assert out["video_grid_thw"].tolist() == [[5, 6, 10], [10, 2, 6]]
    assert out["second_per_grid_ts"].tolist() == [1.0, 0.5]
    assert numbers(processor, out) == list(range(0, 50, 5))
    out = take(processor, message({**part, "nframes": 4}), fps=1.0)
    assert numbers(processor, out) == [0, 12, 25, 37]
    assert out["second_per_grid_ts"].tolist() == [2.5]
    out = take(processor, message({**part, "max_tokens": 44, "total_pixels": None}))
    assert out["video_grid_thw"].tolist() == [[2, 6, 10]]
    out = take(processor, message({**part, "total_pixels": 5 * 4 * 784, "min_pixels": 784}))
    assert out["video_grid_thw"].tolist() == [[5, 2, 4]]
    out = take(processor, message({"type": "video", "path": clip, "resized_height": 56,
                                   "resized_width": 56}))  # fmt: skip
    assert out["video_grid_thw"].tolist() == [[5, 4, 4]]


def test_settings_of_the_call_hold_for_every_video(processor, clip):
    part = {"type": "video", "video": clip}
    out = take(processor, message(part), fps=1.0, min_frames=2)
    assert numbers(processor, out) == [0, 12, 25, 37]
    out = take(processor, message(part), num_frames=2)
    assert numbers(processor, out) == [0, 25]
    out = take(processor, message(part), max_pixels=56 * 56)
    assert out["video_grid_thw"].tolist() == [[5, 2, 4]]
    out = take(processor, message(part), size={"shortest_edge": 784, "longest_edge": 56 * 56})
    assert out["video_grid_thw"].tolist() == [[5, 2, 4]]
    with pytest.raises(ValueError, match="fps and num_frames exclude each other"):
        take(processor, message({**part, "fps": 1.0, "nframes": 4}))


def test_messages_are_left_as_they_were(processor, clip):
    messages = message({"type": "video", "video": clip, "fps": 1.0})
    before = copy.deepcopy(messages)
    take(processor, messages)
    processor.plan_videos(messages, max_tokens=30)
    assert messages == before


def test_a_batch_of_conversations(processor, clip):
    part = {"type": "video", "video": clip}
    image = {"type": "image", "image": Image.fromarray(clips.frame_image(3, 56, 84))}
    rows = [message(), message(image, part, image), message({**part, "fps": 1.0}, part)]
    out = take(processor, rows, padding=True)
    assert out["video_grid_thw"].tolist() == [[5, 6, 10], [2, 6, 10], [5, 6, 10]]
    tokens = (out["input_ids"] == processor.video_token_id).sum(-1)
    assert tokens.tolist() == [0, 75, 30 + 75]
    alone = take(processor, rows[2])
    torch.testing.assert_close(alone["pixel_values_videos"], out["pixel_values_videos"][300:])


@pytest.mark.parametrize("kind", ["pil", "paths", "arrays"])
def test_a_list_of_frames(processor, tmp_path, kind, caplog):
    frames = painted(6)
    if kind == "arrays":
        given = list(frames)
    else:
        given = [Image.fromarray(frame) for frame in frames]
    if kind == "paths":
        for n, frame in enumerate(given):
            frame.save(tmp_path / f"{n}.png")
        given = [str(tmp_path / "0.png"), *(f"file://{tmp_path}/{n}.png" for n in range(1, 6))]
    out = take(processor, message({"type": "video", "video": given, "fps": 1.0}))
    assert numbers(processor, out) == list(range(6))
    assert out["second_per_grid_ts"].tolist() == [2.0]
    assert "taking them for 2 a second" not in caplog.text
    out = take(processor, message({"type": "video", "video": given}))
    assert out["second_per_grid_ts"].tolist() == [1.0]
    assert "taking them for 2 a second" in caplog.text


def test_frames_of_different_sizes_are_refused(processor):
    frames = [Image.new("RGB", (84, 56)), Image.new("RGB", (56, 56))]
    with pytest.raises(ValueError, match=r"must have one size, not \[\(56, 56, 3\), "):
        take(processor, message({"type": "video", "video": frames}))


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_channels_last_arrays_of_four_frames(processor, kind):
    video = painted(4)
    assert video.shape == (4, 56, 84, 3)
    metadata = {"total_num_frames": 40, "fps": 10, "frames_indices": [0, 10, 20, 30]}
    text = take_text(processor)
    first = processor(
        text=text,
        videos=[kind(np.ascontiguousarray(video.transpose(0, 3, 1, 2)))],
        video_metadata=metadata,
        return_tensors="pt",
    )
    last = processor(text=text, videos=[kind(video)], video_metadata=metadata, return_tensors="pt")
    assert last["video_grid_thw"].tolist() == [[2, 4, 6]]
    assert numbers(processor, last) == [0, 1, 2, 3]
    assert last["second_per_grid_ts"].tolist() == [2.0]
    for key in first:
        assert torch.equal(first[key], last[key])


@pytest.mark.parametrize("dtype", [">i2", ">f4", ">u8"])
def test_arrays_of_foreign_byte_order(processor, dtype):
    frames = painted(4).astype(dtype)
    out = take(processor, message({"type": "video", "video": frames}))
    assert numbers(processor, out) == [0, 1, 2, 3]


@pytest.mark.parametrize("order", [(3, 0, 1, 2), (1, 2, 3, 0)], ids=str)
def test_axes_in_another_order_are_refused(processor, order):
    frames = painted(8).transpose(order)
    with pytest.raises(ValueError, match=r"^Frames have 1, 3 or 4 channels, first or last; these"):
        take(processor, message({"type": "video", "video": frames}))


@pytest.mark.parametrize("shape", [(50,), (0, 4, 3), (1, 1, 56, 56, 3), (56, 56, 2)], ids=str)
def test_what_is_no_array_of_an_image_is_refused(processor, shape):
    image = np.zeros(shape, np.uint8)
    for given in (image, [image]):
        with pytest.raises(
            ValueError, match=r"^(An image is \[height, width|Images have 1, 3 or 4)"
        ):
            processor(text="<|image_pad|>", images=given, return_tensors="pt")
    with pytest.raises(ValueError, match=r"^An image of a message is \[height, width, channels\]"):
        take(processor, message({"type": "image", "image": np.zeros((2, 56, 56, 3), np.uint8)}))


def test_a_short_video_beside_a_long_one_keeps_two_frames(processor, clip, tmp_path):
    """Its part of the budget in proportion is less than two frames take."""
    still = str(clips.write_clip(tmp_path / "still.mp4", 2))
    parts = [{"type": "video", "video": video, "fps": 10.0} for video in (clip, still)]
    _, whole = processor.plan_videos(message(*parts))
    step = whole[1].tokens
    assert whole[0].tokens == 25 * step and whole[1].frames == 2
    for budget, frames in ((2 * step, 2), (3 * step + 1, 4), (20 * step, 38)):
        messages, plans = processor.plan_videos(message(*parts), max_tokens=budget)
        assert [plan.frames for plan in plans] == [frames, 2]
        assert sum(plan.tokens for plan in plans) <= budget
    with pytest.raises(ValueError, match="more than the token budget allows"):
        processor.plan_videos(message(*parts), max_tokens=2 * step - 1)


def take_text(processor, videos=1):
    parts = [{"type": "video"} for _ in range(videos)]
    return processor.apply_chat_template(message(*parts), add_generation_prompt=True)


def test_arrays_are_sampled_only_when_asked(processor):
    video, text = painted(50), take_text(processor)
    metadata = {"total_num_frames": 50, "fps": 10.0}
    out = processor(text=text, videos=[video], video_metadata=[metadata], return_tensors="pt")
    assert numbers(processor, out) == list(range(50))
    assert out["second_per_grid_ts"].tolist() == pytest.approx([0.2])
    out = processor(
        text=text,
        videos=[video],
        video_metadata=[metadata],
        do_sample_frames=True,
        fps=2.0,
        return_tensors="pt",
    )
    assert numbers(processor, out) == list(range(0, 50, 5))
    assert out["second_per_grid_ts"].tolist() == [1.0]
    own = VideoNSAVideoProcessor(do_sample_frames=True)
    assert own.plan(video, metadata).frames == own.plan(video, num_frames=10).frames == 10
    own.do_sample_frames = False  # as the library saves it without being asked
    assert own.plan(video, metadata).frames == 50
    out = processor(text=text, videos=[video], max_tokens=60, fps=10.0, return_tensors="pt")
    assert numbers(processor, out) == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27, 30, 32, 35, 37,
                                       40, 42, 45, 47]  # fmt: skip
    assert out["second_per_grid_ts"].tolist() == pytest.approx([0.5])


def test_metadata_that_do_not_fit_are_refused(processor):
    video, text = painted(4), take_text(processor)
    with pytest.raises(ValueError, match="counts 3 frames .* but 4 were"):
        metadata = {"total_num_frames": 40, "fps": 10, "frames_indices": [0, 10, 20]}
        processor(text=text, videos=[video], video_metadata=metadata)
    with pytest.raises(ValueError, match="no fps"):
        processor(text=text, videos=[video], video_metadata={"total_num_frames": 4})
    with pytest.raises(ValueError, match="2 entries of video_metadata"):
        processor(text=text, videos=[video], video_metadata=[{"total_num_frames": 4, "fps": 1}] * 2)
    with pytest.raises(ValueError, match=r"57x84 pixels are not multiples of 28"):
        processor(text=text, videos=[painted(4, 57)], fps=2.0, do_resize=False)


def test_metadata_of_what_has_its_own_are_refused(processor, clip):
    part, frames = {"type": "video", "video": clip}, {"type": "video", "video": painted(4)}
    given = {"fps": 4.0, "total_num_frames": 40}
    with pytest.raises(ValueError, match=r"clip.mp4, which has its own; it tells of frames"):
        take(processor, message(part), video_metadata=given)
    with pytest.raises(ValueError, match=r"clip.mp4, which has its own; it tells of frames"):
        processor.video_processor.plan(clip, given)
    out = take(processor, message(part, frames), video_metadata=[None, given])
    assert out["second_per_grid_ts"].tolist() == [1.0, 5.0]
    planned, _ = processor.plan_videos(message(part, frames), video_metadata=[None, given])
    assert take(processor, planned)["second_per_grid_ts"].tolist() == [1.0, 5.0]
    for metadata in ([given, None], [None, given]):
        with pytest.raises(ValueError, match="a video that was planned before, which has its own"):
            take(processor, planned, video_metadata=metadata)


def test_a_call_says_what_a_plan_comes_before(processor, clip, caplog):
    messages, _ = processor.plan_videos(message({"type": "video", "video": clip}))
    take(processor, messages, size={"shortest_edge": 784, "longest_edge": 3136})
    assert "planned before this call, which ignores max_pixels=3136" in caplog.text
    video = messages[0]["content"][0]["video"]
    processor(text=take_text(processor), videos=[video], fps=[1.0])
    assert "planned before this call, which ignores fps=1.0" in caplog.text


def test_a_source_in_a_call_may_have_settings_as_in_a_message(processor, clip):
    source = {"path": clip, "fps": 1.0}
    out = processor(text=take_text(processor), videos=[source], return_tensors="pt")
    assert out["video_grid_thw"].tolist() == [[2, 6, 10]]
    with pytest.raises(ValueError, match="'max_frame' is no setting of a video"):
        processor(text=take_text(processor), videos={"path": clip, "max_frame": 4})


def test_no_videos_are_refused_by_the_video_processor(processor):
    for stream in (False, True):
        with pytest.raises(ValueError, match="^videos is an empty list"):
            processor.video_processor([], stream=stream)


def test_a_list_of_rates_has_one_for_each_video(processor):
    """qwen-vl-utils gives an empty one where there are no videos."""
    assert processor(text="hello", fps=[])["input_ids"] == processor(text="hello")["input_ids"]
    with pytest.raises(ValueError, match="fps has 1 values for 0 videos"):
        processor(text="hello", fps=[1.0])


@pytest.mark.parametrize("kind", [bool, np.float32, np.int64])
def test_frames_of_different_types_are_refused(processor, kind):
    """True and 1.0 may be white or almost black."""
    first, second = painted(2)
    for frames in ([first, second.astype(kind)], [Image.fromarray(first), second.astype(kind)]):
        with pytest.raises(ValueError, match=r"must have one dtype, not \['torch"):
            take(processor, message({"type": "video", "video": frames, "fps": 2.0}))


@pytest.mark.parametrize("value", [float("nan"), np.float64("nan"), 3, True, object(), {1, 2}])
def test_what_is_no_video_is_refused_where_it_is_given(processor, value):
    messages = message({"type": "video", "video": value})
    for tokenize in (False, True):
        with pytest.raises(ValueError, match="^A video is a path, .*, not an object of type"):
            processor.apply_chat_template(messages, tokenize=tokenize)
    with pytest.raises(ValueError, match="^A video is a path, .*, not an object of type"):
        processor(text=take_text(processor), videos=[value])


def test_what_process_vision_info_gives(processor):
    frames = [Image.fromarray(frame) for frame in painted(7)]
    part = {"type": "video", "video": frames, "sample_fps": 4.0, "max_pixels": 56 * 84}
    messages = message({**part, "min_pixels": 784})
    images, videos, kwargs = process_vision_info(
        messages, return_video_kwargs=True, return_video_metadata=True
    )
    videos, metadata = zip(*videos, strict=True)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    out = processor(
        text=[text],
        images=images,
        videos=list(videos),
        video_metadata=list(metadata),
        do_resize=False,
        return_tensors="pt",
        **kwargs,
    )
    assert numbers(processor, out) == [0, 1, 2, 3, 4, 5, 6, 6]
    assert out["video_grid_thw"].tolist() == [[4, 4, 4]]  # qwen-vl-utils' size of such frames
    assert out["second_per_grid_ts"].tolist() == [0.5]
    # The form of Qwen2.5-VL's own README: a list of rates in place of the metadata.
    images, videos, kwargs = process_vision_info(messages, return_video_kwargs=True)
    assert kwargs["fps"] == [4.0]
    old = processor(text=[text], images=images, videos=videos, return_tensors="pt", **kwargs)
    for key in out:
        assert torch.equal(old[key], out[key])


def test_a_typed_placeholder_is_refused(processor, clip):
    text = "What does <|video_pad|> mean in your prompt?"
    with pytest.raises(ValueError, match=r"2 <\|video_pad\|> placeholders for 1 video: .*What doe"):
        take(processor, message({"type": "video", "video": clip}, text=text))
    image = Image.new("RGB", (56, 56))
    with pytest.raises(ValueError, match=r"2 <\|image_pad\|> placeholders for 1 image: .*see <"):
        take(processor, message({"type": "image", "image": image}, text="I see <|image_pad|>."))
    with pytest.raises(ValueError, match=r"1 <\|video_pad\|> placeholder for 0 videos"):
        processor(text=take_text(processor))
    with pytest.raises(ValueError, match=r"1 <\|video_pad\|> placeholder for 2 videos"):
        processor(text=take_text(processor), videos=[painted(2), painted(2)], fps=2.0)


def test_a_plan_is_what_the_call_takes(processor, clip):
    part = {"type": "video", "video": clip}
    messages, plans = processor.plan_videos(message({**part, "fps": 4.0}, part))
    assert [type(plan).__name__ for plan in plans] == [VideoPlan.__name__] * 2
    assert [plan.tokens for plan in plans] == [150, 75]
    assert take(processor, messages)["video_grid_thw"].tolist() == [[10, 6, 10], [5, 6, 10]]
    messages, plans = processor.plan_videos(messages, max_tokens=100)
    assert [plan.tokens for plan in plans] == [60, 30]
    assert take(processor, messages)["video_grid_thw"].tolist() == [[4, 6, 10], [2, 6, 10]]
    _, plans = processor.plan_videos(message(part), fps=1.0, min_frames=2)
    assert plans[0].describe() == "5 s at 1 fps = 4 frames, 84x140, 30 tokens"
    with pytest.raises(ValueError, match="token budget"):
        processor.plan_videos(message(part, part), max_tokens=20)
    assert processor.video_processor.plan(painted(6), fps=2.0).frames == 6


def test_saved_and_loaded_again(processor, clip, tmp_path):
    processor.video_processor.max_frames, before = 6, processor.video_processor.max_frames
    processor.save_pretrained(tmp_path)
    processor.video_processor.max_frames = before
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["auto_map"]["AutoProcessor"] == "processing_videonsa.VideoNSAProcessor"
    assert saved["video_processor"]["auto_map"]["AutoVideoProcessor"] == (
        "processing_videonsa.VideoNSAVideoProcessor"
    )
    assert (tmp_path / "processing_videonsa.py").read_text() == (
        ROOT / "processing_videonsa.py"
    ).read_text()
    again = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(again).__name__ == "VideoNSAProcessor" and isinstance(again, Qwen2_5_VLProcessor)
    assert again.video_processor.max_frames == 6
    out = take(again, message({"type": "video", "video": clip}))
    assert numbers(again, out) == [0, 8, 16, 25, 33, 41]
    alone = AutoVideoProcessor.from_pretrained(ROOT, trust_remote_code=True, max_pixels=56 * 84)
    assert (type(alone).__name__, alone.max_pixels) == ("VideoNSAVideoProcessor", 56 * 84)


def test_saved_without_having_been_loaded(processor, tmp_path):
    """Classes that were imported, not loaded as remote code, save their code all the same."""
    made = VideoNSAProcessor(
        processor.image_processor,
        processor.tokenizer,
        VideoNSAVideoProcessor(fps=4.0, min_pixels=784, max_pixels=12544),
        chat_template=processor.chat_template,
    )
    made.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(again).__name__ == "VideoNSAProcessor"
    assert (again.video_processor.fps, again.video_processor.max_pixels) == (4.0, 12544)


def test_a_planned_video_says_that_it_cannot_be_sent(processor, clip):
    """It holds an open file. The messages that it was planned from can be sent, and copied."""
    messages = message({"type": "video", "video": clip, "fps": 1.0})
    planned, _ = processor.plan_videos(messages, max_tokens=30)
    with pytest.raises(TypeError, match="cannot be sent to another process.*before plan_videos"):
        pickle.dumps(planned)
    again = pickle.loads(pickle.dumps(messages))
    assert take(processor, again)["video_grid_thw"].tolist() == [[2, 6, 10]]
    for whole in (copy.deepcopy(planned), planned):
        assert take(processor, whole)["video_grid_thw"].tolist() == [[2, 6, 10]]
    for other in (pickle.loads(pickle.dumps(processor)), copy.deepcopy(processor)):
        assert take(other, messages)["video_grid_thw"].tolist() == [[2, 6, 10]]


def test_the_plan_that_was_shown_is_the_plan_that_is_read(processor, clip, caplog):
    part = {"type": "video", "video": clip}
    messages, (plan,) = processor.plan_videos(message(part), fps=1.0)
    assert plan.frames == 4
    assert len(numbers(processor, take(processor, messages))) == 4
    assert not caplog.text
    out = take(processor, messages, fps=2.0, max_pixels=784)
    assert out["video_grid_thw"].tolist() == [[2, 6, 10]]
    assert "planned before this call, which ignores fps=2.0, max_pixels=784" in caplog.text
    messages[0]["content"][0]["fps"] = 2.0  # a message's own settings are a new plan
    assert take(processor, messages)["video_grid_thw"].tolist() == [[5, 6, 10]]
    _, (plan,) = processor.plan_videos(message(part))
    out = processor(text=take_text(processor), videos=[clip], return_tensors="pt")
    assert out["video_grid_thw"].tolist() == [[5, 6, 10]] and plan.frames == 10


def test_the_video_processor_of_another_copy_of_the_code(processor, clip):
    """The loader makes a copy for each folder; here, the classes of the tests and of the loader."""
    mixed = VideoNSAProcessor(
        processor.image_processor,
        processor.tokenizer,
        processor.video_processor,
        chat_template=processor.chat_template,
    )
    assert not isinstance(processor.video_processor, VideoNSAVideoProcessor)
    messages = message({"type": "video", "video": clip, "fps": 1.0})
    planned, (plan,) = mixed.plan_videos(messages)
    assert plan.frames == 4
    for source in (messages, planned):
        assert numbers(mixed, take(mixed, source)) == [0, 12, 25, 37]
    assert numbers(processor, take(processor, mixed.plan_videos(messages)[0])) == [0, 12, 25, 37]
    out = mixed(text=take_text(mixed), videos=[painted(8)], fps=4.0, return_tensors="pt")
    assert numbers(mixed, out) == list(range(8))


def open_files(path):
    links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return sum(os.path.realpath(link) == os.path.realpath(path) for link in links)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_a_dropped_plan_closes_its_file(processor, clip):
    messages, _ = processor.plan_videos(message({"type": "video", "video": clip}))
    assert open_files(clip) == 1
    again, _ = processor.plan_videos(messages, max_tokens=30)
    assert open_files(clip) == 1
    take(processor, again)
    assert open_files(clip) == 0
    again = processor.plan_videos(messages)
    del messages, again
    messages, _ = processor.plan_videos(message({"type": "video", "video": clip}))
    assert open_files(clip) == 1
    del messages
    assert open_files(clip) == 0
    processor.video_processor.plan(clip)
    assert open_files(clip) == 0


VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


def with_metadata(processor, metadata, count=4):
    videos = [painted(count) for _ in range(len(metadata) if isinstance(metadata, list) else 1)]
    return processor(
        text=[VIDEO * len(videos)],
        videos=videos,
        video_metadata=metadata,
        return_metadata=True,
        return_tensors="pt",
    )


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("fps", [-4, 0, float("nan"), float("inf"), "four", "", True, [4], torch.tensor(True)]),
        ("total_num_frames", [3, 0, -1, float("nan"), float("inf"), "many", [4]]),
        (
            "frames_indices",
            [[-1, 0, 1, 2], [3, 2, 1, 0], [0, 1, 2], [], range(5), [0, 1, 2, 2.5], 4, "0123"]
            + [[0, 1, 2, None], [0, 1, 2, float("nan")], [0, 1, 2, "x"]],
        ),
        ("frame_rate", [4]),
    ],
)
def test_video_metadata_that_cannot_be_is_refused_by_its_field(processor, field, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"{field}.*video_metadata|video_metadata.*{field}"):
            with_metadata(processor, {"fps": 2.0, "total_num_frames": 4, field: value})
        with pytest.raises(ValueError, match=rf"{field}.*video_metadata|video_metadata.*{field}"):
            processor.video_processor(
                [painted(4)], video_metadata=[{"fps": 2.0, "total_num_frames": 4, field: value}]
            )


@pytest.mark.parametrize("metadata", ["2 fps", 2, [2], ["2 fps"]])
def test_what_is_no_video_metadata_is_refused(processor, metadata):
    with pytest.raises(ValueError, match="^An entry of video_metadata is .*; it is a dict"):
        with_metadata(processor, metadata)


def test_video_metadata_is_taken_as_it_is_meant(processor):
    meant = {"fps": 4.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]}
    for given in (
        {"fps": "4"},
        {"fps": np.float32(4), "total_num_frames": None},
        {"fps": torch.tensor(4), "total_num_frames": "4", "frames_indices": np.arange(4)},
        {"fps": 4, "total_num_frames": 4.0, "frames_indices": torch.arange(4)},
    ):
        out = with_metadata(processor, given)
        assert {key: out["video_metadata"][0][key] for key in meant} == meant
        assert out["second_per_grid_ts"].tolist() == [0.5]
    # Repeated frames, and numbers that count from the beginning of a file, are usual.
    given = {"fps": 2, "total_num_frames": 4.4, "frames_indices": [5, 5, 6, 7]}
    assert with_metadata(processor, given)["video_metadata"][0]["frames_indices"] == [5, 5, 6, 7]


def test_none_is_an_entry_of_video_metadata(processor):
    out = with_metadata(processor, [None, {"fps": 4.0}])
    assert out["second_per_grid_ts"].tolist() == [1.0, 0.5]


def test_lists_of_media_fit_the_texts_that_they_belong_to(processor):
    image = Image.fromarray(painted(1)[0])
    kinds = {"video": painted(4), "image": image}
    for kind, medium in kinds.items():
        token = VIDEO.replace("video", kind)

        def call(media, *texts, kind=kind):
            return processor(text=list(texts), **{f"{kind}s": media}, padding=True)

        for media, texts in (
            ([[medium], [medium]], (2 * token, "x")),
            ([[medium], (medium,)], ("x", 2 * token)),
            ([[], [medium]], (token, "x")),
        ):
            found, given = [one.count(token) for one in texts], [len(item) for item in media]
            with pytest.raises(ValueError) as error:
                call(media, *texts)
            assert f"The texts have {found} " in str(error.value), error.value
            assert f"have {given}: put each {kind} into" in str(error.value)
        call([[medium], [medium]], token, token)
        call([[medium, medium], []], 2 * token, "x")
        call([medium, medium], 2 * token, "x")
        call([[medium, medium]], token, token)
    call = processor(text=[2 * VIDEO, "x"], videos=[[image, image], [image, image]], padding=True)
    assert len(call["video_grid_thw"]) == 2
