"""Damaged files: every picture that comes is that of the whole file; and padding is no damage."""

import random

import av
import numpy as np
import pytest
from videonsa.video_reader_videonsa import VideoFile

import clips

RATE, FRAMES = 25, 75
KINDS = {
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2", "b": "3M"}},
    "mpeg2.mkv": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2", "b": "3M"}},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2", "b": "3M"}},
    "mpeg2.avi": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2", "b": "3M"}},
    "h264.ts": {"options": {"g": "8", "bf": "3", "preset": "veryfast"}},
    "h263.avi": {"codec": "h263p", "options": {"g": "25", "b": "3M"}},
}


def write(path, **options):
    """3 s of grain at 25 frames a second."""
    context = {"thread_count": 1}  # more write other bytes from time to time
    options = {"rate": RATE, "paint": clips.grainy_image, "context": context, **options}
    return clips.write_clip(path, FRAMES, 240, 320, **options)


def read(path):
    """(pictures by their time stamps in milliseconds, error)"""
    pictures, error = {}, None
    try:
        with VideoFile(str(path)) as file:
            start = file.start * file.tick  # later where the first frames are lost
            for time, frame in file.frames_at([i / RATE for i in range(FRAMES)]):
                pictures[round(1000 * (start + time))] = file.image(frame)
    except ValueError as refused:
        error = str(refused)
    return pictures, error


def holes(size):
    """Twelve places (start, bytes) in a file of so many bytes, some as sparse files have them.

    Few packets of a transport stream: it counts them by sixteen.
    """
    numbers = random.Random(2)
    for number in range(12):
        length = numbers.choice([512, 2048, 8192])
        start = numbers.randrange(size // 8, size - length)
        yield (start // 4096 * 4096, max(length, 4096)) if number % 2 else (start, length)


@pytest.mark.parametrize("kind", KINDS)
def test_no_picture_is_made_of_what_was_never_written(tmp_path, kind):
    """Also not one that comes out before the damaged one that it refers to."""
    if kind.endswith(".avi") and not hasattr(av.stream.Stream, "index_entries"):
        pytest.skip("this PyAV does not show the index")
    path = write(tmp_path / kind, **KINDS[kind])
    whole, error = read(path)
    assert error is None and len(whole) == FRAMES
    data, refused = path.read_bytes(), 0
    for start, length in holes(len(data)):
        path.write_bytes(data[:start] + bytes(length) + data[start + length :])
        pictures, error = read(path)
        refused += error is not None
        for stamp, picture in pictures.items():
            assert np.array_equal(picture, whole[stamp]), (start, length, stamp)
    assert refused >= 8


def padded(picture, count):
    """A picture of MPEG-2 with zeros before each of its start codes and at its end."""
    return picture.replace(b"\0\0\1", bytes(count) + b"\0\0\1") + bytes(count)


@pytest.mark.parametrize("suffix", [".mpg", ".mkv", ".ts", ".avi"])
def test_zeros_between_start_codes_are_padding(tmp_path, caplog, suffix):
    """As an encoder writes them that keeps a rate; there, packets end in zeros."""
    plain = write(tmp_path / "plain.mkv", **KINDS["mpeg2.mkv"])
    path = tmp_path / f"padded{suffix}"
    with av.open(str(plain)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                again = av.Packet(padded(bytes(packet), 300))
                again.pts, again.dts = packet.pts, packet.dts
                again.time_base, again.stream = packet.time_base, stream
                again.is_keyframe = packet.is_keyframe
                target.mux(again)
    whole, error = read(plain)
    pictures, again = read(path)
    assert error is None and again is None
    assert "damage" not in caplog.text
    for one, other in zip(whole.values(), pictures.values(), strict=True):
        assert np.array_equal(one, other)
