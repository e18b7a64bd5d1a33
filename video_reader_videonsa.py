"""Video files: their length, size and rate, and the frames on screen at given times.

`VideoFile` reads a file or an address with PyAV, by seeking where that is exact and in order where
it is not. It knows nothing of plans, tokens or the processor.
"""

import copy
import io
import math
import os
from itertools import chain, islice

import numpy as np
from transformers.utils import logging

from .media_sources_videonsa import describe_source

try:
    import av
except ImportError:  # reading a file says so; frames that are given need no reader
    av = None

logger = logging.get_logger(__name__)


class Remeasure(Exception):
    """The file is not as it was measured; its numbers are mended, plan and read again."""


class VideoFile:
    """A video file as PyAV decodes it, and the frames on screen at given times.

    duration: seconds from the first frame to the end of the last.  frames, rate: how many, per
    second (of a file of changing rate: the mean).  height, width: pixels, upright.
    in_order: true when seeking cannot be trusted and the file is decoded from its start.

    Raises ValueError for a file that is empty, not a video, without a picture track or cut short.
    """

    container = stream = None
    # Seeking in these lands on the wrong frame or loses the first second.
    IN_ORDER = ("avi", "mpeg")
    # Two times closer than this are one; containers round to a millisecond.
    CLOSE = 1e-3
    # Frames that decode faster than a seek past them.
    WORTH_SEEKING = 10
    # Frames of a file decoded in order, more than B-frames can be out of their places.
    FIRST_LOOK = 16

    def __init__(self, source: str | bytes):
        if av is None:
            raise ImportError(
                "Reading a video file needs PyAV, which is not installed: pip install av. "
                "(Or pass the frames themselves.)"
            )
        self.source = source
        self.is_url = isinstance(source, str) and "://" in source
        self.name = source if self.is_url else os.path.basename(describe_source(source))
        self.key_gap = math.inf
        self._open()
        kind = self.container.format
        self.rate = float(self.stream.average_rate or self.stream.guessed_rate or 25)
        if kind.flags & av.format.Flags.no_timestamps.value:
            self.rate = float(self.stream.guessed_rate or self.rate)
        self.tick = float(self.stream.time_base)
        self.start, self.stamped = 0, False
        frames = self._decode()
        _, first, whole = next(frames, (0, None, True))
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
        try:
            if self.in_order:
                self._say_in_order(f"seeking in {kind.name} files is not exact")
                # Time stamps that are out of order mostly are so from the first B-frame on.
                for _ in islice(frames, self.FIRST_LOOK):
                    pass
            self._measure()
        except Remeasure:  # measured already
            pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Frees the decoder; reading opens the file again."""
        if self.container is not None:
            self.container.close()
            self.container = self.stream = None

    def __del__(self):
        self.close()  # PyAV's containers and streams refer to each other, and would stay open

    def closed_copy(self):
        """The same file as it was measured, not open."""
        other = copy.copy(self)
        other.container = other.stream = None
        return other

    def image(self, frame) -> np.ndarray:
        """The upright picture of a frame, uint8 [height, width, 3]."""
        try:
            return np.rot90(frame.to_ndarray(format="rgb24"), self.quarter_turns)
        except av.FFmpegError as error:
            raise self._error(f"has a frame that cannot be shown ({error.strerror})") from error

    def frames_at(self, seconds):
        """Yields (time of the frame, frame) on screen at each of the ascending `seconds`."""
        frames = self._from_start()
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
            self._open()
            frames = self._decode()
            first = next(frames)
        # Seeking pays only for gaps larger than what has to be decoded after it.
        self.key_gap = max(self.key_gap, second - first[0])
        return first, frames

    def _from_start(self):
        """What `_decode` yields, from the first frame on."""
        if self.container is not None and not self.in_order:
            try:
                self.container.seek(self.start, stream=self.stream, backward=True)
                frames = self._decode()
                first = next(frames, None)
            except av.FFmpegError:
                first = None
            if first is not None and abs(first[0]) <= self.CLOSE:
                return chain([first], frames)
        self._open()
        return self._decode()

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
            self._open()
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

    def _open(self):
        """Opens the file (again): the one way back to the start that every format has."""
        self.close()
        source = self.source
        if isinstance(self.source, bytes):
            source = io.BytesIO(self.source)
        elif not self.is_url:
            if not os.path.exists(self.source):
                raise FileNotFoundError(f"There is no video file {describe_source(source)}.")
            if os.path.isfile(self.source) and not os.path.getsize(self.source):
                raise self._error("is empty (0 bytes)")
        try:
            self.container = av.open(
                source, metadata_errors="replace", timeout=30 if self.is_url else None
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
