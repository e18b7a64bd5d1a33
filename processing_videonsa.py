"""Video and text into what the model takes: Qwen2.5-VL's processor with a budget and a reader.

`plan_video` is the one place that decides how many frames of a video are taken, of what size, and
how many tokens they become. `VideoFile` finds those frames in a file with PyAV, by seeking where
that is exact. `VideoNSAVideoProcessor` and `VideoNSAProcessor` put both behind Qwen2.5-VL's calls.
`PixelStream` stands for the pixels of videos that are decoded while the model reads them.
"""

import importlib
import math
import os
import queue
import threading
import weakref
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor
from transformers.image_utils import (
    ChannelDimension,
    SizeDict,
    infer_channel_dimension_format,
    load_image,
)
from transformers.utils import logging
from transformers.video_utils import VideoMetadata, load_video

try:
    import av
except ImportError:  # reading a file says so; frames that are given need no reader
    av = None

logger = logging.get_logger(__name__)

BACKENDS = ("pyav", "torchcodec", "decord")

# A stream decodes so many temporal steps at a time, fewer where they are large, and is so many
# bytes of pixels ahead of what is read, or two such groups.
GROUP_STEPS, GROUP_BYTES = 8, 16 << 20
AHEAD_BYTES = 256 << 20


@dataclass(frozen=True)
class VideoPlan:
    """What is taken of one video, as `plan_video` decided it.

    duration: seconds.  fps: the rate asked for, None when a number of frames was.
    wanted: frames at that rate.  frames: frames taken, evenly spread over the duration.
    height, width: pixels of each frame.  tokens: placeholders in the prompt.
    frames_reason, size_reason: what kept frames or size from being what was asked, if anything.
    """

    duration: float
    fps: float | None
    wanted: int
    frames: int
    height: int
    width: int
    tokens: int
    frames_reason: str = ""
    size_reason: str = ""

    @property
    def seconds(self) -> list[float]:
        """The time of each frame, counted from the first frame of the video."""
        return [i * self.duration / self.frames for i in range(self.frames)]

    def describe(self) -> str:
        """One line: "412 s at 2 fps = 768 of 824 frames (frame cap), 168x280, 23,040 tokens"."""
        rate = "" if self.fps is None else f" at {self.fps:g} fps"
        seconds = f"{self.duration:.0f}" if self.duration >= 100 else f"{self.duration:.3g}"
        frames = f"{self.frames} frame{'s' * (self.frames != 1)}"
        if self.frames < self.wanted:
            frames = f"{self.frames} of {self.wanted} frames"
        if self.frames_reason:
            frames += f" ({self.frames_reason})"
        size = f"{self.height}x{self.width}"
        if self.size_reason:
            size += f" ({self.size_reason})"
        return f"{seconds} s{rate} = {frames}, {size}, {self.tokens:,} tokens"


def resized(height: int, width: int, min_pixels: int, max_pixels: int, factor: int = 28):
    """Qwen's rule: both sides multiples of `factor`, the area between the two limits."""
    if max(height, width) > 200 * min(height, width):
        raise ValueError(
            f"A frame of {height}x{width} pixels is more than 200 times as long as it is wide; "
            "crop it first."
        )
    rows, columns = (max(factor, round(side / factor) * factor) for side in (height, width))
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (
            max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)
        )
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


def plan_video(
    duration: float,
    source_frames: int,
    height: int,
    width: int,
    *,
    fps: float | None = 2.0,
    num_frames: int | None = None,
    sample: bool = True,
    min_frames: int = 4,
    max_frames: int = 768,
    min_pixels: int = 128 * 28 * 28,
    max_pixels: int = 768 * 28 * 28,
    total_pixels: int | None = None,
    max_tokens: int | None = None,
    size: tuple[int, int] | None = None,
    factor: int = 28,
    pair: int = 2,
) -> VideoPlan:
    """Decides frames, size and tokens of a video of `source_frames` frames of `height` x `width`.

    fps or num_frames: what is asked for; with `sample` false, all the frames there are.
    min_frames, max_frames: bounds of what a rate may ask for. Sampled frames are an even number,
        but for a video of one frame.
    min_pixels, max_pixels: bounds of one frame's area; where they contradict, max_pixels holds.
    total_pixels: area of all frames, two frames that share their tokens counted once, as in
        qwen-vl-utils. Frames shrink towards min_pixels to meet it; past that, some are given up.
    max_tokens: tokens of the whole video. Frames are given up to meet it, their size stays.
    size: height and width to use, rounded to multiples of `factor`, whatever the pixel bounds say.
    factor, pair: pixels per token and side, and frames per token.

    Raises ValueError when not even two frames fit, saying what would.
    """
    if fps is not None and fps <= 0:
        raise ValueError(f"fps is {fps}; it must be positive (2 is usual).")
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}; at least one frame must be taken.")
    unit = factor * factor
    if max_pixels < unit:
        logger.warning_once(f"max_pixels is {max_pixels}; using {unit}, the area of one token.")
        max_pixels = unit
    if max_frames < pair:
        logger.warning_once(f"max_frames is {max_frames}; using {pair}, which share their tokens.")
    min_pixels = min(min_pixels, max_pixels)

    def even(count):
        return max(pair, int(count) // pair * pair)

    cap, available = even(max_frames), min(even(source_frames), source_frames)
    reason = size_reason = ""
    if not sample:
        fps, wanted, frames = None, source_frames, source_frames
    elif num_frames is not None:
        fps, wanted = None, even(round(num_frames / pair) * pair)
        frames = min(wanted, available)
        if frames < wanted:
            reason = "all there are"
            logger.warning_once(f"num_frames is {num_frames}, but the video has {source_frames}.")
    else:
        # Half a source frame of tolerance: containers round durations.
        asked = int((duration + duration / source_frames / 2) * fps) // pair * pair
        wanted, least = max(asked, 1), math.ceil(min_frames / pair) * pair
        frames = min(max(asked, least), cap, available)
        if frames < wanted:
            reason = "frame cap" if frames == cap else "all there are"
        elif frames > wanted:
            reason = "minimum"

    if size is not None:
        rows, columns = (max(factor, round(side / factor) * factor) for side in size)
    else:
        rows, columns = resized(height, width, min_pixels, max_pixels, factor)
        share = max(total_pixels * pair // frames, int(1.05 * min_pixels)) if total_pixels else None
        if share is not None and rows * columns > share:
            rows, columns = resized(height, width, min_pixels, share, factor)
            size_reason = "total pixels"

    groups, each = math.ceil(frames / pair), rows * columns // unit
    budgets = {"token budget": max_tokens, "total pixels": total_pixels and total_pixels // unit}
    for name, tokens in budgets.items():
        if tokens is None or groups * each <= tokens:
            continue
        if tokens < each:
            raise ValueError(
                f"Two frames of {rows}x{columns} pixels are {each:,} tokens, more than the {name} "
                f"allows ({tokens:,}): allow {each:,} tokens ({each * unit:,} pixels), or lower "
                f"max_pixels to {max(tokens, 1) * unit:,}."
            )
        groups, reason = tokens // each, name
        frames = groups * pair
        if name == "total pixels":
            logger.warning_once(
                f"total_pixels is {total_pixels:,}: at min_pixels, {wanted} frames exceed it; "
                f"taking {frames}."
            )
    return VideoPlan(
        duration, fps, wanted, frames, rows, columns, groups * each, reason, size_reason
    )


class Remeasure(Exception):
    """The file is not as it was measured; its numbers are mended, plan and read again."""


class VideoFile:
    """A video file as PyAV decodes it, and the frames on screen at given times.

    duration: seconds from the first frame to the end of the last.  frames, rate: how many, per
    second (of a file of changing rate: the mean).  height, width: pixels, upright.
    in_order: true when seeking cannot be trusted and the file is decoded from its start.

    Raises ValueError for a file that is empty, not a video, without a picture track or cut short.
    """

    # Seeking in these lands on the wrong frame or loses the first second.
    IN_ORDER = ("avi", "mpeg")
    # Two times closer than this are one; containers round to a millisecond.
    CLOSE = 1e-3
    # Frames that decode faster than a seek past them.
    WORTH_SEEKING = 10

    def __init__(self, source: str):
        if av is None:
            raise ImportError(
                "Reading a video file needs PyAV, which is not installed: pip install av. "
                "(Or pass video_backend='torchcodec', or the frames themselves.)"
            )
        self.source = source
        self.is_url = "://" in source
        self.name = source if self.is_url else os.path.basename(source)
        self.key_gap = math.inf
        self._rewind()
        kind = self.container.format
        self.rate = float(self.stream.average_rate or self.stream.guessed_rate or 25)
        if kind.flags & av.format.Flags.no_timestamps.value:
            self.rate = float(self.stream.guessed_rate or self.rate)
        self.tick = float(self.stream.time_base)
        self.start, self.stamped = 0, False
        first, whole = next(((frame, whole) for _, frame, whole in self._decode()), (None, True))
        if first is None:
            raise self._error("has no frame that can be decoded")
        if not whole and first.pts is not None and self.stream.start_time is not None:
            lost = (first.pts - self.stream.start_time) * self.tick
            if lost > 2:  # less is usual in a recording that starts between two key frames
                raise self._error(f"is damaged: its first {lost:.1f} s cannot be decoded")
        self.quarter_turns = round(first.rotation / 90) % 4
        self.height, self.width = first.height, first.width
        if self.quarter_turns % 2:
            self.height, self.width = self.width, self.height
        self.stamped = first.pts is not None
        self.in_order = not self.stamped or kind.name in self.IN_ORDER
        self.start = first.pts if self.stamped else 0
        if self.in_order:
            self._say_in_order(f"seeking in {kind.name} files is not exact")
        self._measure()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.container.close()

    def image(self, frame) -> np.ndarray:
        """The upright picture of a frame, uint8 [height, width, 3]."""
        try:
            return np.rot90(frame.to_ndarray(format="rgb24"), self.quarter_turns)
        except av.FFmpegError as error:
            raise self._error(f"has a frame that cannot be shown ({error.strerror})") from error

    def frames_at(self, seconds):
        """Yields (time of the frame, frame) on screen at each of the ascending `seconds`."""
        self._rewind()
        frames = self._decode()
        held = ahead = next(frames, None)
        if held is None:
            raise self._error("has no frame that can be decoded")
        for second in seconds:
            key = self._key_before(second)
            while ahead is not None and ahead[0] <= second + self.CLOSE:
                held = ahead
                gap = second - held[0] > self.key_gap
                if not self.in_order and (gap or key - held[0] > self.WORTH_SEEKING / self.rate):
                    held, frames = self._seek(second)
                    key = -math.inf
                ahead = next(frames, None)
            time, frame, _ = held
            if ahead is None:
                self._check_end(time, second)
            elif not ahead[2] and second - time > 2 / self.rate:
                raise self._error(f"is damaged around {second:.1f} s")
            yield time, frame

    def _check_end(self, last, second):
        """`last` is the time of the last frame that decoded, `second` one that is asked for."""
        missing = self.duration - last
        if missing <= max(self.last_frame_lasts, 2 / self.rate) + self.CLOSE:
            return
        if self.in_order and not self.damaged:
            self.frames = self.decoded
            self.duration = last + 1 / self.rate
            raise Remeasure
        raise self._error(f"can be read only up to {last:.1f} s of {self.duration:.1f} s")

    def _key_before(self, second):
        """The time, roughly, of the last key frame up to `second`; -inf where no index tells."""
        entries = getattr(self.stream, "index_entries", None)  # newer PyAV
        if entries is None or not self.stamped:
            return -math.inf
        stamp = self.start + int(second / self.tick)
        index = entries.search_timestamp(stamp, backward=True)
        return (entries[index].timestamp - self.start) * self.tick if index >= 0 else -math.inf

    def _seek(self, second):
        """A frame at or before `second` and the ones that follow it; seeks can land too late."""
        step = 0.0
        while second - step > 0:
            try:
                stamp = self.start + int((second - step) / self.tick)
                self.container.seek(stamp, stream=self.stream, backward=True)
                frames = self._decode()
                first = next(frames, None)
            except av.FFmpegError:
                first = None
            if first is not None and first[0] <= second + self.CLOSE:
                break
            step = max(1.0, 2 * step)
        else:
            self._rewind()
            frames = self._decode()
            first = next(frames)
        # Seeking pays only for gaps larger than what has to be decoded after it.
        self.key_gap = max(self.key_gap, second - first[0])
        return first, frames

    def _decode(self):
        """Yields (seconds since the first frame, frame, whole) from the current position on.

        whole is false when pictures were lost since the frame before. What a decoder makes up
        after a damaged packet is not yielded: the next frame is the next key frame.
        """
        self.decoded, self.damaged, whole = 0, False, True
        last, last_key = -math.inf, None
        try:
            for packet in self._packets(self.stream):
                try:
                    frames = packet.decode()
                except av.InvalidDataError:
                    self.damaged, whole = True, False
                    if self.decoded and not self.stamped:  # lost frames cannot be counted
                        raise self._error(f"is damaged after {last:.1f} s") from None
                    continue
                for frame in frames:
                    if not whole and last_key is not None and not frame.key_frame:
                        continue
                    time = self.decoded / self.rate
                    if self.stamped:
                        time = math.nan
                        if frame.pts is not None:
                            time = (frame.pts - self.start) * self.tick
                        if not time > last:
                            if self.damaged:
                                raise self._error(f"is damaged after {last:.1f} s")
                            self._distrust_stamps()
                    if frame.key_frame:
                        if last_key is not None:
                            seen = self.key_gap if math.isfinite(self.key_gap) else 0
                            self.key_gap = max(seen, time - last_key)
                        last_key = time
                    self.decoded, last = self.decoded + 1, time
                    yield time, frame, whole
                    whole = True
        except av.FFmpegError:  # the container itself ends in the middle
            self.damaged = True

    def _packets(self, *streams):
        try:
            yield from self.container.demux(*streams)
        except IndexError:  # PyAV, at the end of a file in which a track appeared on the way
            pass

    def _say_in_order(self, why):
        logger.warning_once(f"{self.name}: {why}; decoding the whole file from its start.")

    def _distrust_stamps(self):
        self.stamped, self.in_order = False, True
        self._say_in_order("its time stamps are missing or not in order")
        self._measure()
        raise Remeasure

    def _measure(self):
        """Sets duration, frames and last_frame_lasts from the packets, which are not decoded."""
        self.frames, promised = self.stream.frames, self._promised_end()
        end = everything = None
        if not self.in_order and promised is not None:
            end, everything = self._packets_from(promised - 1)
        if end is None:
            self._rewind()
            end, everything = self._packets_from(None)
        if self.in_order:
            self.frames = self.packets
        if not self.stamped or end is None:
            end = everything = self.frames / self.rate
            self.last_frame_lasts = 1 / self.rate
        if promised is not None and everything < promised - max(1.0, 0.02 * promised):
            lost = (
                f"should last {promised:.1f} s by its header, but only the first {end:.1f} s "
                "are there"
            )
            if not self.in_order:
                raise self._error(lost)
            # The headers of these formats are often wrong, and the whole file has been seen.
            logger.warning_once(f"{self.name} {lost}; using those.")
        self.duration = max(end, self.CLOSE)
        self.frames = self.frames or max(1, round(self.duration * self.rate))

    def _promised_end(self):
        """The end of the picture track by the file's header, in seconds since the first frame."""
        if self.stream.duration:
            origin = self.stream.start_time or 0
            return (origin + self.stream.duration - self.start) * self.tick
        if self.container.duration:
            return self.container.duration / av.time_base - self.start * self.tick
        return None

    def _packets_from(self, second):
        """Ends of the picture and of all tracks, read from `second` on (None: from here)."""
        stamps, sound, self.packets, self.last_frame_lasts = [], -math.inf, 0, 1 / self.rate
        try:
            if second is not None:
                stamp = max(self.start + int(second / self.tick), self.start)
                self.container.seek(stamp, stream=self.stream, backward=True)
            for packet in self._packets():
                picture = packet.stream.index == self.stream.index
                if not packet.size or packet.is_discard or packet.is_corrupt:
                    continue
                self.packets += picture
                time = packet.dts if packet.pts is None else packet.pts
                if time is None:
                    continue
                if not picture:
                    ended = float((time + (packet.duration or 0)) * packet.time_base)
                    sound = max(sound, ended - self.start * self.tick)
                    continue
                stamps = sorted([*stamps, time])[-2:]
                if time == stamps[-1]:
                    self.last_frame_lasts = (packet.duration or 0) * self.tick or 1 / self.rate
        except av.FFmpegError:
            pass
        if not stamps:
            return None, None
        # The length that a file states for its last frame is often a mere default.
        self.last_frame_lasts = max(self.last_frame_lasts, (stamps[-1] - stamps[0]) * self.tick)
        end = (stamps[-1] - self.start) * self.tick + self.last_frame_lasts
        return end, max(end, sound)

    def _rewind(self):
        """Opens the file (again): the one way back to the start that every format has."""
        if getattr(self, "container", None) is not None:
            self.container.close()
        if not self.is_url:
            if not os.path.exists(self.source):
                raise FileNotFoundError(f"There is no video file {self.source}.")
            if os.path.isfile(self.source) and not os.path.getsize(self.source):
                raise self._error("is empty (0 bytes)")
        try:
            self.container = av.open(
                self.source, metadata_errors="replace", timeout=30 if self.is_url else None
            )
        except (av.FFmpegError, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise self._error(f"cannot be opened as a video ({reason})") from error
        cover = av.stream.Disposition.attached_pic
        pictures = [s for s in self.container.streams.video if not s.disposition & cover]
        if not pictures:
            tracks = sorted({stream.type for stream in self.container.streams}) or ["none"]
            raise self._error(f"has no picture track (tracks: {', '.join(tracks)})")
        self.stream = pictures[0]
        if self.stream.codec_context is None:
            raise self._error("has a picture track of a format that PyAV does not decode")

    def _error(self, what):
        remedy = (
            "check the address"
            if self.is_url
            else "use a complete video file; if a player shows this one, convert it first: "
            f"ffmpeg -i {self.name} -c:v libx264 converted.mp4"
        )
        return ValueError(f"{self.name} {what}: {remedy}.")


class PixelStream:
    """The rows of `pixel_values_videos`, decoded in the background while they are read.

    shape and dtype are those of the tensor that this stands for: (rows, columns), float.
    `stream[first:last]` is these rows of it, on the CPU. Slices are taken in ascending order; one
    may start up to `overlap` rows, a temporal step of the largest video, before the end of what
    was read. A stream is read once.

    From the first slice on a thread decodes, and waits when it is 256 MiB of pixels ahead (two
    groups of temporal steps, where those take more). With the slice itself, the overlap and the
    group being made, that is the host memory of a stream, however long its videos are. `close()`,
    the end of a `with` block, an error, Ctrl-C and garbage collection stop the thread.

    Raises ValueError for rows that are gone, and where it is reached for what is wrong with a
    video and could not be known before.
    """

    def __init__(self, groups, shape, dtype, overlap, groups_ahead):
        """groups: a generator function of an event; it yields rows, in order, until that is set."""
        self.shape, self.dtype, self.overlap = tuple(shape), dtype, overlap
        self._kept = []  # pairs (number of the first row, rows) of what may still be asked for
        self._decoded = self._read = 0  # rows
        self._ready, stop = queue.Queue(groups_ahead), threading.Event()
        groups = groups(stop)
        self._thread = threading.Thread(
            target=_decode_groups, args=(groups, self._ready, stop), name="PixelStream", daemon=True
        )
        self._stop = weakref.finalize(self, _stop_decoding, self._thread, groups, self._ready, stop)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Stops decoding; nothing can be read afterwards."""
        self._stop()
        self._kept = []

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            raise self._refusal(f"{rows!r} is not a range of rows")
        first, last, _ = rows.indices(len(self))
        if not self._stop.alive:
            raise self._refusal("it was closed, or ended with an error")
        if first < self._read - self.overlap:
            raise self._refusal(f"row {first} is gone after row {self._read} was read")
        pixels = torch.empty(max(last - first, 0), self.shape[1], dtype=self.dtype, device="cpu")
        self._read, position = max(self._read, first), first
        try:
            while position < last:
                while self._decoded <= position:
                    self._take_group()
                for start, group in self._kept:
                    piece = group[max(position - start, 0) : last - start]
                    if start <= position < start + len(group):
                        pixels[position - first :][: len(piece)] = piece
                        position += len(piece)
                self._read = max(self._read, position)
                self._forget()
        except BaseException:  # Ctrl-C too: what was taken from the queue may be lost
            self.close()
            raise
        return pixels

    def _take_group(self):
        if self._thread.ident is None:
            self._thread.start()
        group = None
        while group is None:
            try:
                group = self._ready.get(timeout=1)
            except queue.Empty:
                if not self._thread.is_alive() and self._ready.empty():
                    raise RuntimeError("The thread that decodes a PixelStream is gone.") from None
        if isinstance(group, BaseException):
            raise group
        self._kept.append((self._decoded, group))
        self._decoded += len(group)
        self._forget()

    def _forget(self):
        oldest = self._read - self.overlap
        self._kept = [(start, group) for start, group in self._kept if start + len(group) > oldest]

    def _refusal(self, what):
        return ValueError(
            f"A PixelStream is read once, in slices that go up, but {what}: ask the processor for "
            "a new stream, or for a tensor (without stream=True)."
        )

    def __getattr__(self, name):
        raise AttributeError(
            f"A PixelStream has no {name!r}: it is no tensor, only slices [first:last] of it are. "
            "Ask the processor for a tensor (without stream=True)."
        )

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "A PixelStream cannot be copied or sent to another process; make it where it is read."
        )


# What a stream's thread runs does not refer to the stream, so that this can be garbage.
def _decode_groups(groups, ready, stop):
    """Puts the groups of rows into the queue `ready`, and the error that ended them, if any."""
    try:
        for group in groups:
            _put(group, ready, stop)
    except BaseException as error:  # raised again by the reader
        _put(error, ready, stop)


def _put(item, ready, stop):
    while not stop.is_set():
        try:
            return ready.put(item, timeout=0.1)
        except queue.Full:
            pass


def _stop_decoding(thread, groups, ready, stop):
    stop.set()
    if thread.ident is None:
        groups.close()  # closes the files, which at the interpreter's end would be too late
    while not ready.empty():
        ready.get_nowait()
    # A frame that is being decoded is waited for, an address that does not answer is not.
    if thread.is_alive() and thread is not threading.current_thread():
        thread.join(timeout=2)


class _Video(str):
    """One video of a call with the settings of its message.

    It is a string because the library passes strings on to the video processor as they are,
    through the chat template's messages and the checks of the processor alike.

    source: path, URL, array or tensor [frames, ...], or list of frames.
    settings: what the message says of this video.
    """

    source: object
    settings: dict

    @classmethod
    def of(cls, source, settings=None):
        settings = dict(settings or {})
        if isinstance(source, cls):
            source, settings = source.source, {**source.settings, **settings}
        source = _path(source)
        video = cls(source if isinstance(source, str) else f"{len(source)} frames")
        video.source, video.settings = source, settings
        return video


def _path(item):
    """Paths and file:// addresses as plain paths, everything else as it is."""
    return os.fspath(item).removeprefix("file://") if isinstance(item, (str, Path)) else item


def _flatten(videos) -> list[_Video]:
    """The videos of a call: one, a list or nested lists of paths, arrays or lists of frames."""
    if isinstance(videos, (str, Path)):
        return [_Video.of(videos)]
    if isinstance(videos, (np.ndarray, torch.Tensor)):
        if videos.ndim == 5:
            return [_Video.of(video) for video in videos]
        return [_Video.of(videos if videos.ndim == 4 else videos[None])]
    if isinstance(videos, (list, tuple)):
        if videos and all(_is_frame(item) for item in videos):
            return [_Video.of(videos)]
        return [video for item in videos for video in _flatten(item)]
    raise ValueError(
        f"A video is a path, a URL, an array of frames or a list of frames, not {type(videos)}."
    )


def _is_frame(item):
    return isinstance(item, Image.Image) or (
        isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim == 3
    )


class VideoNSAVideoProcessorKwargs(Qwen2VLVideoProcessor.valid_kwargs, total=False):
    """Qwen2.5-VL's, and:

    total_pixels, max_tokens: see `plan_video`.
    resized_height, resized_width: the size of every frame, whatever the pixel bounds say.
    video_start, video_end: seconds, to take a part of a file.
    video_backend: "pyav", "torchcodec" or "decord".
    progress: whether a bar shows how far a file is decoded.
    stream: whether the pixels come as a `PixelStream` (files are then read with PyAV).
    """

    total_pixels: int | None
    max_tokens: int | None
    resized_height: int | None
    resized_width: int | None
    video_start: float | int | None
    video_end: float | int | None
    video_backend: str | None
    progress: bool | None
    stream: bool | None


class VideoNSAVideoProcessor(Qwen2VLVideoProcessor):
    """Qwen2.5-VL's video processor, which plans with `plan_video` and reads files with PyAV.

    The defaults are qwen-vl-utils': 2 fps, 4 to 768 frames, 100,352 to 602,112 pixels a frame
    (`size`, whose two numbers are `min_pixels` and `max_pixels`), 90,316,800 pixels (115,200
    tokens) a video. Files are always sampled, unless do_sample_frames=False asks for every frame;
    frames that are given are taken as they are, unless do_sample_frames=True and metadata come
    with them.
    """

    valid_kwargs = VideoNSAVideoProcessorKwargs
    fps = 2.0
    total_pixels = 128000 * 28 * 28 * 9 // 10
    max_tokens = None
    video_backend = "pyav"
    stream = False
    cap_pixels_per_frame = False  # total_pixels does it

    # What a message may say of its video besides these, and is not a setting.
    MESSAGE_KEYS = ("type", "video", "url", "path", "raw_fps")
    SETTINGS = (
        "fps",
        "num_frames",
        "min_frames",
        "max_frames",
        "min_pixels",
        "max_pixels",
        "total_pixels",
        "max_tokens",
        "resized_height",
        "resized_width",
        "do_sample_frames",
        "do_resize",
        "video_backend",
        "video_start",
        "video_end",
        "progress",
    )
    ALIASES = {"nframes": "num_frames", "sample_fps": "fps"}

    @property
    def min_pixels(self):
        return self.size["shortest_edge"]

    @property
    def max_pixels(self):
        return self.size["longest_edge"]

    def _standardize_kwargs(self, size=None, min_pixels=None, max_pixels=None, **kwargs):
        # The parent warns of the pixel bounds, which are no longer wanted there but are here.
        return super()._standardize_kwargs(size=size, **kwargs)

    def plan(self, video, video_metadata=None, **settings) -> VideoPlan:
        """What `video` would become under these settings (see `plan_video`); decodes one frame."""
        video = _Video.of(video) if isinstance(video, (str, Path)) else _flatten(video)[0]
        limits = self._limits(video, settings)
        if not isinstance(video.source, str):
            return self._plan_frames(self._given_frames(video), video_metadata, limits)[0]
        with VideoFile(video.source) as file:
            return self._plan_file(file, limits)

    def preprocess(self, videos, **kwargs):
        """Qwen2.5-VL's outputs; with stream=True the pixels are a `PixelStream` over all videos.

        The files are then opened and planned in this call, and decoded while the stream is read.
        frames_indices of video_metadata are then where frames are looked for: in a file of changing
        rate, what is on screen there may have started earlier.
        """
        metadata = kwargs.pop("video_metadata", None)
        stream = kwargs.pop("stream", None)
        settings = {name: kwargs.pop(name, None) for name in (*self.SETTINGS, "size")}
        kwargs.pop("input_data_format", None)
        videos = _flatten(videos)
        if metadata is None:
            metadata = [None] * len(videos)
        elif isinstance(metadata, (dict, VideoMetadata)):
            metadata = [metadata]
        metadata = [entry for item in metadata for entry in _as_list(item)]
        if len(metadata) != len(videos):
            raise ValueError(
                f"{len(videos)} videos were given with {len(metadata)} entries of video_metadata; "
                "give one per video."
            )
        pairs = zip(videos, metadata, strict=True)
        if self.stream if stream is None else stream:
            return self._stream([self._open(*pair, settings) for pair in pairs], kwargs)
        taken = [self._take(*pair, settings) for pair in pairs]
        frames, metadata = (list(column) for column in zip(*taken, strict=True))
        return self._to_patches(frames, metadata, kwargs)

    def _to_patches(self, frames, metadata, kwargs):
        """The parent's outputs for videos of the right size, uint8 [frames, 3, height, width]."""
        return super().preprocess(
            frames,
            video_metadata=metadata,
            do_sample_frames=False,
            do_resize=False,
            input_data_format=ChannelDimension.FIRST,
            **kwargs,
        )

    def _stream(self, videos, kwargs):
        """The outputs for videos that are open, their pixels as a stream."""
        pair, grids, overlap, group_bytes = self.temporal_patch_size, [], 0, 1
        steps = []  # of each video, temporal steps to a group
        for video in videos:
            out = self._to_patches([torch.stack(video.first)], [video.metadata], kwargs)
            pixels, (_, height, width) = out["pixel_values_videos"], out["video_grid_thw"][0]
            grids.append([-(-video.count // pair), int(height), int(width)])
            steps.append(max(1, min(GROUP_STEPS, GROUP_BYTES // pixels.nbytes)))
            group_bytes = max(group_bytes, steps[-1] * pixels.nbytes)
            overlap = max(overlap, len(pixels))

        def groups(stop):
            for video, together in zip(videos, steps, strict=True):
                frames = chain(video.first, video.rest)
                while group := list(islice(frames, together * pair)):
                    if stop.is_set():
                        return
                    out = self._to_patches([torch.stack(group)], [video.metadata], kwargs)
                    yield out["pixel_values_videos"]

        rows = sum(math.prod(grid) for grid in grids)
        shape, ahead = (rows, pixels.shape[1]), max(2, AHEAD_BYTES // group_bytes)
        out["pixel_values_videos"] = PixelStream(groups, shape, pixels.dtype, overlap, ahead)
        out["video_grid_thw"] = torch.tensor(grids)
        if "video_metadata" in out:
            out["video_metadata"] = [video.metadata for video in videos]
        return out

    def _limits(self, video, call):
        """Settings of one video: the message's before the call's before the processor's own."""
        own = {
            self.ALIASES.get(key, key): value
            for key, value in video.settings.items()
            if value is not None
        }
        if unknown := sorted(set(own) - set(self.SETTINGS)):
            logger.warning_once(f"Not a setting of a video, ignored: {', '.join(unknown)}.")
        call = {key: value for key, value in call.items() if value is not None}
        if (size := call.pop("size", None)) is not None:
            call.setdefault("min_pixels", size["shortest_edge"])
            call.setdefault("max_pixels", size["longest_edge"])
        for asked in (own, call):
            if asked.get("fps") is not None and asked.get("num_frames") is not None:
                raise ValueError("fps and num_frames exclude each other; give one of them.")
        limits = {name: getattr(self, name, None) for name in self.SETTINGS}
        limits["do_sample_frames"] = None
        for asked in (call, own):
            if asked.get("num_frames") is not None:
                limits["fps"] = None
            elif asked.get("fps") is not None:
                limits["num_frames"] = None
            limits.update(asked)
        limits["fps_given"] = limits["fps"] is not None and ("fps" in own or "fps" in call)
        if limits["video_backend"] not in BACKENDS:
            raise ValueError(
                f"video_backend is {limits['video_backend']!r}; choose from {', '.join(BACKENDS)}."
            )
        return limits

    def _plan(self, duration, frames, height, width, limits, sample=True):
        size = (limits["resized_height"], limits["resized_width"])
        names = ("fps", "num_frames", "min_frames", "max_frames", "min_pixels", "max_pixels")
        return plan_video(
            duration,
            frames,
            height,
            width,
            sample=sample and limits["do_sample_frames"] is not False,
            size=size if all(size) else None,
            factor=self.patch_size * self.merge_size,
            pair=self.temporal_patch_size,
            **{name: limits[name] for name in (*names, "total_pixels", "max_tokens")},
        )

    def _take(self, video, metadata, call):
        """The frames of one video, uint8 [frames, 3, height, width], and their metadata."""
        limits = self._limits(video, call)
        if not isinstance(video.source, str):
            frames = self._given_frames(video)
            plan, frames, metadata = self._plan_frames(frames, metadata, limits)
            return torch.stack(list(self._sized(frames, plan, limits))), metadata
        if limits["video_backend"] != "pyav":
            return self._read_elsewhere(video.source, limits)
        with VideoFile(video.source) as file:
            while True:
                plan, times = self._plan_file(file, limits), []
                shown = self._images(file, plan, limits, times)
                if limits["progress"]:
                    shown = logging.tqdm(shown, **self._bar(file, plan))
                try:
                    frames = torch.stack(list(self._sized(shown, plan, limits)))
                except Remeasure:
                    continue
                return frames, self._metadata(file, plan, limits, times)

    def _open(self, video, metadata, call):
        """One video of which the first temporal step is there and the others are read later."""
        limits = self._limits(video, call)
        pair = self.temporal_patch_size
        if not isinstance(video.source, str):
            frames = self._given_frames(video)
            plan, frames, metadata = self._plan_frames(frames, metadata, limits)
            frames = self._sized(frames, plan, limits)
            return _OpenVideo(list(islice(frames, pair)), frames, plan.frames, metadata)
        if limits["video_backend"] != "pyav":
            raise ValueError(
                f"stream=True needs video_backend='pyav', not {limits['video_backend']!r}."
            )
        file = VideoFile(video.source)
        while True:
            plan = self._plan_file(file, limits)
            frames = self._sized(self._images(file, plan, limits, []), plan, limits)
            try:
                # Here, so that a file that cannot be decoded is refused now, and one whose time
                # stamps are out of order is planned again.
                first = list(islice(frames, pair))
            except Remeasure:
                continue
            rest = self._rest(file, plan, limits, frames)
            # Times at the file's own rate; which frames there are has not been seen.
            rate, start = file.rate, limits["video_start"] or 0
            times = [int((start + s + file.CLOSE) * rate) / rate for s in plan.seconds]
            metadata = self._metadata(file, plan, limits, times)
            return _OpenVideo(first, rest, plan.frames, metadata)

    def _rest(self, file, plan, limits, frames):
        """The frames that `frames` still has, for a thread that reads them in the background."""
        with file:
            if limits["progress"]:
                bar = self._bar(file, plan)
                frames = logging.tqdm(frames, initial=self.temporal_patch_size, **bar)
            try:
                yield from frames
            except Remeasure:
                raise ValueError(
                    f"{file.name} is not as long as its header says, or its time stamps are out of "
                    "order, which was seen only after frames of it had been given out: read it "
                    "without stream=True."
                ) from None

    def _bar(self, file, plan):
        return {"total": plan.frames, "desc": f"Reading {file.name}", "leave": False}

    def _plan_file(self, file, limits):
        start, end = limits["video_start"] or 0, limits["video_end"] or file.duration
        end = min(end, file.duration)
        if not 0 <= start < end:
            raise ValueError(
                f"video_start {start} and video_end {end} leave nothing of {file.name}, which "
                f"lasts {file.duration:.1f} s."
            )
        frames = max(1, round(file.frames * (end - start) / file.duration))
        return self._plan(end - start, frames, file.height, file.width, limits)

    def _images(self, file, plan, limits, times):
        """Yields the frames of a plan, uint8 [3, height, width]; adds their times to `times`."""
        start = limits["video_start"] or 0
        for time, frame in file.frames_at([start + second for second in plan.seconds]):
            times.append(time)
            yield torch.from_numpy(file.image(frame).copy()).permute(2, 0, 1)

    def _metadata(self, file, plan, limits, times):
        """Of the frames of a plan, which are on screen at these times."""
        start = limits["video_start"] or 0
        # A rate at which the frames taken are what the plan says apart.
        total = max(1, round(plan.duration * file.rate))
        rate = total / plan.duration
        indices = [round(time * rate) for time in times]
        if any(abs(time * rate - i) > 0.25 for time, i in zip(times, indices, strict=True)):
            # A file of changing rate has no frame number for a time: count on an even grid of
            # about its mean rate that holds every sampled time exactly.
            step = max(1, round(file.frames * plan.duration / file.duration / plan.frames))
            total, rate = step * plan.frames, step * plan.frames / plan.duration
            indices = [round(start * rate) + i for i in range(0, total, step)]
        return VideoMetadata(
            total_num_frames=total,
            fps=rate,
            height=file.height,
            width=file.width,
            duration=plan.duration,
            video_backend="pyav",
            frames_indices=indices,
        )

    def _read_elsewhere(self, source, limits):
        """The same with another decoder, by frame number."""
        backend, plans, chosen = limits["video_backend"], [], []
        if limits["video_start"] or limits["video_end"]:
            raise ValueError(
                f"video_start and video_end need video_backend='pyav', not {backend!r}."
            )
        try:
            importlib.import_module(backend)
        except (ImportError, OSError, RuntimeError) as error:
            raise ImportError(
                f"video_backend is {backend!r}, which cannot be imported here "
                f"({str(error).splitlines()[0]}). Install it, or leave video_backend out."
            ) from error

        def choose(metadata, **unused):
            total, size = metadata.total_num_frames, (metadata.height, metadata.width)
            if None in size:  # decord does not tell
                with VideoFile(source) as file:
                    size = (file.height, file.width)
            plans.append(self._plan(total / metadata.fps, total, *size, limits))
            chosen.extend(_spread(total, plans[0].frames))
            return chosen

        frames, metadata = load_video(source, backend=backend, sample_indices_fn=choose)
        metadata.frames_indices = chosen
        frames = self._sized(_channels_first(torch.as_tensor(frames)), plans[0], limits)
        return torch.stack(list(frames)), metadata

    def _given_frames(self, video):
        """The frames of a message or call, [frames, channels, height, width]."""
        if isinstance(video.source, (np.ndarray, torch.Tensor)):
            return _channels_first(torch.as_tensor(video.source))
        frames = [
            load_image(frame) if isinstance(frame, str) else frame
            for frame in map(_path, video.source)
        ]
        frames = [
            torch.from_numpy(np.array(frame.convert("RGB")))
            if isinstance(frame, Image.Image)
            else torch.as_tensor(frame)
            for frame in frames
        ]
        sizes = {tuple(frame.shape) for frame in frames}
        if len(sizes) != 1:
            raise ValueError(f"The frames of a video must have one size, not {sorted(sizes)}.")
        return _channels_first(torch.stack(frames))

    def _plan_frames(self, frames, metadata, limits):
        """The plan of given frames, the frames that it takes and the metadata of those."""
        count, (height, width) = len(frames), frames[0].shape[-2:]
        if metadata is None:
            if not limits["fps_given"]:
                logger.warning_once(
                    "Frames were given without metadata or fps; taking them for 2 a second."
                )
            rate = limits["fps"] if limits["fps_given"] else 2.0
            # At their own rate there is nothing to choose from; a number of frames can be asked.
            sample = bool(limits["do_sample_frames"]) and limits["num_frames"] is not None
            metadata = VideoMetadata(total_num_frames=count, fps=rate)
        else:
            metadata = VideoMetadata(**dict(metadata))
            sample = bool(limits["do_sample_frames"])
        total, rate = metadata.total_num_frames or count, metadata.fps
        if not rate:
            raise ValueError("video_metadata has no fps; give the rate of the video.")
        indices = metadata.frames_indices
        indices = _spread(total, count) if indices is None else [int(i) for i in indices]
        if len(indices) != count:
            raise ValueError(
                f"video_metadata counts {len(indices)} frames (frames_indices), but {count} were "
                "given."
            )
        plan = self._plan(total / rate, count, height, width, limits, sample)
        kept = _spread(count, plan.frames)
        frames = frames if len(kept) == count else frames[kept]
        metadata.total_num_frames, metadata.fps = total, rate
        metadata.frames_indices = [indices[i] for i in kept]
        return plan, frames, metadata

    def _sized(self, frames, plan, limits):
        """Yields each frame resized as it comes, so that large ones do not pile."""
        size = SizeDict(height=plan.height, width=plan.width)
        factor = self.patch_size * self.merge_size
        for frame in frames:
            height, width = frame.shape[-2:]
            if limits["do_resize"] is not False:
                frame = self._resize(frame, size)
            elif height % factor or width % factor:
                raise ValueError(
                    f"do_resize is False, but {height}x{width} pixels are not multiples of "
                    f"{factor}; resize the frames to such a size or leave do_resize out."
                )
            yield frame

    def _resize(self, frame, size):
        """One frame [channels, height, width], as the parent resizes a whole video."""
        if frame.shape[-2:] == (size.height, size.width):
            return frame
        # Two classes up: the parent's own method works out a size first.
        return super(Qwen2VLVideoProcessor, self).resize(frame, size=size, resample=self.resample)


class _OpenVideo(NamedTuple):
    """A video that is read later.

    first: the frames of its first temporal step, uint8 [3, height, width] each.
    rest: an iterator over the frames after those.  count: of all frames.
    """

    first: list
    rest: object
    count: int
    metadata: VideoMetadata


def _spread(total, count) -> list[int]:
    """`count` of the indices below `total`, evenly."""
    return [int(i * total / count + 1e-6) for i in range(count)]


def _as_list(item):
    return item if isinstance(item, (list, tuple)) else [item]


def _channels_first(video):
    """[frames, height, width, channels] or [frames, channels, height, width] to the latter."""
    if video.ndim != 4 or not len(video):
        raise ValueError(f"A video must be [frames, height, width, 3], not {list(video.shape)}.")
    kind = infer_channel_dimension_format(video, num_channels=(1, 3, 4))
    return video.permute(0, 3, 1, 2) if kind == ChannelDimension.LAST else video


class VideoNSAProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor; each video of a message may carry settings of its own."""

    def apply_chat_template(self, conversation, *args, **kwargs):
        """As Qwen2.5-VL's; a video's message may set what `plan_video` takes, for that video."""
        if (
            isinstance(conversation, (list, tuple))
            and conversation
            and not _is_message(conversation[0])
        ):
            conversation = [self._bind_settings(one) for one in conversation]
        else:
            conversation = self._bind_settings(conversation)
        return super().apply_chat_template(conversation, *args, **kwargs)

    def plan_videos(self, messages, max_tokens=None, **settings):
        """Plans the videos of one conversation: returns (messages, plans), a plan per video.

        max_tokens: what all videos together may take. A conversation over it gets back messages
            in which each video has its share of the budget, in proportion to what it would take.
        settings: as for a call of the processor.
        """
        messages = self._bind_settings(messages)
        videos = [part["video"] for part in _parts(messages) if _source(part) is not None]
        plan = self.video_processor.plan
        plans = [plan(video, **settings) for video in videos]
        total = sum(one.tokens for one in plans)
        if max_tokens is not None and total > max_tokens:
            for video, one in zip(videos, plans, strict=True):
                video.settings["max_tokens"] = one.tokens * max_tokens // total
            plans = [plan(video, **settings) for video in videos]
        return messages, plans

    def __call__(self, images=None, text=None, videos=None, **kwargs):
        if videos is not None:
            videos = _flatten(videos)
            rates = kwargs.get("fps")
            if isinstance(rates, (list, tuple)):  # as qwen-vl-utils gives them, one per video
                kwargs.pop("fps")
                if len(rates) != len(videos):
                    raise ValueError(f"fps has {len(rates)} values for {len(videos)} videos.")
                for video, rate in zip(videos, rates, strict=True):
                    video.settings.setdefault("fps", rate)
        if text is not None and not kwargs.get("sanitize_control_tokens"):
            self._check_placeholders(text, self.image_token, "image", _count_images(images))
            self._check_placeholders(text, self.video_token, "video", len(videos or []))
        return super().__call__(images=images, text=text, videos=videos, **kwargs)

    def _check_placeholders(self, text, token, kind, given):
        texts = [text] if isinstance(text, str) else text
        found = sum(one.count(token) for one in texts)
        if found == given:
            return
        # What the chat template writes stands between markers; what a user types does not.
        typed = "\n".join(texts).replace(f"<|vision_start|>{token}<|vision_end|>", "")
        line = next((line for line in typed.splitlines() if token in line), None)
        hint = f"give as many {kind}s as there are placeholders."
        if line is not None:
            at = line.index(token)
            excerpt = line[max(at - 60, 0) : at + len(token) + 60].replace("<|im_end|>", "")
            hint = f"take it out of the text {excerpt!r}, or break it up there."
        raise ValueError(
            f"The text has {found} {token} placeholder{'s' * (found != 1)} for {given} "
            f"{kind}{'s' * (given != 1)}: {hint}"
        )

    def _bind_settings(self, conversation):
        """A copy of the messages in which every video has its settings with it."""
        known = VideoNSAVideoProcessor.MESSAGE_KEYS
        messages = []
        for message in getattr(conversation, "messages", conversation):
            if isinstance(message, dict) and isinstance(message.get("content"), (list, tuple)):
                content = []
                for part in message["content"]:
                    if isinstance(part, dict) and _source(part) is not None:
                        settings = {k: v for k, v in part.items() if k not in known}
                        part = {"type": "video", "video": _Video.of(_source(part), settings)}
                    content.append(part)
                message = {**message, "content": content}
            messages.append(message)
        return messages


def _count_images(images):
    if isinstance(images, (list, tuple)):
        return sum(map(_count_images, images))
    if images is None:
        return 0
    return len(images) if getattr(images, "ndim", 3) == 4 else 1


def _is_message(item):
    return isinstance(item, dict) or hasattr(item, "content")


def _source(part):
    """The video that a part of a message brings, or None."""
    if part.get("type") != "video" and ("type" in part or "video" not in part):
        return None
    return next((part[key] for key in ("video", "url", "path") if part.get(key) is not None), None)


def _parts(messages):
    for message in messages:
        if isinstance(message.get("content"), (list, tuple)):
            yield from message["content"]


VideoNSAVideoProcessor.register_for_auto_class()
VideoNSAProcessor.register_for_auto_class()
