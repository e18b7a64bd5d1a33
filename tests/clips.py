"""Video files for the tests, made with PyAV: every frame tells its own number and its way up.

`frame_image(n, height, width)` paints frame n: red over a row of ten bars over blue at the left,
green over the bars over grey at the right; the bars are n in binary, high bit first, white for 1.
`number_in` and `is_upright` read it back from a frame of any size.
"""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

RED, GREEN, BLUE, GREY = (224, 32, 32), (32, 192, 32), (32, 32, 224), (128, 128, 128)
BARS = 10


def frame_image(number, height, width):
    """Frame `number` as uint8 [height, width, 3]; at least 12 x 20 pixels, number below 1,024."""
    image = np.zeros((height, width, 3), np.uint8)
    third, half = height // 3, width // 2
    image[:third, :half], image[:third, half:] = RED, GREEN
    image[-third:, :half], image[-third:, half:] = BLUE, GREY
    for bar in range(BARS):
        if number >> (BARS - 1 - bar) & 1:
            image[third:-third, round(bar * width / BARS) : round((bar + 1) * width / BARS)] = 255
    return image


def grainy_image(number, height, width):
    """`frame_image` under grain that changes every fourth frame."""
    grain = np.random.default_rng(number // 4).normal(0, 6, (height, width, 3))
    return np.clip(frame_image(number, height, width) + grain, 0, 255).astype(np.uint8)


def number_in(frame):
    """The number painted into an upright frame [height, width, 3] with values up to 255."""
    frame = np.asarray(frame)
    height, width = frame.shape[:2]
    middles = [int((bar + 0.5) * width / BARS) for bar in range(BARS)]
    return int("".join(str(int(frame[height // 2, x].mean() > 128)) for x in middles), 2)


def is_upright(frame):
    """True when the red corner is at the top left and the blue one at the bottom left."""
    frame = np.asarray(frame)
    height, width = frame.shape[:2]
    top, bottom = frame[height // 6, width // 4], frame[height - 1 - height // 6, width // 4]
    return bool(top.argmax() == 0 and bottom.argmax() == 2)


def on_screen(times, second):
    """The index of the frame shown `second` seconds after the first; `times` start anywhere."""
    since_start = np.asarray(times, float) - times[0]
    return max(int(np.searchsorted(since_start, second + 1e-3, side="right")) - 1, 0)


def write_clip(
    path,
    count,
    height=96,
    width=160,
    *,
    codec="libx264",
    rate=10,
    times_ms=None,
    tick=Fraction(1, 1000),
    pixels="yuv420p",
    options=None,
    container=None,
    paint=frame_image,
    late=0,
    sound=0,
    sound_first=False,
    context=None,
):
    """Writes frames 0 to count - 1 and returns the path.

    times_ms: each frame's time in milliseconds, instead of the constant `rate`; they are counted
    in steps of `tick` seconds.
    late: seconds that every packet is moved by.  sound: seconds of a tone beside the picture.
    container: options of the file format.  context: attributes of the encoder.
    """
    path = Path(path)
    with av.open(str(path), "w", options=container or {}) as file:
        tone = file.add_stream("aac", rate=16000, layout="mono") if sound and sound_first else None
        stream = file.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = height, width, pixels
        if sound and not sound_first:
            tone = file.add_stream("aac", rate=16000, layout="mono")
        for name, value in (context or {}).items():
            setattr(stream.codec_context, name, value)
        if times_ms:
            stamps = [round(ms / 1000 / tick) for ms in times_ms]
        else:
            stamps, tick = range(count), Fraction(1, rate)
        stream.codec_context.time_base = tick

        def write(packets):
            for packet in packets:
                if late:
                    ticks = round(late / packet.time_base)
                    packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
                file.mux(packet)

        for number in range(count):
            frame = av.VideoFrame.from_ndarray(paint(number, height, width), format="rgb24")
            frame.pts, frame.time_base = stamps[number], tick
            write(stream.encode(frame))
        write(stream.encode())
        if tone:
            for start in range(0, int(sound * 16000), 1024):
                wave = np.sin(0.2 * np.arange(start, start + 1024, dtype=np.float32))[None]
                samples = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
                samples.sample_rate, samples.pts = 16000, start
                file.mux(tone.encode(samples))
            file.mux(tone.encode())
    return path


# What display matrices do to the column x and row y of a stored pixel: (a, b, c, d) show it at
# column a x + c y and row b x + d y. Phones write turns, front cameras and editors the others.
DISPLAYED = {
    "upright": (1, 0, 0, 1),
    "a quarter to the right": (0, 1, -1, 0),
    "half a turn": (-1, 0, 0, -1),
    "a quarter to the left": (0, -1, 1, 0),
    "left and right exchanged": (-1, 0, 0, 1),
    "top and bottom exchanged": (1, 0, 0, -1),
    "axes exchanged": (0, 1, 1, 0),
    "axes exchanged and half a turn": (0, -1, -1, 0),
}


def displayed(folder, a, b, c, d, name="displayed.mp4"):
    """2 s of upright pictures, 160 x 96 (height x width) where axes are exchanged, else 96 x 160,
    stored as 96 x 160 so that the display matrix (a, b, c, d) of 0 and 1 shows them."""

    def stored(number, height, width):
        y, x = np.mgrid[:height, :width]
        column, row = a * x + c * y, b * x + d * y
        column, row = column - column.min(), row - row.min()
        return frame_image(number, row.max() + 1, column.max() + 1)[row, column]

    path = write_clip(folder / name, 20, paint=stored)
    set_display_matrix(path, a, b, c, d)
    return path


def set_display_matrix(path, a, b, c, d):
    """Writes numbers up to 1 into the header of an MP4's first track."""
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44  # 3 x 3 of big-endian fixed-point numbers
    a, b, c, d = (round(65536 * number) for number in (a, b, c, d))
    data[matrix : matrix + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def no_frame_count(folder, suffix):
    """50 frames, 5 s; the header of .mkv and .webm has neither their number nor a duration."""
    codec = "libvpx-vp9" if suffix == ".webm" else "libx264"
    return write_clip(folder / f"count{suffix}", 50, codec=codec)


CHANGING_RATE_MS = [33 * i for i in range(60)] + [2000 + 200 * i for i in range(20)]


def changing_rate(folder):
    """60 frames in 2 s, then 20 in 4 s: frame i is shown at CHANGING_RATE_MS[i]."""
    return write_clip(
        folder / "rate.mp4",
        80,
        rate=30,
        times_ms=CHANGING_RATE_MS,
        options={"bf": "0"},
        container={"video_track_timescale": "1000"},
    )


IN_PAIRS_MS = [100 * (i // 2) + 0.5 * (i % 2) for i in range(40)]


def in_pairs(folder, suffix):
    """2 s of 40 frames, every other one half a millisecond after the one before."""
    return write_clip(
        folder / f"pairs{suffix}",
        40,
        rate=2000,
        times_ms=IN_PAIRS_MS,
        tick=Fraction(1, 2000),
        options={"g": "10", "bf": "2"},
    )


def one_frame(folder):
    return write_clip(folder / "one.mp4", 1)


def cut_short(folder):
    """10 s that lost the last 40 % of the bytes; the index at its front still promises all."""
    whole = write_clip(
        folder / "whole.mp4",
        100,
        options={"g": "25", "crf": "10"},
        container={"movflags": "faststart"},
    )
    data = whole.read_bytes()
    path = folder / "cut.mp4"
    path.write_bytes(data[: len(data) * 6 // 10])
    return path


def with_a_hole(folder, name, start, end, options=None):
    """10 s whose bytes between two fractions of the file are zeros; its index is whole."""
    path = write_clip(
        folder / name,
        100,
        options=options or {"g": "25", "crf": "10"},
        container={"movflags": "faststart"},
        context={"thread_count": 1},  # more write other bytes from time to time
    )
    data = bytearray(path.read_bytes())
    start, end = int(start * len(data)), int(end * len(data))
    data[start:end] = bytes(end - start)
    path.write_bytes(data)
    return path


def boastful_header(folder):
    """An AVI of 40 frames at 10 a second whose header promises 444."""
    path = write_clip(folder / "boast.avi", 40, codec="mjpeg", pixels="yuvj420p")
    data = bytearray(path.read_bytes())
    for chunk, field in ((b"avih", 16), (b"strh", 32)):
        at = data.index(chunk) + 8 + field
        data[at : at + 4] = struct.pack("<I", 444)
    path.write_bytes(data)
    return path


def long_sound(folder, suffix=".mp4"):
    """10 s of sound beside 4 s of picture, the sound as the first stream."""
    return write_clip(folder / f"sound{suffix}", 40, sound=10, sound_first=True)


def late_start(folder, suffix):
    """6 s whose first frame is stamped 5 s."""
    return write_clip(folder / f"late{suffix}", 60, late=5, options={"g": "20", "bf": "2"})


def joined(folder, suffix, first, second, **options):
    """Two recordings of so many frames joined byte by byte: the clock starts again between them."""
    parts = []
    for name, count, before in (("first", first, 0), ("second", second, first)):
        parts.append(
            write_clip(
                folder / f"{name}{suffix}",
                count,
                paint=lambda n, h, w, before=before: frame_image(n + before, h, w),
                **options,
            ).read_bytes()
        )
    path = folder / f"joined_{first}_{second}{suffix}"
    path.write_bytes(b"".join(parts))
    return path


def header_again(folder):
    """A fragmented MP4 of 40 frames with its header again in the middle, as saved streams are."""
    flags = {"movflags": "frag_keyframe+empty_moov+default_base_moof+skip_trailer"}
    path = write_clip(folder / "again.mp4", 40, options={"g": "10"}, container=flags)
    data = path.read_bytes()
    boxes = list(_boxes(data, 0, len(data)))
    header = data[: next(end for kind, _, end in boxes if kind == b"moov")]
    middle = [start for kind, start, _ in boxes if kind == b"moof"][2]
    path.write_bytes(data[:middle] + header + data[middle:])
    return path


STOPPED_MS = [33 * i for i in range(60)] + [12000]


def stopped_after_stillness(folder, suffix, gop):
    """A screen that moved for 2 s and was still for 10, until the recording was stopped."""
    return write_clip(
        folder / f"stopped_{gop}{suffix}",
        61,
        rate=30,
        times_ms=STOPPED_MS,
        options={"bf": "0", "g": str(gop)},
        sound=12.1,
    )


BURSTS_MS = [33 * i for i in range(30)] + [300_000 + 33 * i for i in range(30)]


def two_bursts(folder):
    """Two seconds of pictures, five minutes apart: a mean rate of 0.2 frames a second."""
    return write_clip(folder / "bursts.mp4", 60, rate=30, times_ms=BURSTS_MS, options={"bf": "0"})


def hidden_start(folder):
    """An MP4 of 60 frames whose edit list hides the first 15; its header counts all."""
    return write_clip(folder / "hidden.mp4", 60, late=-1.5, options={"g": "60", "bf": "0"})


def of_another_matrix(folder, name, matrix, full=False):
    """Pictures whose colours are stored by BT.709 (1) or BT.2020 (9), and said to be."""
    path = folder / name
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=10, options={"qp": "4"})
        stream.height, stream.width, stream.pix_fmt = 96, 160, "yuv444p"
        stream.codec_context.colorspace = matrix
        stream.codec_context.color_range = 2 if full else 1
        for number in range(10):
            frame = av.VideoFrame.from_ndarray(frame_image(number, 96, 160), format="rgb24")
            frame = frame.reformat(
                format="yuv444p",
                src_colorspace=5,
                dst_colorspace=matrix,
                src_color_range=2,
                dst_color_range=2 if full else 1,
            )
            frame.pts, frame.time_base = number, Fraction(1, 10)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def claiming_size(folder, height, width):
    """An AVI of a few kilobytes whose header and pictures claim to be of this size."""
    path = write_clip(folder / "huge.avi", 4, codec="mjpeg", pixels="yuvj420p")
    data = bytearray(path.read_bytes())
    at = data.index(b"strf") + 8 + 4
    data[at : at + 8] = struct.pack("<ii", width, height)
    at = data.find(b"\xff\xc0")  # the head of each JPEG
    while at >= 0:
        data[at + 5 : at + 9] = struct.pack(">HH", height, width)
        at = data.find(b"\xff\xc0", at + 1)
    path.write_bytes(data)
    return path


def ten_bit(folder):
    return write_clip(
        folder / "ten.mp4",
        20,
        codec="libx265",
        pixels="yuv420p10le",
        options={"x265-params": "log-level=none"},
    )


def shuffled_stamps(folder):
    """An AVI with B-frames: it decodes in order, but its time stamps are not in order."""
    return write_clip(
        folder / "shuffled.avi", 60, options={"bf": "3", "g": "20", "b_strategy": "0"}
    )


def odd_size(folder):
    """241 x 427 pixels."""
    return write_clip(folder / "odd.webm", 20, 241, 427, codec="libvpx-vp9")


def sound_only(folder):
    path = folder / "sound.m4a"
    with av.open(str(path), "w") as file:
        tone = file.add_stream("aac", rate=16000, layout="mono")
        for start in range(0, 16000, 1024):
            samples = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            samples.sample_rate, samples.pts = 16000, start
            file.mux(tone.encode(samples))
        file.mux(tone.encode())
    return path


def cover_first(folder):
    """An MP4 whose first video stream is its cover picture (white, 64 x 64)."""
    path = folder / "cover.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 96, 160, "yuv420p"
        cover = file.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic.value
        for number in range(20):
            image = frame_image(number, 96, 160)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())
        white = np.full((64, 64, 3), 255, np.uint8)
        file.mux(cover.encode(av.VideoFrame.from_ndarray(white, format="rgb24")))
        file.mux(cover.encode())
    data = path.read_bytes()
    moov = next(box for box in _boxes(data, 0, len(data)) if box[0] == b"moov")
    inner = [(kind, data[start:end]) for kind, start, end in _boxes(data, moov[1] + 8, moov[2])]
    inner.sort(key=lambda box: box[0] != b"udta")  # the cover's box before the tracks
    path.write_bytes(data[: moov[1] + 8] + b"".join(body for _, body in inner) + data[moov[2] :])
    return path


def two_pictures(folder, suffix, defaults):
    """2 s of two picture tracks, frames 0 to 19 and 20 to 39; whether each is the default one."""
    path = folder / f"two{suffix}"
    with av.open(str(path), "w") as file:
        streams = [file.add_stream("libx264", rate=10) for _ in defaults]
        for stream, default in zip(streams, defaults, strict=True):
            stream.height, stream.width, stream.pix_fmt = 96, 160, "yuv420p"
            stream.disposition = av.stream.Disposition.default.value if default else 0
        for number in range(20):
            for first, stream in zip((0, 20), streams, strict=True):
                image = frame_image(first + number, 96, 160)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        for stream in streams:
            file.mux(stream.encode())
    return path


def _boxes(data, start, end):
    while start < end:
        size, kind = struct.unpack(">I4s", data[start : start + 8])
        yield kind, start, start + size
        start += size
