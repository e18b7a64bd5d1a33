"""Video files as users have them: the frames that come out are those on screen at their times."""

import base64
import http.server
import io
import os
import random
import resource
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, features
from transformers import AutoProcessor
from transformers.utils import logging
from videonsa.video_plan_videonsa import plan_video
from videonsa.video_reader_videonsa import Remeasure, VideoFile

import clips
from paths import ROOT

TENTHS = [i / 10 for i in range(1000)]  # times of a clip at 10 frames a second


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)


@pytest.fixture(scope="module")
def module(processor):
    """The module of the processor's own classes, which the loader made."""
    return sys.modules[type(processor).__module__]


@pytest.fixture(autouse=True)
def fresh_notices():
    logging.warning_once.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clips")


def frames_of(processor, out, video=0):
    """The frames back from the patches of one video: uint8 [frames, height, width, 3]."""
    grids = out["video_grid_thw"]
    start = int(grids[:video].prod(-1).sum())
    t, h, w = grids[video].tolist()
    patches = out["pixel_values_videos"][start : start + t * h * w]
    patches = patches.view(t, h // 2, w // 2, 2, 2, 3, 2, 14, 14).permute(0, 6, 1, 3, 7, 2, 4, 8, 5)
    frames = patches.reshape(t * 2, h * 14, w * 14, 3)
    mean = torch.tensor(processor.video_processor.image_mean)
    std = torch.tensor(processor.video_processor.image_std)
    return ((frames * std + mean) * 255).round().clamp(0, 255).byte().numpy()


def read(processor, video, **settings):
    """(frames, metadata, all outputs) of one video through a message with these settings."""
    video = video if isinstance(video, bytes) else str(video)
    part = {"type": "video", "video": video, **settings}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "What is shown?"}]}]
    out = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"return_metadata": True},
    )
    frames, metadata = frames_of(processor, out), out["video_metadata"][0]
    assert (out["input_ids"] == processor.video_token_id).sum() == out["video_grid_thw"].prod() // 4
    return frames[: len(metadata.frames_indices)], metadata, out


def check(frames, metadata, times, duration):
    """Each frame is on screen at its time, and the times reach from start to end."""
    numbers = [clips.number_in(frame) for frame in frames]
    shown = [clips.on_screen(times, second) for second in metadata.timestamps]
    assert len(numbers) == len(shown)
    assert max(abs(a - b) for a, b in zip(numbers, shown, strict=True)) <= 1
    assert numbers[0] == 0 and metadata.timestamps[0] == 0
    interval = duration / len(numbers)
    assert metadata.timestamps[-1] == pytest.approx(duration - interval, abs=0.1)
    assert metadata.duration == pytest.approx(duration)
    return numbers


def test_a_clip_is_sampled_evenly(processor, folder):
    path = clips.write_clip(folder / "plain.mp4", 50)
    frames, metadata, out = read(processor, path, fps=2)
    assert check(frames, metadata, TENTHS, 5) == [0, 5, 10, 15, 20, 25, 30, 35, 40, 45]
    assert (metadata.fps, metadata.total_num_frames) == (10, 50)
    assert out["second_per_grid_ts"].tolist() == [1.0]
    assert all(map(clips.is_upright, frames))


def test_the_numbers_of_an_ordinary_file(processor, folder):
    """29.97 frames a second, and a part of them that is no whole number of frames."""
    rate = Fraction(30000, 1001)
    path = clips.write_clip(folder / "ntsc.mp4", 120, rate=rate, options={"g": "30"})
    _, metadata, out = read(processor, path, fps=2)
    assert (metadata.total_num_frames, metadata.fps) == (120, pytest.approx(float(rate)))
    assert metadata.frames_indices == [0, 15, 30, 45, 60, 75, 90, 105]
    assert out["second_per_grid_ts"].tolist() == pytest.approx([2 * metadata.duration / 8])
    _, metadata, out = read(processor, path, fps=2, video_start=1.01, video_end=3.04)
    assert (metadata.total_num_frames, metadata.duration) == (61, pytest.approx(2.03))
    assert metadata.fps == pytest.approx(61 / 2.03)
    assert out["second_per_grid_ts"].tolist() == pytest.approx([2 * 2.03 / 4])


@pytest.mark.parametrize("shown", clips.DISPLAYED)
def test_a_turned_or_mirrored_video_comes_upright(processor, folder, caplog, shown):
    matrix = clips.DISPLAYED[shown]
    frames, metadata, out = read(processor, clips.displayed(folder, *matrix), fps=2)
    assert all(map(clips.is_upright, frames))
    assert [clips.number_in(frame) for frame in frames] == [0, 5, 10, 15]
    tall = matrix[0] == 0
    assert (metadata.height, metadata.width) == ((160, 96) if tall else (96, 160))
    assert out["video_grid_thw"].tolist() == [[2, 10, 6] if tall else [2, 6, 10]]
    assert not caplog.messages


def test_a_display_matrix_of_no_quarter_turns(processor, folder, caplog):
    """Shown at an angle: read as the nearest quarter turn, and said; zeros mean nothing."""
    path = clips.displayed(folder, *clips.DISPLAYED["a quarter to the right"], name="askew.mp4")
    clips.set_display_matrix(path, 0.17, 0.98, -0.98, 0.17)
    assert all(map(clips.is_upright, read(processor, path, fps=2)[0]))
    assert "askew.mp4: its picture is shown turned by 80 degrees, and is read" in caplog.text
    path = clips.displayed(folder, *clips.DISPLAYED["upright"], name="zeros.mp4")
    clips.set_display_matrix(path, 0, 0, 0, 0)
    assert all(map(clips.is_upright, read(processor, path, fps=2)[0]))


@pytest.mark.parametrize("suffix", [".mkv", ".webm"])
def test_a_header_without_a_count(processor, folder, suffix):
    frames, metadata, _ = read(processor, clips.no_frame_count(folder, suffix), fps=2)
    assert check(frames, metadata, TENTHS, 5) == list(range(0, 50, 5))


def test_a_changing_rate(processor, folder):
    path, times = clips.changing_rate(folder), [ms / 1000 for ms in clips.CHANGING_RATE_MS]
    frames, metadata, out = read(processor, path, fps=1)
    assert check(frames, metadata, times, 6) == [0, 30, 60, 65, 70, 75]
    assert metadata.timestamps == pytest.approx([0, 1, 2, 3, 4, 5])
    assert out["second_per_grid_ts"].tolist() == [2.0]
    check(*read(processor, path, fps=2)[:2], times, 6)


@pytest.mark.parametrize("settings", [{}, {"fps": 30}, {"num_frames": 8}, {"min_frames": 16}])
def test_one_frame(processor, folder, settings):
    frames, metadata, out = read(processor, clips.one_frame(folder), **settings)
    assert out["video_grid_thw"][0, 0] == 1
    assert (len(frames), metadata.total_num_frames, metadata.frames_indices) == (1, 1, [0])
    assert out["second_per_grid_ts"].isfinite().all()


def test_an_empty_file_is_refused(processor, folder):
    (folder / "empty.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.mp4 is empty \(0 bytes\)"):
        read(processor, folder / "empty.mp4")


def test_a_cut_file_is_refused_quickly(processor, folder):
    path, start = clips.cut_short(folder), time.monotonic()
    with pytest.raises(ValueError, match=r"cut\.mp4 should last 10\.0 s .* first [23]\.\d s"):
        read(processor, path)
    assert time.monotonic() - start < 10


def test_a_cut_file_without_index_is_refused(processor, folder):
    whole = clips.write_clip(folder / "whole.webm", 60, codec="libvpx-vp9")
    (folder / "part.webm").write_bytes(whole.read_bytes()[: whole.stat().st_size // 3])
    with pytest.raises(ValueError, match=r"part\.webm should last 6\.0 s"):
        read(processor, folder / "part.webm")
    whole = clips.write_clip(folder / "plain.mp4", 50)
    (folder / "part.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"part\.mp4 cannot be opened"):
        read(processor, folder / "part.mp4")


def test_lost_pictures_are_never_replaced_by_others(processor, folder):
    with pytest.raises(ValueError, match=r"end\.mp4 can be read only up to [3-7]\.\d s of 10\.0 s"):
        read(processor, clips.with_a_hole(folder, "end.mp4", 0.7, 1.0))
    with pytest.raises(ValueError, match=r"start\.mp4 is damaged: its first [3-7]\.\d s cannot"):
        read(processor, clips.with_a_hole(folder, "start.mp4", 0.4, 0.7))
    path = clips.with_a_hole(folder, "middle.mp4", 0.5, 0.6)
    with pytest.raises(ValueError, match=r"middle\.mp4 is damaged around [12]\.\d s"):
        read(processor, path)
    frames, metadata, _ = read(processor, path, video_end=1.2)  # what comes before is whole
    assert [clips.number_in(frame) for frame in frames] == [0, 3, 6, 9]


@pytest.mark.parametrize(("seconds", "most"), [(5, 6.0), (100, 102.0)])
def test_how_much_a_header_may_promise(folder, seconds, most):
    """A second, or 2 % of a long file: containers round, and sound ends later."""
    path = clips.write_clip(folder / "promise.mp4", seconds, rate=1, options={"g": "5"})

    class Promising(VideoFile):
        def _promised_end(self):
            return self.promised

    Promising.promised = most - 0.05
    assert Promising(str(path)).duration == seconds
    Promising.promised = most + 0.05
    with pytest.raises(ValueError, match=r"promise\.mp4 should last .* only the first"):
        Promising(str(path))


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_packets_that_the_container_calls_corrupt(folder, codec):
    """A decoder shows such pictures, and those made from them, without a word."""
    rate = {"rate": 25} if codec == "mpeg2video" else {}
    path = clips.write_clip(
        folder / "lossy.ts", 100, 480, 640, codec=codec, options={"g": "20", "crf": "5"}, **rate
    )
    data = path.read_bytes()
    at = len(data) // 188 // 2 * 188
    path.write_bytes(data[:at] + data[at + 3 * 188 :])
    with av.open(str(path)) as file:
        start = file.streams.video[0].start_time
        packets = [(float((p.pts - start) * p.time_base), p) for p in file.demux(video=0) if p.size]
    hole = min(time for time, packet in packets if packet.is_corrupt)
    key = min(time for time, packet in packets if packet.is_keyframe and time > hole)
    with VideoFile(str(path)) as file:
        shown = set()
        for time, _ in packets:
            try:
                list(file.frames_at([time]))
                shown.add(time)
            except ValueError as error:
                assert "is damaged around" in str(error)
        assert shown >= {time for time, _ in packets if not hole - 0.4 < time < key}
        assert not any(hole + 3 / file.rate < time < key - 0.01 for time in shown)


def test_a_recording_that_starts_between_two_key_frames(folder, caplog):
    """What cannot be decoded before the first key frame is left out, and said."""
    options = {"g": "20", "bf": "0", "sc_threshold": "0"}
    path = clips.write_clip(folder / "tuned.ts", 60, options=options)
    with av.open(str(path)) as file:
        late = min(p.pos for p in file.demux(video=0) if p.pos and p.pts * p.time_base > 0.65)
    path.write_bytes(path.read_bytes()[late // 188 * 188 :])
    with VideoFile(str(path)) as file:
        times = file.frame_times()
        numbers = [clips.number_in(file.image(frame)) for _, frame in file.frames_at(times)]
        assert numbers == list(range(20, 60)) and file.frames == 40
        assert (times[0], file.duration) == (0, pytest.approx(4))


def test_a_header_that_promises_too_much(processor, folder, caplog):
    frames, metadata, _ = read(processor, clips.boastful_header(folder), fps=2)
    assert check(frames, metadata, TENTHS, 4) == list(range(0, 40, 5))
    assert "boast.avi should last 44.4 s by its header, but only the first 4.0 s" in caplog.text


def test_a_wrong_count_is_mended_by_decoding(folder):
    with VideoFile(str(clips.write_clip(folder / "raw.h264", 60))) as file:
        file.frames, file.duration = 80, 8.0
        with pytest.raises(Remeasure):
            list(file.frames_at([0, 7.5]))
        assert (file.frames, file.duration) == (60, pytest.approx(6))


def test_other_files_are_refused(processor, folder):
    with pytest.raises(ValueError, match=r"sound\.m4a has no picture track \(tracks: audio\)"):
        read(processor, clips.sound_only(folder))
    (folder / "notes.mp4").write_text("no video at all " * 100)
    with pytest.raises(ValueError, match=r"notes\.mp4 cannot be opened as a video .*ffmpeg -i"):
        read(processor, folder / "notes.mp4")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.mp4"):
        read(processor, folder / "nowhere.mp4")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_sound_that_outlasts_the_picture(processor, folder, suffix):
    frames, metadata, _ = read(processor, clips.long_sound(folder, suffix), fps=2)
    assert check(frames, metadata, TENTHS, 4) == [0, 5, 10, 15, 20, 25, 30, 35]


@pytest.mark.parametrize("sound", [0, 1])
def test_a_track_of_sound_is_seen(tmp_path, sound):
    with VideoFile(str(clips.write_clip(tmp_path / "clip.mp4", 10, sound=sound))) as file:
        assert file.has_sound == bool(sound)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_late_start(processor, folder, suffix):
    frames, metadata, _ = read(processor, clips.late_start(folder, suffix), fps=1)
    assert check(frames, metadata, TENTHS, 6) == [0, 10, 20, 30, 40, 50]


def test_ten_bits(processor, folder):
    frames, _, _ = read(processor, clips.ten_bit(folder))
    for frame in frames:
        assert np.abs(frame[8, 8].astype(int) - clips.RED).max() <= 6
        assert np.abs(frame[-8, -8].astype(int) - clips.GREY).max() <= 6


def test_shuffled_stamps(processor, folder, caplog):
    frames, metadata, _ = read(processor, clips.shuffled_stamps(folder), fps=1)
    assert check(frames, metadata, TENTHS, 6) == [0, 10, 20, 30, 40, 50]
    assert "decoding the whole file from its start" in caplog.text


JOINED = {
    "h264.ts": {"options": {"g": "20", "bf": "3"}},
    "plain.ts": {"options": {"g": "20", "bf": "0"}},
    "h264.mkv": {"options": {"g": "20", "bf": "0"}},
    "reordered.mkv": {"options": {"g": "20", "bf": "3"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "rate": 25},
}


@pytest.mark.parametrize("counts", [(20, 30), (30, 20), (30, 30), (60, 8)], ids=str)
@pytest.mark.parametrize("kind", JOINED)
def test_joined_recordings(processor, folder, caplog, kind, counts):
    """A clock that starts again: every frame of both, at its time, and one notice."""
    name, suffix = kind.split(".")
    options, rate = JOINED[kind], JOINED[kind].get("rate", 10)
    path = clips.joined(folder, f"_{name}.{suffix}", *counts, **options)
    times, duration = [i / rate for i in range(sum(counts))], sum(counts) / rate
    frames, metadata, _ = read(processor, path, fps=rate / 2)
    check(frames, metadata, times, duration)
    frames, metadata, _ = read(processor, path, do_sample_frames=False)
    assert [clips.number_in(frame) for frame in frames] == list(range(sum(counts)))
    said = [line for line in caplog.messages if "joined of recordings" in line]
    assert len(said) == 1 and f"starts again at {counts[0] / rate:.1f} s" in said[0]


@pytest.mark.parametrize("options", [{"bf": "3"}, {"bf": "0"}], ids=str)
def test_a_slow_screen_recording_is_not_taken_for_two(processor, folder, caplog, options):
    """FFmpeg does not know when its first two packets are decoded where there are B-frames."""
    path = clips.write_clip(folder / "screen.mkv", 12, rate=1, options=options)
    frames, metadata, _ = read(processor, path, fps=1)
    assert check(frames, metadata, list(range(12)), 12) == list(range(12))
    assert not caplog.messages


NOT_READ_ON = {
    "index last.mp4": {},
    "index first.mp4": {"container": {"movflags": "faststart"}},
    "plain.mov": {},
    "plain.flv": {},
    "plain.wmv": {"codec": "wmv2"},
}


@pytest.mark.parametrize("name", NOT_READ_ON)
def test_a_second_recording_that_is_not_read_is_said(processor, tmp_path, caplog, name):
    path = clips.joined(tmp_path, f" {name}", 20, 30, **NOT_READ_ON[name])
    said = f"{path.name}: another recording follows after its end and is not read; join them with"
    for video in (path, path.read_bytes()):
        caplog.clear()
        logging.warning_once.cache_clear()
        frames, *_ = read(processor, video, fps=2)
        assert [clips.number_in(frame) for frame in frames] == [0, 5, 10, 15]
        assert (said if video is path else said.split(":")[1]) in caplog.text
    caplog.clear()
    read(processor, tmp_path / f"first {name}", fps=2)
    assert not caplog.messages


def test_fragments_of_several_headers(processor, tmp_path, caplog):
    """Read on where the clock goes on; FFmpeg finds the wrong bytes or hides some elsewhere."""
    path = clips.header_again(tmp_path)
    frames, *_ = read(processor, path, do_sample_frames=False)
    assert [clips.number_in(frame) for frame in frames] == list(range(40))
    assert not caplog.messages
    for flags in ("frag_keyframe+empty_moov", "frag_keyframe+empty_moov+default_base_moof"):
        path = clips.joined(tmp_path, ".mp4", 20, 30, container={"movflags": flags})
        with pytest.raises(ValueError, match="joined byte by byte of fragmented MP4 .*ffmpeg -f"):
            read(processor, path)


@pytest.mark.parametrize(("size", "said"), [((160, 96), True), ((192, 320), False)])
def test_pictures_that_change_their_shape_are_said(processor, tmp_path, caplog, size, said):
    """Between two broadcasts, say; another size of the same shape is no matter."""
    parts = [
        clips.write_clip(tmp_path / "a.ts", 20),
        clips.write_clip(tmp_path / "b.ts", 20, *size),
    ]
    path = tmp_path / "sizes.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    frames, *_ = read(processor, path, fps=2)
    assert [clips.number_in(frame) for frame in frames] == 2 * [0, 5, 10, 15]
    notice = "sizes.ts: its pictures change their shape, from 96x160 to 160x96; all are stretched"
    assert (notice in caplog.text) is said


def test_a_clock_that_jumps_ahead(processor, folder):
    """The second recording of a transport stream comes from later in the day."""
    parts = [
        clips.write_clip(folder / "now.ts", 30, options={"bf": "0"}),
        clips.write_clip(
            folder / "later.ts",
            20,
            options={"bf": "0"},
            late=5000,
            paint=lambda n, h, w: clips.frame_image(n + 30, h, w),
        ),
    ]
    path = folder / "day.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    check(*read(processor, path, fps=2)[:2], TENTHS, 5)


@pytest.mark.parametrize("gop", [1, 10])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_long_gap_before_the_last_picture(processor, folder, suffix, gop):
    path = clips.stopped_after_stillness(folder, suffix, gop)
    frames, metadata, _ = read(processor, path, fps=0.5)
    assert metadata.duration == pytest.approx(12.033, abs=0.1)
    assert [clips.number_in(frame) for frame in frames] == [0, 59, 59, 59, 59, 59]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_leap_of_the_clock_is_noticed(processor, folder, suffix, caplog):
    times = [100 * i + (600_000 if i >= 20 else 0) for i in range(40)]
    path = clips.write_clip(folder / f"leap{suffix}", 40, times_ms=times)
    frames, *_ = read(processor, path, num_frames=16)
    assert [clips.number_in(frame) for frame in frames].count(19) == 15
    assert "15 of 16 frames are one picture, on screen from 1.9 to " in caplog.text


def test_a_leap_of_the_clock_after_the_first_frame_is_noticed(processor, folder, caplog):
    times = [100 * i + (600_000 if i else 0) for i in range(40)]
    path = clips.write_clip(folder / "leap_at_once.mp4", 40, times_ms=times)
    frames, *_ = read(processor, path, num_frames=16)
    assert {clips.number_in(frame) for frame in frames} == {0}
    assert "16 of 16 frames are one picture, on screen from 0.0 to 604.0 s" in caplog.text


def test_a_low_mean_rate(processor, folder):
    path, times = clips.two_bursts(folder), [ms / 1000 for ms in clips.BURSTS_MS]
    for fps in (0.02, 0.1):
        frames, metadata, _ = read(processor, path, fps=fps)
        check(frames, metadata, times, metadata.duration)
        assert metadata.duration == pytest.approx(301, abs=0.1)
        assert np.diff(metadata.timestamps) == pytest.approx(301 / len(frames), abs=0.1)


@pytest.mark.parametrize(
    "settings",
    [{"do_sample_frames": False}, {"num_frames": 60}, {"fps": 20.0}, {"fps": 9.0}],
    ids=str,
)
def test_no_frame_comes_twice_where_the_header_counts_hidden_ones(processor, folder, settings):
    frames, metadata, _ = read(processor, clips.hidden_start(folder), **settings)
    numbers = [clips.number_in(frame) for frame in frames]
    assert len(numbers) >= 40 and numbers[0] == 15
    assert len(set(numbers)) == len(numbers)
    if "do_sample_frames" in settings:
        assert numbers == list(range(15, 60)) and metadata.total_num_frames == 45


def test_every_frame_of_a_changing_rate(processor, folder):
    path, times = clips.changing_rate(folder), [ms / 1000 for ms in clips.CHANGING_RATE_MS]
    frames, metadata, out = read(processor, path, do_sample_frames=False)
    assert [clips.number_in(frame) for frame in frames] == list(range(80))
    assert metadata.timestamps == pytest.approx(times, abs=1e-3)
    assert out["second_per_grid_ts"].tolist() == pytest.approx([2 * 6 / 80])
    part = {"do_sample_frames": False, "video_start": 1.0, "video_end": 3.0}
    frames, metadata, _ = read(processor, path, **part)
    assert [clips.number_in(frame) for frame in frames] == list(range(31, 65))
    streamed = processor.video_processor(
        [str(path)], do_sample_frames=False, stream=True, return_metadata=True
    )
    assert streamed["video_metadata"][0].timestamps == pytest.approx(times, abs=1e-3)


@pytest.mark.parametrize("suffix", [".mp4", ".nut"])
def test_frames_that_are_half_a_millisecond_apart(processor, folder, suffix):
    path, times = clips.in_pairs(folder, suffix), [ms / 1000 for ms in clips.IN_PAIRS_MS]
    frames, metadata, _ = read(processor, path, do_sample_frames=False)
    assert [clips.number_in(frame) for frame in frames] == list(range(40))
    with VideoFile(str(path)) as file:
        assert file.frame_times() == pytest.approx(times)
        for wanted in (times[1::2], times[::2], times[3:6], times[-1:]):
            shown = [clips.number_in(file.image(frame)) for _, frame in file.frames_at(wanted)]
            assert shown == [times.index(second) for second in wanted]


@pytest.mark.parametrize("rate", [960, 1000, 2000, 5000])
@pytest.mark.parametrize("gop", ["1", "25"])
def test_a_slow_motion_camera(processor, folder, rate, gop):
    """Hundreds of frames a second: each is taken once, and is where the metadata says."""
    path = clips.write_clip(folder / "slow.mp4", 100, rate=rate, options={"g": gop})
    every = {"fps": float(rate), "max_frames": 100}
    for settings in ({"do_sample_frames": False}, every, {"num_frames": 100}):
        frames, metadata, _ = read(processor, path, **settings)
        assert [clips.number_in(frame) for frame in frames] == list(range(100))
        assert metadata.frames_indices == list(range(100))
        assert metadata.fps == pytest.approx(rate)
    frames, *_ = read(processor, path, num_frames=10)
    assert [clips.number_in(frame) for frame in frames] == list(range(0, 100, 10))
    out = processor.video_processor([str(path)], stream=True, return_metadata=True, **every)
    assert out["video_metadata"][0].frames_indices == list(range(100))


HOLES = [(0.27, 0.275), (0.4, 0.41), (0.45, 0.48), (0.55, 0.56), (0.62, 0.7), (0.76, 0.77)]


@pytest.mark.parametrize("hole", HOLES, ids=str)
@pytest.mark.parametrize("options", [{"g": "12"}, {"g": "12", "bf": "0"}], ids=["B", "no B"])
def test_a_hole_is_seen_or_does_not_matter(folder, options, hole):
    """With B-frames, pictures from before a lost packet come out after it."""
    path = clips.with_a_hole(folder, "hole.mp4", *hole, options=options)
    with VideoFile(str(path)) as file:
        shown, asked = [], [i * file.duration / 40 for i in range(40)]
        try:
            for time, frame in file.frames_at(asked):
                first = file.start * file.tick  # later than 0 where the start was lost
                assert clips.number_in(file.image(frame)) == round(10 * (time + first))
                shown.append(time)
        except ValueError as error:
            assert "hole.mp4 is damaged around" in str(error) or "only up to" in str(error)
    assert len(shown) >= 4  # what comes before the hole is right
    assert all(second - time <= 0.201 for time, second in zip(shown, asked, strict=False))


CODECS = {
    "libx264": {"g": "12"},
    "libx265": {"x265-params": "keyint=12:log-level=none"},
    "libvpx-vp9": {"g": "12", "deadline": "realtime", "cpu-used": "8", "crf": "10", "b": "0"},
    "libsvtav1": {"g": "12", "preset": "8", "crf": "20"},
}


@pytest.mark.parametrize("codec", CODECS)
def test_pictures_are_not_made_of_what_was_never_written(folder, codec):
    """Of a stretch of zeros inside a packet decoders make a picture without a word."""
    whole = clips.write_clip(
        folder / f"{codec}.mp4",
        100,
        codec=codec,
        paint=clips.grainy_image,
        options=CODECS[codec],
        context={"thread_count": 1},
    ).read_bytes()
    path, numbers = folder / f"hole {codec}.mp4", random.Random(0)
    first, last = whole.index(b"mdat") + len(whole) // 5, whole.rindex(b"moov") - 1000
    refused = 0
    for _ in range(12):
        start = numbers.randrange(first, last)
        path.write_bytes(whole[:start] + bytes(600) + whole[start + 600 :])
        with VideoFile(str(path)) as file:
            try:
                for time, frame in file.frames_at([i / 10 for i in range(100)]):
                    assert clips.number_in(file.image(frame)) == round(10 * time)
            except ValueError as error:
                refused += "is damaged around" in str(error) or "only up to" in str(error)
    assert refused == 12


@pytest.mark.parametrize("full", [False, True], ids=["limited range", "full range"])
@pytest.mark.parametrize("matrix", [1, 9], ids=["BT.709", "BT.2020"])
def test_colours_are_read_as_they_were_stored(folder, matrix, full):
    path = clips.of_another_matrix(folder, f"matrix{matrix}{full}.mp4", matrix, full)
    with VideoFile(str(path)) as file:
        ((_, frame),) = file.frames_at([0])
        image = file.image(frame).astype(int)
    for corner, colour in (((8, 8), clips.RED), ((8, -8), clips.GREEN), ((-8, 8), clips.BLUE)):
        assert np.abs(image[corner] - colour).max() <= 4


@pytest.mark.parametrize(
    ("context", "what"),
    [
        ({"color_trc": 16, "color_primaries": 9}, "HDR (PQ)"),
        ({"color_trc": 18}, "HDR (HLG)"),
        ({"color_primaries": 9}, "of a wide gamut (BT.2020)"),
        ({"color_primaries": 12}, "of a wide gamut (Display P3)"),
    ],
)
def test_colours_that_are_not_mapped_are_said_once(tmp_path, caplog, context, what):
    path = clips.write_clip(tmp_path / f"{what}.mp4", 10, context=context)
    for _ in range(2):
        VideoFile(str(path)).close()
    said = [line for line in caplog.messages if "its colours are" in line]
    assert len(said) == 1 and f"{what}.mp4: its colours are {what} and are read" in said[0]


def test_ordinary_colours_are_not_spoken_of(tmp_path, caplog):
    tags = {"color_trc": 1, "color_primaries": 1, "colorspace": 1}
    VideoFile(str(clips.write_clip(tmp_path / "plain.mp4", 10, context=tags))).close()
    assert not caplog.messages


def test_pixels_that_are_not_square_are_shown_as_they_look(processor, folder):
    """As on a DVD: stored as 96 x 160, shown as 96 x 240."""
    aspect = {"sample_aspect_ratio": Fraction(3, 2)}
    path = clips.write_clip(folder / "dvd.mp4", 20, context=aspect)
    frames, metadata, _ = read(processor, path, max_pixels=28 * 28 * 200)
    assert (metadata.height, metadata.width) == (96, 240)
    assert frames.shape[1:3] == (84, 252)
    assert [clips.number_in(frame) for frame in frames] == [0, 5, 10, 15]
    assert all(map(clips.is_upright, frames))


@pytest.mark.parametrize(
    ("max_pixels", "size", "tokens"), [(50176, (168, 280), 60), (602112, (252, 420), 135)]
)
def test_an_odd_size(processor, folder, max_pixels, size, tokens):
    frames, _, out = read(processor, clips.odd_size(folder), max_pixels=max_pixels)
    assert frames.shape[1:3] == size
    assert out["video_grid_thw"].prod() // 4 == tokens * len(frames) // 2
    assert [clips.number_in(frame) for frame in frames] == [0, 5, 10, 15]


def test_the_cover_picture_is_not_the_video(processor, folder):
    frames, metadata, _ = read(processor, clips.cover_first(folder), fps=2)
    assert check(frames, metadata, TENTHS, 2) == [0, 5, 10, 15]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("defaults, taken", [((0, 1), 1), ((1, 0), 0), ((1, 1), 0), ((0, 0), 0)])
def test_the_default_picture_track_is_taken(processor, folder, suffix, defaults, taken):
    frames, *_ = read(processor, clips.two_pictures(folder, suffix, defaults), fps=2)
    assert [clips.number_in(frame) for frame in frames] == [20 * taken + n for n in (0, 5, 10, 15)]


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_an_animated_avif_is_not_its_first_picture(processor, folder):
    path = folder / "moving.avif"
    first, *rest = (Image.fromarray(clips.frame_image(n, 96, 160)) for n in range(30))
    first.save(path, save_all=True, append_images=rest, duration=100)
    for video in (path, path.read_bytes()):
        frames, metadata, _ = read(processor, video, fps=2)
        assert check(frames, metadata, TENTHS, 3) == [0, 5, 10, 15, 20, 25]


LONG = 500
FORMATS = {
    "h264.mp4": {"options": {"g": "50", "bf": "3"}},
    "h264.mkv": {"options": {"g": "50", "bf": "3", "x264-params": "open-gop=1"}},
    "h264.ts": {"options": {"g": "50", "bf": "3"}},
    "h264.flv": {"options": {"g": "50"}},
    "fragments.mp4": {
        "options": {"g": "50"},
        "container": {"movflags": "frag_keyframe+empty_moov"},
    },
    "live.webm": {
        "codec": "libvpx",
        "options": {"g": "50", "deadline": "realtime", "cpu-used": "8"},
        "container": {"live": "1"},
    },
    "vp9.webm": {
        "codec": "libvpx-vp9",
        "options": {"g": "50", "deadline": "realtime", "cpu-used": "8"},
    },
    "hevc.mkv": {
        "codec": "libx265",
        "options": {"preset": "ultrafast", "x265-params": "log-level=none:keyint=50:open-gop=1"},
    },
    "av1.mp4": {"codec": "libsvtav1", "options": {"g": "50", "preset": "13"}},
    "mpeg2.ts": {"codec": "mpeg2video", "rate": 25, "options": {"g": "50", "bf": "2"}},
    "wmv2.wmv": {"codec": "wmv2", "options": {"g": "50"}},
    "prores.mov": {"codec": "prores_ks", "pixels": "yuv422p10le"},
}
IN_ORDER = {
    "mpeg2.mpg": {"codec": "mpeg2video", "rate": 25},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2", "g": "20"}},
    "mjpeg.avi": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "raw.h264": {},
}


@pytest.mark.parametrize("name", FORMATS)
def test_seeking_gives_the_pictures_that_decoding_everything_gives(folder, name):
    options = FORMATS[name]
    path = clips.write_clip(folder / name, LONG, **options)
    with av.open(str(path)) as plain:
        whole = [frame.to_ndarray(format="rgb24") for frame in plain.decode(video=0)]
    wanted = [0, 1, 7, 9, 177, 178, 239, 331, 402, 403, 499]
    with VideoFile(str(path)) as file:
        decoded = count_decoded(file)
        assert (file.frames, file.in_order) == (LONG, False)
        shown = list(file.frames_at([i / options.get("rate", 10) for i in wanted]))
        for i, (_, frame) in zip(wanted, shown, strict=True):
            assert np.array_equal(file.image(frame), whole[i])
    assert len(decoded) < 0.8 * LONG


@pytest.mark.skipif(
    not hasattr(av.stream.Stream, "index_entries"), reason="this PyAV does not show the index"
)
def test_a_key_frame_on_the_way_is_jumped_to(folder):
    """Though the frames that are wanted are no further apart than key frames can be."""
    path = clips.write_clip(folder / "keys.mp4", LONG, options={"g": "50", "bf": "3"})
    with VideoFile(str(path)) as file:
        decoded = count_decoded(file)
        shown = [file.image(frame) for _, frame in file.frames_at([5.2 * i for i in range(9)])]
    assert [clips.number_in(image) for image in shown] == [52 * i for i in range(9)]
    assert len(decoded) < 0.3 * LONG


def test_a_digital_camcorder(processor, folder):
    """25 frames a second, of which FFmpeg says 60,000."""
    path = clips.write_clip(
        folder / "tape.dv", 50, 576, 720, codec="dvvideo", rate=25, pixels="yuv420p"
    )
    with VideoFile(str(path)) as file:
        assert (file.frames, file.rate, file.duration) == (50, 25, pytest.approx(2))
    frames, metadata, _ = read(processor, path, fps=50)
    assert [clips.number_in(frame) for frame in frames] == list(range(50))
    assert metadata.fps == pytest.approx(25)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_pictures_that_are_renewed_in_parts(folder, caplog, suffix):
    """Its packets are marked as key frames, but decoding from one gives wrong pictures."""
    options = {"g": "48", "bf": "3", "x264-params": "intra-refresh=1"}
    path = clips.write_clip(folder / f"renewed{suffix}", 300, options=options)
    with av.open(str(path)) as plain:
        whole = [frame.to_ndarray(format="rgb24") for frame in plain.decode(video=0)]
    with VideoFile(str(path)) as file:
        for wanted in ([0, 60, 120, 240], [250], [7]):
            shown = file.frames_at([i / 10 for i in wanted])
            for i, (_, frame) in zip(wanted, shown, strict=True):
                assert np.array_equal(file.image(frame), whole[i])
    assert suffix == ".ts" or "renewed in parts, without key frames; decoding" in caplog.text


@pytest.mark.parametrize("name", IN_ORDER)
def test_what_cannot_be_sought_is_decoded_in_order_once(folder, name, caplog):
    path = clips.write_clip(folder / name, 60, **IN_ORDER[name])
    with VideoFile(str(path)) as file:
        decoded = count_decoded(file)
        assert (file.frames, file.in_order) == (60, True)
        seconds = [i / file.rate for i in (0, 1, 20, 41, 59)]
        numbers = [clips.number_in(file.image(frame)) for _, frame in file.frames_at(seconds)]
        assert numbers == [0, 1, 20, 41, 59]
    assert len(decoded) <= 60
    assert name in caplog.text


def count_decoded(file):
    """A list that grows by one for every frame that `file` decodes from here on."""
    seen, decode = [], file._decode

    def counting():
        for item in decode():
            seen.append(item[0])
            yield item

    file._decode = counting
    return seen


def test_a_gif_and_an_odd_chroma(processor, folder):
    path = clips.write_clip(folder / "a.gif", 30, codec="gif", pixels="rgb8")
    frames, metadata, _ = read(processor, path, fps=2)
    assert check(frames, metadata, TENTHS, 3) == [0, 5, 10, 15, 20, 25]
    path = clips.write_clip(folder / "odd.mkv", 20, 143, 177, pixels="yuv444p")
    frames, metadata, _ = read(processor, path, fps=2)
    assert check(frames, metadata, TENTHS, 2) == [0, 5, 10, 15]


def test_a_part_of_a_file(processor, folder):
    path = clips.write_clip(folder / "plain.mp4", 50)
    frames, metadata, out = read(processor, path, fps=2, video_start=1.0, video_end=4.0)
    assert [clips.number_in(frame) for frame in frames] == [10, 15, 20, 25, 30, 35]
    assert metadata.timestamps == pytest.approx([1, 1.5, 2, 2.5, 3, 3.5])
    assert out["second_per_grid_ts"].tolist() == [1.0]
    with pytest.raises(ValueError, match=r"leave nothing of plain\.mp4, which lasts 5\.0 s"):
        read(processor, path, video_start=6.0)


def test_every_frame_when_sampling_is_off(processor, folder):
    path = clips.write_clip(folder / "plain.mp4", 50)
    frames, metadata, out = read(processor, path, do_sample_frames=False)
    assert [clips.number_in(frame) for frame in frames] == list(range(50))
    assert out["second_per_grid_ts"].tolist() == pytest.approx([0.2])


def test_frames_are_resized_as_the_parent_does(processor, folder):
    path = clips.odd_size(folder)
    frames, _, out = read(processor, path, max_pixels=50176)
    with VideoFile(str(path)) as file:
        whole = np.stack([file.image(frame) for _, frame in file.frames_at([0, 0.5, 1.0, 1.5])])
    stock = super(type(processor.video_processor), processor.video_processor)
    resized = stock._preprocess(
        [torch.from_numpy(whole).permute(0, 3, 1, 2)],
        do_resize=True,
        size=type(processor.video_processor.size)(shortest_edge=784, longest_edge=50176),
        resample=3,
        do_convert_rgb=True,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=processor.video_processor.image_mean,
        image_std=processor.video_processor.image_std,
        patch_size=14,
        temporal_patch_size=2,
        merge_size=2,
        cap_pixels_per_frame=False,
    )
    torch.testing.assert_close(out["pixel_values_videos"], resized["pixel_values_videos"])


NAMES = ["with space.mp4", "100%.mp4", "50%25.mp4", "a#b.mp4", "a?b=c.mp4", "12:30:45.mp4",
         "Film: Title.mp4", "-dash.mp4", "it's.mp4", 'say "hi".mp4', "concat:a.mp4", "ünï.mp4",
         ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_file_names(processor, folder, monkeypatch, name):
    path = clips.write_clip(folder / "named.mp4", 20).rename(folder / name)
    monkeypatch.chdir(folder)
    plain = read(processor, path)[2]["pixel_values_videos"]
    for source in (name, path.as_uri(), f"file://{path}", Path(name)):
        part = {"type": "video", "video": source}
        messages = [{"role": "user", "content": [part]}]
        call = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        out = processor.apply_chat_template(messages, **call)
        assert torch.equal(out["pixel_values_videos"], plain), source


def test_bytes_open_files_and_data_addresses(processor, folder):
    path = clips.write_clip(folder / "plain.mp4", 20)
    data = path.read_bytes()
    uri = "data:video/mp4;base64," + base64.b64encode(data).decode()
    plain = read(processor, path)[2]["pixel_values_videos"]
    with path.open("rb") as file:
        for source in (data, bytearray(data), io.BytesIO(data), file, uri):
            message = [{"role": "user", "content": [{"type": "video", "video": source}]}]
            call = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
            for stream in (False, True):
                kwargs = {"processor_kwargs": {"stream": stream}}
                out = processor.apply_chat_template(message, **call, **kwargs)
                assert torch.equal(out["pixel_values_videos"][:], plain)
            planned, (plan,) = processor.plan_videos(message)
            assert plan.tokens == 30
            out = processor.apply_chat_template(planned, **call)
            assert torch.equal(out["pixel_values_videos"], plain)


def test_what_is_not_a_video_is_refused_without_its_content(processor, folder):
    secret = "c2VjcmV0" * 100
    refused = {
        "data:video/mp4;base64," + secret: "a file of 600 bytes cannot be opened",
        b"secret" * 100: "a file of 600 bytes cannot be opened",
        "rtsp://host/camera": "no video file rtsp://host/camera. Addresses begin with http://",
        "secret" * 1000: "There is no video file 'secret",
    }
    for source, message in refused.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            processor.video_processor([source])
        assert "secretsecret" * 12 not in str(error.value) and secret[:200] not in str(error.value)


def test_no_other_file_is_opened(processor, folder, monkeypatch):
    """What somebody uploads is a recording or it is refused."""
    inner = clips.write_clip(folder / "inner.ts", 20)
    clips.write_clip(folder / "inner.mp4", 20)
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:2.0,\n{}\n#EXT-X-ENDLIST\n"
    texts = {
        "absolute.m3u8": playlist.format(inner),
        "relative.mp4": playlist.format("inner.ts"),
        "address.ts": playlist.format(f"file://{inner}"),
        "concat.mp4": "ffconcat version 1.0\nfile 'inner.mp4'\n",
        "notes.txt": "hello world\nthis is a note\n" * 50,
        "drawing.svg": "<svg xmlns='http://www.w3.org/2000/svg' width='99' height='99'/>",
        "session.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
        for source in (str(folder / name), text.encode()):
            with pytest.raises(ValueError, match="of no format that recordings have"):
                processor.video_processor([source])
    names = [f"concat:{inner}|{inner}", f"subfile,,start,0,end,999,,:{inner}", f"cache:{inner}"]
    for name in names:
        with pytest.raises(FileNotFoundError, match="There is no video file"):
            processor.video_processor([name])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", ["paper.pdf", "album.zip", "shard.tar", "clip.mp4"])
def test_a_document_with_pictures_is_no_video(processor, folder, name):
    """FFmpeg takes whatever holds JPEG pictures for a video of them."""
    pictures = []
    for n in range(4):
        Image.fromarray(clips.frame_image(n, 96, 160)).save(file := io.BytesIO(), "JPEG")
        pictures.append(file.getvalue().ljust(4000, b"\0"))
    path = folder / name
    path.write_bytes(b"%PDF-1.4 PK\3\4 ustar\0" + b"".join(pictures))
    for video in (path, path.read_bytes()):
        with pytest.raises(ValueError, match="is no video, but holds pictures, as a PDF or an"):
            read(processor, video)


def test_pictures_one_after_the_other_without_a_rate(processor, folder, caplog):
    path = clips.write_clip(folder / "bare.mjpeg", 50, codec="mjpeg", pixels="yuvj420p")
    frames, *_ = read(processor, path, fps=2.5)
    assert [clips.number_in(frame) for frame in frames] == [0, 12, 25, 37]
    assert "does not say how fast its pictures follow each other; taking them for 25" in caplog.text


def test_a_pipe_does_not_hang(processor, folder):
    os.mkfifo(folder / "pipe.mp4")
    with pytest.raises(ValueError, match=r"pipe\.mp4 is a pipe or a device"):
        processor.video_processor([str(folder / "pipe.mp4")])


def test_enormous_frames_are_refused_by_the_header(folder):
    path = clips.claiming_size(folder, 30000, 30000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"huge\.avi has no frame .*of up to 178,956,970 pixels"):
        VideoFile(str(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB
    with pytest.raises(ValueError, match=r"30,000x30,000 pixels, more than the 178,956,970"):
        plan_video(5, 50, 30000, 30000)


def test_commands_in_errors_can_be_pasted(processor, folder):
    (folder / "my film; rm x.mp4").write_text("no video at all " * 100)
    with pytest.raises(ValueError, match=r"ffmpeg -i 'my film; rm x\.mp4' -c:v libx264 conv"):
        read(processor, folder / "my film; rm x.mp4")


def test_a_url(processor, folder):
    clips.write_clip(folder / "plain.mp4", 50)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        frames, metadata, _ = read(processor, f"{address}/plain.mp4", fps=2)
        assert check(frames, metadata, TENTHS, 5) == list(range(0, 50, 5))
        with pytest.raises(ValueError, match="404.*check the address"):
            read(processor, f"{address}/nowhere.mp4")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("backend", ["opencv", "torchcodec", "decord"])
def test_another_decoder_is_refused(processor, folder, backend):
    path = clips.write_clip(folder / "plain.mp4", 50)
    refusal = (
        f"video_backend is '{backend}', but videos are read with 'pyav' only: leave video_back"
    )
    with pytest.raises(ValueError, match=refusal):
        read(processor, path, video_backend=backend)
    for call in ({"video_backend": backend}, {"video_backend": backend, "stream": True}):
        with pytest.raises(ValueError, match=refusal):
            processor.video_processor([str(path)], **call)
    made = type(processor.video_processor)(video_backend=backend)
    with pytest.raises(ValueError, match=refusal):
        made([str(path)])
    assert len(read(processor, path, fps=2, video_backend="pyav")[0]) == 10


@pytest.mark.parametrize("name", ["plain.mp4", "keys.mkv", "live.webm"])
def test_a_file_is_opened_once(processor, folder, opened, name):
    codec = {"codec": "libvpx-vp9"} if name.endswith("webm") else {"options": {"g": "20"}}
    path = str(clips.write_clip(folder / name, 50, **codec))
    opened.clear()
    read(processor, path, fps=2)
    assert opened == [name]
    opened.clear()
    stream = processor.video_processor([path], stream=True)["pixel_values_videos"]
    stream[:]
    assert opened == [name]
    opened.clear()
    part = {"type": "video", "video": path}
    messages, _ = processor.plan_videos([{"role": "user", "content": [part]}])
    for tokens in (60, 30):
        messages, (plan,) = processor.plan_videos(messages, max_tokens=tokens)
    call = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    out = processor.apply_chat_template(messages, **call)
    assert (out["input_ids"] == processor.video_token_id).sum() == plan.tokens == 30
    assert opened == [name]
    processor.apply_chat_template(messages, **call)
    assert opened == [name, name]  # a second reading of the same plan


def test_what_is_read_in_order_is_measured_once(processor, folder, monkeypatch, module):
    path = str(clips.write_clip(folder / "order.avi", 60, codec="mpeg4"))
    measured, measure = [], module.VideoFile._read_packets

    def counting(file, second=None):
        measured.append(second)
        return measure(file, second)

    monkeypatch.setattr(module.VideoFile, "_read_packets", counting)
    part = {"type": "video", "video": path}
    messages, _ = processor.plan_videos([{"role": "user", "content": [part]}])
    messages, _ = processor.plan_videos(messages, max_tokens=30)
    call = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    processor.apply_chat_template(messages, **call)
    assert measured == [None]
