"""What is asked of a video: read as it is meant, or refused by name, wherever it is given."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoProcessor
from transformers.utils import logging
from videonsa.processing_videonsa import VideoNSAVideoProcessor
from videonsa.video_settings_videonsa import SETTINGS, read_setting

import clips
from paths import ROOT

SWITCHES = ("do_sample_frames", "do_resize")
NUMBERS = [name for name in SETTINGS if name not in SWITCHES]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(clips.write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 50))


def message(video, **settings):
    part = {"type": "video", "video": video, **settings}
    return [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]


def take(processor, messages, **kwargs):
    out = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=kwargs
    )
    return out["video_grid_thw"][0].tolist()


ODD = [math.nan, math.inf, -math.inf, -1, "", "two", "nan", [2], {"a": 2}, True, b"2", 2j]


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_refused_by_its_setting(processor, clip, name):
    for value in ODD:
        with pytest.raises(ValueError, match=rf"^{name} is .*; it must be "):
            take(processor, message(clip, **{name: value}))
    for value in ODD[:2]:
        with pytest.raises(ValueError, match=rf"^{name} is .*; it must be "):
            take(processor, message(clip), **{name: value})
        with pytest.raises(ValueError, match=rf"^{name} is .*; it must be "):
            VideoNSAVideoProcessor(**{name: value}).plan(clip)
    with pytest.raises(ValueError, match=r"^max_tokens is nan; it must be a finite number"):
        processor.plan_videos(message(clip), max_tokens=math.nan)


@pytest.mark.parametrize(
    "settings",
    [
        {"fps": 1e308},
        {"fps": 1e-300, "min_frames": 0},
        {"video_end": 1e-300, "min_frames": 0},
        {"max_pixels": 1e300, "max_frames": 1e300},
    ],
)
def test_numbers_that_are_very_large_or_small_leave_a_plan(processor, clip, settings):
    _, (plan,) = processor.plan_videos(message(clip, **settings))
    assert 1 <= plan.frames <= 50 and plan.tokens >= 1


def test_pixels_that_are_too_few_for_a_token_are_refused(processor, clip):
    with pytest.raises(ValueError, match="more than the total pixels allows"):
        processor.plan_videos(message(clip, min_pixels=0, total_pixels=1))


@pytest.mark.parametrize("name", ["fps", "do_resize", "video_decoder"])
def test_a_file_in_a_settings_place_does_not_fill_the_message(processor, clip, name):
    for value in ("data:video/mp4;base64," + "A" * 10**5, {"url": "A" * 10**5}):
        with pytest.raises(ValueError, match=rf"^{name} is .*; it must be ") as error:
            processor.plan_videos(message(clip, **{name: value}))
        assert len(str(error.value)) < 200


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_true_or_false(processor, clip, name):
    for value in (2, -1, 0.5, math.nan, "", "2", [True], [False]):
        with pytest.raises(ValueError, match=rf"^{name} is .*; it must be True or False"):
            take(processor, message(clip, **{name: value}))
    for value in (0, np.False_, torch.tensor(False)):
        assert read_setting(name, value) is False
    assert read_setting(name, 1) is True


CALL_SWITCHES = {name: "pixel_values_videos" for name in ("do_rescale", "do_normalize", "stream")}
CALL_SWITCHES |= {"return_metadata": "video_metadata"}
CALL_SWITCHES |= {"return_mm_token_type_ids": "mm_token_type_ids"}


@pytest.mark.parametrize("name", [*CALL_SWITCHES, "do_convert_rgb", "progress"])
def test_a_switch_of_a_call_is_true_or_false(processor, clip, name):
    text = processor.apply_chat_template(message(clip))

    def result(**kwargs):
        out = processor(text=text, videos=[clip], return_tensors="pt", max_pixels=784, **kwargs)
        value = out.get(CALL_SWITCHES.get(name, "pixel_values_videos"))
        if isinstance(value, torch.Tensor):
            return value.float().mean().item()
        return type(value).__name__

    for value in (False, True):
        expected = result(**{name: value})
        for same in (int(value), np.bool_(value), torch.tensor(value)):
            assert result(**{name: same}) == expected
            if not name.startswith("return_"):  # which is of the whole call
                assert result(videos_kwargs={name: same}) == expected
    assert result(**{name: None}) == result()
    for value in ("no", "yes", 2, [True]):
        with pytest.raises(ValueError, match=rf"^{name} is .*; it must be True or False"):
            result(**{name: value})
        with pytest.raises(ValueError, match=rf"^{name} is .*; it must be True or False"):
            processor.video_processor([clip], **{name: value})
        with pytest.raises(ValueError, match=rf"^{name} is .*; it must be True or False"):
            VideoNSAVideoProcessor(**{name: value})


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("fsp", "fps"),
        ("max_frame", "max_frames"),
        ("maxPixels", "max_pixels"),
        ("nframe", "num_frames"),
        ("video_starts", "video_start"),
        ("do_sample", "do_sample_frames"),
    ],
)
def test_a_setting_with_a_typo_is_refused_wherever_it_is_given(processor, clip, typo, meant):
    error = f"^'{typo}' is no setting of a video; did you mean '{meant}'"
    for call in (
        lambda: take(processor, message(clip, **{typo: 1})),
        lambda: take(processor, message(clip), **{typo: 1}),
        lambda: take(processor, message(clip), videos_kwargs={typo: 1}),
        lambda: processor.plan_videos(message(clip), **{typo: 1}),
        lambda: processor.video_processor.plan(clip, **{typo: 1}),
    ):
        with pytest.raises(ValueError, match=error):
            call()
    image = {"type": "image", "image": np.zeros((56, 56, 3), np.uint8), "max_pixel": 784}
    with pytest.raises(ValueError, match="'max_pixel' is no setting of an image; .*'max_pixels'"):
        processor.apply_chat_template([{"role": "user", "content": [image]}])


def test_what_is_no_setting_is_said(processor, clip, caplog):
    """What others write into their messages is left out; what the library takes is not named."""
    take(processor, message(clip, cache_control={"type": "ephemeral"}, name="a clip"))
    assert "Not a setting of a video, ignored: cache_control, name." in caplog.text
    processor.plan_videos(message(clip), channel="red")
    assert "Not a setting of a video, ignored: channel." in caplog.text
    caplog.clear()
    processor.plan_videos(message(clip), stream=True, do_rescale=False, progress=False)
    take(processor, message(clip), do_rescale=True, resample=3, padding=True)
    assert not caplog.text


def test_size_and_the_pixel_bounds_are_two_names_of_one_setting(processor, clip):
    size, other = ({"shortest_edge": 784, "longest_edge": most} for most in (3136, 12544))
    assert take(processor, message(clip), size=size) == [5, 2, 4]
    assert take(processor, message(clip), size=size, max_pixels="3136") == [5, 2, 4]
    assert take(processor, message(clip, max_pixels=3136), size=other) == [5, 2, 4]
    for bounds in ({"max_pixels": 12544}, {"min_pixels": 3136}):
        for call in (take, lambda p, m, **kwargs: p.plan_videos(m, **kwargs)):
            with pytest.raises(ValueError, match="^size is .* two names of one setting; give one"):
                call(processor, message(clip), size=size, **bounds)


def test_a_minimum_that_gives_way_is_said(processor, clip, caplog):
    logging.warning_once.cache_clear()
    assert take(processor, message(clip, max_pixels=784, max_frames=2)) == [1, 2, 2]
    assert not caplog.text
    assert take(processor, message(clip, min_pixels=10**6), min_frames=20, max_frames=4)[0] == 2
    assert "min_pixels is 1,000,000, more than max_pixels, 12,544, which holds" in caplog.text
    assert "min_frames is 20, more than max_frames, 4, which holds" in caplog.text


@pytest.mark.parametrize("asked", [{"fps": 1.0}, {"num_frames": 2}])
def test_a_rate_that_chooses_nothing_is_said(processor, clip, asked, caplog):
    ((name, value),) = asked.items()
    frames = np.stack([clips.frame_image(n, 56, 84) for n in range(4)])
    calls = [
        lambda switch: take(processor, message(clip, do_sample_frames=switch, **asked)),
        lambda switch: processor.video_processor.plan(
            frames, {"fps": 10.0}, do_sample_frames=switch or None, **asked
        ),
    ]
    for call in calls:
        logging.warning_once.cache_clear()
        caplog.clear()
        call(True)
        assert not caplog.text
        call(False)
        assert f"so all are taken, whatever {name}={value:g} says" in caplog.text


def test_zero_is_not_the_same_as_nothing(processor, clip):
    part = take(processor, message(clip))
    for name in ("num_frames", "max_frames", "max_pixels", "resized_height"):
        with pytest.raises(ValueError, match=f"^{name} is 0; it must be at least 1"):
            take(processor, message(clip, **{name: 0}))
    with pytest.raises(ValueError, match="fps is 0; it must be positive"):
        take(processor, message(clip, fps=0))
    with pytest.raises(ValueError, match="video_end 0 leave nothing"):
        take(processor, message(clip, video_end=0))
    for name in ("max_tokens", "total_pixels"):
        with pytest.raises(ValueError, match=r"allows \(0\)"):
            take(processor, message(clip, **{name: 0}))
    for name in ("min_frames", "min_pixels", "video_start"):
        assert take(processor, message(clip, **{name: 0})) == part
    frames = np.stack([clips.frame_image(n, 57, 84) for n in range(4)])
    with pytest.raises(ValueError, match="57x84 pixels are not multiples of 28"):
        take(processor, message(frames, do_resize=0, fps=2.0))
    assert take(processor, message(clip, do_sample_frames=0))[0] == 25


def test_numbers_are_taken_as_they_are_meant(processor, clip):
    for value in ("1", " 1.0 ", np.float32(1), torch.tensor(1), np.array(1)):
        assert take(processor, message(clip, fps=value)) == [2, 6, 10]
    assert take(processor, message(clip, num_frames="4", max_pixels="3136")) == [2, 2, 4]
    assert take(processor, message(clip), num_frames=np.int64(4)) == [2, 6, 10]
    assert take(processor, message(clip, max_tokens=30.9)) == [2, 6, 10]
    assert take(processor, message(clip, video_start="1", video_end="3")) == [2, 6, 10]
    assert VideoNSAVideoProcessor(fps="1", max_pixels="12544").plan(clip).frames == 4
    _, (plan,) = processor.plan_videos(message(clip), max_tokens="30")
    assert plan.tokens == 30
    assert read_setting("max_pixels", 0.9 * 1000) == 900
    with pytest.raises(ValueError, match=r"num_frames is 2.5; it must be a whole number"):
        take(processor, message(clip, num_frames=2.5))


def test_settings_that_go_together(processor, clip):
    for name in ("resized_height", "resized_width"):
        with pytest.raises(ValueError, match="give both or neither"):
            take(processor, message(clip, **{name: 56}))
    assert take(processor, message(clip, resized_height=56), resized_width=84) == [5, 4, 6]
    with pytest.raises(ValueError, match="^size is .*; it has shortest_edge and longest_edge"):
        take(processor, message(clip), size={"height": 56, "width": 84})
    with pytest.raises(ValueError, match="Neither fps nor num_frames is set"):
        VideoNSAVideoProcessor(fps=None).plan(clip)
    with pytest.raises(ValueError, match="max_frames is None; it must be a number"):
        VideoNSAVideoProcessor(max_frames=None).plan(clip)


def test_a_processor_keeps_its_bounds_to_itself():
    before = VideoNSAVideoProcessor().min_pixels, VideoNSAVideoProcessor().max_pixels
    VideoNSAVideoProcessor(min_pixels=784, max_pixels=3136)
    assert (VideoNSAVideoProcessor().min_pixels, VideoNSAVideoProcessor().max_pixels) == before


@pytest.mark.parametrize("name", ["video_start", "video_end"])
def test_frames_that_are_given_have_no_start_or_end(processor, name):
    frames = np.stack([clips.frame_image(n, 56, 84) for n in range(4)])
    for video in (frames, list(frames)):
        with pytest.raises(ValueError, match="video_start and video_end are times in a file"):
            take(processor, message(video, fps=2.0, **{name: 1}))


@pytest.mark.parametrize("frames", [[], np.zeros((0, 56, 84, 3), np.uint8), (), torch.zeros(0)])
def test_a_video_without_frames_is_refused(processor, frames):
    with pytest.raises(ValueError, match=r"no frames|must be \[frames, height, width, 3\]"):
        take(processor, message(frames))


@pytest.mark.parametrize(
    "two", [{"nframes": 4, "num_frames": 6}, {"fps": 2, "sample_fps": 1}, {"nframes": 4, "fps": 2}]
)
def test_two_names_of_one_setting_in_one_place_are_refused(processor, clip, two):
    with pytest.raises(ValueError, match="give one"):
        take(processor, message(clip, **two))
    with pytest.raises(ValueError, match="give one"):
        processor.plan_videos(message(clip), **two)
    one, other = two
    assert take(processor, message(clip, **two | {other: None})) == take(
        processor, message(clip, **{one: two[one]})
    )


def test_a_bool_is_no_number_in_any_type(processor, clip):
    for value in (True, np.True_, np.array(True), torch.tensor(True)):
        with pytest.raises(ValueError, match="^fps is .*; it must be a finite number"):
            take(processor, message(clip, fps=value))


@pytest.mark.parametrize("name", sorted(set(NUMBERS) - {"fps", "video_readers"}))
def test_none_in_a_call_is_not_asked(processor, clip, name):
    assert take(processor, message(clip), **{name: None}) == take(processor, message(clip))
    assert take(processor, message(clip), videos_kwargs={name: None}) == [5, 6, 10]


def test_bounds_of_a_rate_that_a_number_of_frames_passes_are_said(processor, clip, caplog):
    logging.warning_once.cache_clear()
    assert take(processor, message(clip, num_frames=8), max_frames=4)[0] == 4
    assert "max_frames is 4 and num_frames 8, which holds: max_frames bounds what" in caplog.text
    assert take(processor, message(clip, num_frames=2, min_frames=6))[0] == 1
    assert "min_frames is 6 and num_frames 2, which holds" in caplog.text
    caplog.clear()
    logging.warning_once.cache_clear()
    take(processor, message(clip, num_frames=2))  # less than the default minimum
    take(processor, message(clip, num_frames=8), max_frames=8)
    assert not caplog.text
