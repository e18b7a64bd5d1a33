"""Video files: their length, size and rate, and the frames on screen at given times.

`VideoFile` reads a file or an address with PyAV, by seeking where that is exact and in order where
it is not. Nothing here knows of plans, tokens or the processor.
"""

import copy
import math
import statistics
import threading
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
from transformers.utils import logging

from .joined_recordings_videonsa import Rest, begins_again, rest_of
from .video_packets_videonsa import Clock, Decoded, Holes, Losses, Packets
from .video_plan_videonsa import MAX_FRAME_PIXELS
from .video_source_videonsa import PYAV, VideoSource, av

logger = logging.get_logger(__name__)
ONCE = threading.Lock()  # two threads that warn at the same time would do it twice

# Colour matrices other than BT.601, by FFmpeg's number (AVColorSpace) and by swscale's: BT.709,
# FCC, SMPTE 240M and two of BT.2020. PyAV before 16 takes all for BT.601.
MATRICES = {1: 1, 4: 4, 7: 7, 9: 9, 10: 9}
BT601, LIMITED_RANGE, FULL_RANGE = 5, 1, 2
INTRA, BIDIRECTIONAL = 1, 3  # AVPictureType
JPEG = b"\xff\xd8"  # begins a picture
HIGH_DYNAMIC_RANGE = {16: "PQ", 18: "HLG"}  # AVColorTransferCharacteristic
WIDE_GAMUT = {9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}  # AVColorPrimaries


class Orientation(NamedTuple):
    """How a stored picture is shown: its axes are exchanged first, then it is mirrored."""

    swap_axes: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def show(self, image: np.ndarray) -> np.ndarray:
        if self.swap_axes:
            image = image.swapaxes(0, 1)
        return image[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


def orientation_of(frame, name) -> Orientation:
    """What the display matrix of a frame says, to the nearest quarter turn; `name` for notices.

    Its numbers [[a, b, .], [c, d, .], ...] show the pixel of column x and row y at column
    a x + c y, row b x + d y (ISO/IEC 14496-12, 6.2.2).
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return Orientation()
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    straight, crossed = max(abs(a), abs(d)), max(abs(b), abs(c))
    if 0.01 < min(straight, crossed) / max(straight, crossed, 1):
        angle = math.degrees(math.atan2(b, a))
        logger.warning_once(
            f"{name}: its picture is shown turned by {angle:.0f} degrees, and is read turned to "
            "the nearest quarter."
        )
    if crossed > straight:
        return Orientation(True, flip_rows=b < 0, flip_columns=c < 0)
    return Orientation(False, flip_rows=d < 0, flip_columns=a < 0)


class Remeasure(Exception):
    """The file was not as measured; it has been measured again. Plan it and read it again."""


class ReadingEnded(Exception):
    """`VideoFile.ended` was set while the file was read."""


class VideoFile:
    """A video file as PyAV decodes it, and the frames on screen at given times.

    duration: seconds from the first frame to the end of the last.  frames, rate: how many, per
    second (of a file of changing rate: the mean).  height, width: of the shown picture, turned
    upright and with square pixels.  in_order: true when seeking cannot be trusted and the file is
    decoded from its start.  has_sound: whether it has a track of sound, which is never read.

    Raises ValueError for a file that is empty, not a video, without a picture track, damaged at its
    start or cut short, and for frames that are too large.
    """

    # Seeking in these lands on the wrong frame or loses the first second.
    IN_ORDER = ("avi", "mpeg")
    # Containers round times to a millisecond: a frame that comes by this much too late is on
    # screen already, if it is nearer than the one before.
    CLOSE = 1e-3
    # Frames that decode faster than a seek past them.
    WORTH_SEEKING = 10
    # Frames of a file decoded in order, more than B-frames can be out of their places.
    FIRST_LOOK = 16
    # Frames before the last that tell how long frames last there.
    TAIL = 9
    # Decoders that skip only frames that no other one refers to. FFmpeg's for HEVC also skips those
    # that frames of a higher temporal layer refer to.
    SKIPPING = ("h264",)
    # MPEG-1 and MPEG-2 show so many frames a second, always: after a gap, some were lost.
    STEADY = ("mpeg1video", "mpeg2video")

    # What the GPU's decoder gives bit for bit. Ten bits lose some on their way to RGB.
    GPU_FORMATS = ("yuv420p", "yuvj420p")

    container = stream = None
    # Set by those who read one file with several readers: whether reading is to end, and whether
    # this is one of several, which do not measure the file again.
    ended = one_of_several = False
    gpu = None  # the number of the GPU that decodes

    def __init__(self, source):
        self.source = VideoSource(source)
        self.name = self.source.name
        self.key_gap, self.joined, self.at_joins, self._times = math.inf, False, [], None
        self._open()
        kind = self.container.format
        if kind.name in ("mjpeg", "mpjpeg"):
            self._check_pictures()
        self.rate = float(self.stream.average_rate or self.stream.guessed_rate or 25)
        self.tick = float(self.stream.time_base)
        # A frame at every tick: of a DV file FFmpeg says 60,000 a second.
        if kind.flags & av.format.Flags.no_timestamps.value or self.rate * self.tick >= 1:
            self.rate = float(self.stream.guessed_rate or self.rate)
        # Recordings in these formats can be joined byte by byte, and state no duration.
        self.may_jump = bool(kind.flags & av.format.Flags.ts_discont.value)
        self.start, self.stamped = 0, None  # not known yet
        codec = self.stream.codec_context.codec.canonical_name
        self.skips, self.unskipped = codec in self.SKIPPING, -math.inf
        self.holes = Holes(codec)
        self.longest_gap = 3.5 / self.rate if codec in self.STEADY else math.inf
        in_order = kind.name in self.IN_ORDER
        first, lost, stamps = None, None, []
        for time, frame, lost_from, _ in islice(self._decode(), self.FIRST_LOOK if in_order else 1):
            if first is None:
                first, lost = frame, None if lost_from is None else time - lost_from
            stamps.append(frame.pts)
        if first is None:
            raise self._error(
                f"has no frame that can be decoded, or none of up to {MAX_FRAME_PIXELS:,} pixels"
            )
        if lost is not None and lost > 2:
            # Less is usual in a recording that starts between two key frames.
            raise self._error(f"is damaged: its first {lost:.1f} s cannot be decoded")
        if lost is not None and lost > 2 / self.rate:
            logger.warning_once(f"{self.name}: its first {lost:.1f} s cannot be decoded; left out.")
        self._set_shape(first)
        self.stamped = None not in stamps and stamps == sorted(set(stamps))
        self.start = stamps[0] if self.stamped else 0
        self.in_order = in_order or not self.stamped
        if in_order:
            self._say_in_order(f"seeking in {kind.name} files is not exact")
        elif not self.stamped:
            self._say_in_order("its frames have no time stamps")
        self._measure()

    def _check_pictures(self):
        """Of JPEG pictures one after the other, which FFmpeg sees in any file that holds some."""
        first = next(self._packets(self.stream), None)
        if first is None or not bytes(first).startswith(JPEG):
            raise ValueError(
                f"{self.name} is no video, but holds pictures, as a PDF or an archive does: give "
                "them as images."
            )
        logger.warning_once(
            f"{self.name}: it does not say how fast its pictures follow each other; taking them "
            f"for {float(self.stream.guessed_rate or 25):g} a second."
        )
        self._open()

    def _set_shape(self, first):
        self.orientation = orientation_of(first, self.name)
        self.stored, self.pixel_format = (first.height, first.width), first.format.name
        # Pixels need not be square: a DVD's 720 x 576 are shown as 1024 x 576.
        aspect = float(self.stream.sample_aspect_ratio or 1)
        if not 0.1 < aspect < 10:
            aspect = 1
        self.height, self.width = first.height, max(1, round(first.width * aspect))
        if self.orientation.swap_axes:
            self.height, self.width = self.width, self.height
        codec = self.stream.codec_context
        colours = None
        if transfer := HIGH_DYNAMIC_RANGE.get(int(codec.color_trc or 0)):
            colours = f"HDR ({transfer})"
        elif gamut := WIDE_GAMUT.get(int(codec.color_primaries or 0)):
            colours = f"of a wide gamut ({gamut})"
        if colours is not None:
            logger.warning_once(
                f"{self.name}: its colours are {colours} and are read as they are stored, paler "
                "than they are shown; convert it to SDR (BT.709) for its true colours."
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def __del__(self):
        self.close()  # PyAV's containers and streams refer to each other, and would stay open

    def close(self):
        """Frees the decoder; reading opens the file again."""
        if self.container is not None:
            self.container.close()
            self.container = self.stream = None

    def closed_copy(self, gpu: int | None = None):
        """The same file as it was measured, not open; for this GPU to decode, if one is given."""
        other = copy.copy(self)
        other.container, other.stream, other.gpu = None, None, gpu
        return other

    def moved(self):
        """The same file with what is open of it; this one is closed then."""
        other = copy.copy(self)
        self.container = self.stream = None
        return other

    def ensure_open(self):
        if self.container is None:
            self._open()

    def image(self, frame) -> np.ndarray:
        """The upright picture of a frame, uint8 [height, width, 3], its pixels as stored."""
        height, width = self.stored
        if not 0.98 < frame.height * width / (frame.width * height) < 1.02:
            with ONCE:
                logger.warning_once(
                    f"{self.name}: its pictures change their shape, from {height}x{width} to "
                    f"{frame.height}x{frame.width}; all are stretched to that of the first."
                )
        matrix = MATRICES.get(int(frame.colorspace))
        # By default, a conversion starts a thread for each core.
        how = {"threads": 1} if self.one_of_several and PYAV >= 18 else {}
        if matrix is not None:
            how |= {
                "src_colorspace": matrix,
                "dst_colorspace": BT601,  # RGB has none, but PyAV 15 looks for a difference
                "src_color_range": int(frame.color_range) or LIMITED_RANGE,
                "dst_color_range": FULL_RANGE,
            }
        try:
            if frame.format.name == "cuda":
                # It comes as NV12, from which the conversion to RGB rounds differently.
                frame = frame.reformat(format=self.pixel_format)
            rgb = frame.reformat(format="rgb24", **how)
            return self.orientation.show(rgb.to_ndarray())
        except av.FFmpegError as error:
            raise self._error(f"has a frame that cannot be shown ({error.strerror})") from error

    def frame_times(self) -> list[float]:
        """The time of every frame that is shown, from the packets, which are not decoded."""
        if self._times is None:
            if not self.stamped:
                self._times = [i / self.rate for i in range(self.frames)]
            else:
                self._times = self._packets_from_start().times
        return self._times

    def _packets_from_start(self, reopen=False) -> Packets:
        if self.container is not None and not self.in_order and not reopen:
            packets = self._read_packets(0)
            if packets.times and packets.times[0] == 0:
                return packets
        self._open()
        return self._read_packets()

    def frames_at(self, seconds):
        """Yields (time of the frame, frame) on screen at each of the ascending `seconds`.

        Frames that no other one refers to are skipped until shortly before each of these times.
        """
        held, frames = self._begin(seconds[0])
        ahead = held
        for second in seconds:
            self.unskipped = second - 2 / self.rate
            key = self.key_before(second)
            while ahead is not None and self._is_on_screen(ahead.since, held.time, second):
                was_skipped = not self._is_on_screen(ahead.time, held.time, second)
                if was_skipped:  # frames last longer here than the rate says
                    self.skips = False
                else:
                    held = ahead
                if was_skipped or self._is_far(second, held.time, key):
                    held, frames = self._seek(second)
                    key = -math.inf
                ahead = next(frames, None)
            late = second - held.time > 2 / self.rate + self.CLOSE
            if ahead is None:
                self._check_end(held.time, second)
            elif late and ahead.lost is not None:
                raise self._error(f"is damaged around {second:.1f} s")
            yield held.time, held.frame

    def _is_on_screen(self, time, before, second):
        """Whether the frame of this time is on screen, or still that of the time `before`."""
        early = time - second
        return early <= 0 or (early <= self.CLOSE and early < second - before)

    def _begin(self, second):
        """A frame at or before `second`, the first of the file or one near, and what follows it."""
        if self.container is not None and self._is_far(second, 0, self.key_before(second)):
            return self._seek(second)
        frames = self._from_start()
        first = next(frames, None)
        if first is None:
            raise self._error("has no frame that can be decoded")
        return first, frames

    def _is_far(self, second, time, key):
        """Whether decoding from `time` to `second` takes longer than seeking; see `key_before`."""
        if self.in_order:
            return False
        return second - time > self.key_gap or key - time > self.WORTH_SEEKING / self.rate

    def _check_end(self, last, second):
        """`last` is the time of the last frame that decoded, `second` one that is asked for."""
        missing = self.duration - last
        if missing <= max(self.last_frame_lasts, 2 / self.rate) + self.CLOSE:
            return
        if self.in_order and not self.damaged:
            self.frames = self.decoded
            self.duration = last + 1 / self.rate
            self._times = None
            raise Remeasure
        raise self._error(f"can be read only up to {last:.1f} s of {self.duration:.1f} s")

    def key_before(self, second):
        """The time, roughly, of the last key frame up to `second`; -inf where no index tells."""
        entries = getattr(self.stream, "index_entries", None)  # newer PyAV
        if entries is None or not self.stamped:
            return -math.inf
        stamp = self.start + int(second / self.tick)
        index = entries.search_timestamp(stamp, backward=True)
        return (entries[index].timestamp - self.start) * self.tick if index >= 0 else -math.inf

    def can_seek(self, second) -> bool:
        """Whether decoding can begin with a key frame at or before `second`."""
        if self.in_order:
            return False
        first, _ = self._land(second)
        return _is_whole(first.frame)

    def _seek(self, second):
        """A frame at or before `second` and the ones that follow it."""
        first, frames = self._land(second)
        if not _is_whole(first.frame):
            if self.one_of_several:
                raise Remeasure
            self.in_order = True
            self._say_in_order("its pictures are renewed in parts, without key frames")
            self._open()
            frames = self._decode()
            first = next(frames)
        return first, frames

    def _land(self, second):
        """The first frame after a seek to `second`, or far enough before it, and what follows."""
        step = 0.0
        while second - step > 0:
            try:
                stamp = self.start + int((second - step) / self.tick)
                self.container.seek(stamp, stream=self.stream, backward=True)
                frames = self._decode()
                first = next(frames, None)
            except av.FFmpegError:
                first = None
            if first is not None and first.time <= second:
                break
            step = max(1.0, 2 * step)
        else:
            self._open()
            frames = self._decode()
            first = next(frames)
        # Seeking pays only for gaps larger than what has to be decoded after it.
        self.key_gap = max(self.key_gap, second - first.time)
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
            if first is not None and first.time == 0:
                return chain([first], frames)
        self._open()
        return self._decode()

    def _decode(self):
        """Yields each frame as `Decoded`, from the current position on, damaged ones left out."""
        self.decoded, self.damaged, held, corrupt = 0, False, [], False
        clock, losses, last, last_key = self._clock(), Losses(), -math.inf, None
        context, skips, latest = self.stream.codec_context, None, -math.inf
        try:
            for packet in self._packets(self.stream):
                hole = self.holes.has(packet)
                if packet.size and not packet.is_discard:
                    time = clock.seconds(packet)
                    skip = not losses.seen and self._may_skip(time, latest)
                    if skip is not skips:
                        context.skip_frame, skips = "NONREF" if skip else "DEFAULT", skip
                    latest = latest if time is None else max(latest, time)
                    # FFmpeg marks the frame before where it finds the end of one by the next.
                    before, corrupt = corrupt, packet.is_corrupt and time not in self.at_joins
                    losses.send(packet, time, hole or corrupt or before, skip)
                    if clock.joins and self.stamped and not self.joined:
                        self._measure_again(joined=True)
                try:
                    frames = [] if hole else packet.decode()
                except av.InvalidDataError:
                    losses.start()
                    frames = []
                held, frames = held + frames, []
                if held and not (packet.size and self._is_waiting(held)):
                    losses.look_at(held, last, self.longest_gap if self.stamped else math.inf)
                    frames, held = held, []
                self.damaged = losses.seen
                if self.damaged and self.decoded and self.stamped is False:
                    raise self._error(f"is damaged after {last:.1f} s")  # what is lost counts
                for frame in frames:
                    time = losses.receive(frame)
                    if not losses.is_right(frame, time):
                        self.damaged = True
                        continue
                    if time is None and frame.pts is not None:
                        time = (frame.pts - self.start) * self.tick + clock.offset
                    lost = losses.between(last, time)
                    if self.stamped is False:
                        time = self.decoded / self.rate
                    elif self.stamped and (time is None or time <= last):
                        if self.damaged:
                            raise self._error(f"is damaged after {last:.1f} s")
                        self._measure_again(stamped=False)
                    if frame.key_frame and time is not None:
                        if last_key is not None:
                            seen = self.key_gap if math.isfinite(self.key_gap) else 0
                            self.key_gap = max(seen, time - last_key)
                        last_key = time
                    skipped = losses.skipped_between(last, time)
                    self.decoded, last = self.decoded + 1, time
                    yield Decoded(time, frame, lost, skipped)
        except av.FFmpegError:  # the container itself ends in the middle
            self.damaged = True

    def _is_waiting(self, frames):
        """Whether the last of these frames may be made from one that comes out after it.

        Only then is it known whether that one is right. On the GPU there is no room to wait.
        """
        waits = int(frames[-1].pict_type) == BIDIRECTIONAL and self.gpu is None
        return waits and len(frames) < self.FIRST_LOOK

    def _may_skip(self, time, latest):
        """Whether the frame of a packet, if no other one refers to it, need not be decoded.

        time, latest: of the packet and the latest of those before it. Only what is shown before a
        frame that was sent earlier is skipped, so that stamps out of order are seen as ever.
        """
        if time is None or time >= min(latest, self.unskipped):
            return False
        return self.skips and not self.in_order

    def _clock(self):
        return Clock(self.start, self.tick, 1 / self.rate, self.may_jump)

    def _packets(self, *streams):
        try:
            for packet in self.container.demux(*streams):
                if self.ended:
                    raise ReadingEnded
                yield packet
        except IndexError:  # PyAV, at the end of a file in which a track appeared on the way
            pass

    def _say_in_order(self, why):
        logger.warning_once(f"{self.name}: {why}; decoding the whole file from its start.")

    def _measure_again(self, **found):
        """Measures the file as what it was found to be: `joined`, or not `stamped`."""
        if self.one_of_several:
            raise Remeasure
        vars(self).update(found, in_order=True, _times=None)
        if not self.stamped:
            self._say_in_order("its time stamps are missing or not in order")
        self._measure()
        raise Remeasure

    def _measure(self):
        """Sets duration, frames and last_frame_lasts from the packets, which are not decoded."""
        promised = None if self.may_jump else self._promised_end()
        packets, back, rest = None, 1.0, rest_of(self.source, self.container)
        if rest is Rest.MISREAD:
            raise self._error(
                "is joined byte by byte of fragmented MP4 files, which cannot be read rightly; "
                "join them with ffmpeg -f concat"
            )
        has_parts = rest is Rest.READ
        read_through = self.in_order or self.may_jump or promised is None or has_parts
        while not read_through:
            packets = self._read_packets(promised - back)
            last = packets.times[-1] if packets.times else -math.inf
            read_through = bool(packets.joins) or last < promised - max(1.0, 0.02 * promised)
            if len(packets.times) >= self.TAIL or back >= promised:
                break
            back *= 8
        if read_through:
            packets = self._packets_from_start(reopen=has_parts)
        if rest is Rest.LEFT_OUT or begins_again(self.source, self.container, packets.end_byte):
            logger.warning_once(
                f"{self.name}: another recording follows after its end and is not read; join them "
                "with ffmpeg -f concat instead of byte by byte."
            )
        if packets.joins and self.stamped:
            self.joined = self.in_order = True
            self.at_joins = packets.at_joins
            starts = ", ".join(f"{time:.1f}" for time in packets.joins[:3])
            self._say_in_order(
                f"it is joined of recordings, whose clock starts again at {starts} s"
            )
        index = getattr(self.stream, "index_entries", ())  # newer PyAV
        if self.container.format.name == "avi" and len(index) > packets.count:
            raise self._error(
                f"has {len(index)} frames by its index, but only {packets.count} of them are there"
            )
        self.frames = packets.count if read_through else self.stream.frames
        if self.stamped and packets.times:
            self.last_frame_lasts = self._last_interval(packets)
            end = packets.times[-1] + self.last_frame_lasts
            everything = max(end, packets.end)
            if read_through:
                self._times, self.frames = packets.times, len(packets.times)
        else:
            self.last_frame_lasts = 1 / self.rate
            end = everything = self.frames / self.rate
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

    def _last_interval(self, packets):
        """Seconds that the last frame lasts: as long as those before it usually do.

        The length that a file states for it is often a mere default, and the frame before it may
        have stood for long: a recording of a still screen, stopped.
        """
        times = packets.times[-self.TAIL :]
        gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
        stated = packets.last_stated or 1 / self.rate
        if not gaps:
            return stated
        usual = statistics.median(gaps[:-1]) if len(gaps) > 1 else 1 / self.rate
        return max(packets.last_stated or usual, min(gaps[-1], usual))

    def _read_packets(self, second=None) -> Packets:
        """Reads the packets of all tracks, from `second` on (None: from here)."""
        clock, times, last, sound = self._clock(), [], (-math.inf, 0), -math.inf
        count, doubtful, at_joins, whole = 0, [], [], None
        try:
            if second is not None:
                stamp = max(self.start + int(second / self.tick), self.start)
                self.container.seek(stamp, stream=self.stream, backward=True)
            for packet in self._packets():
                if not packet.size or packet.is_discard:
                    continue
                if not packet.is_corrupt:
                    whole = packet
                if packet.stream.index != self.stream.index:
                    stamp = packet.dts if packet.pts is None else packet.pts
                    if stamp is not None and not packet.is_corrupt:
                        ended = float((stamp + (packet.duration or 0)) * packet.time_base)
                        sound = max(sound, ended - self.start * self.tick)
                    continue
                joins, time = len(clock.joins), clock.seconds(packet)
                if len(clock.joins) > joins:
                    # That the end of a recording seems to be damaged is due to what follows it.
                    at_joins += [t for t in doubtful if t > time - clock.BACK]
                    doubtful = []
                if packet.is_corrupt:
                    doubtful.append(time)
                    continue
                count += 1
                # Before the first frame is what could not be decoded.
                if time is not None and time > -self.tick / 2:
                    times.append(time)
                    last = max(last, (time, (packet.duration or 0) * self.tick))
        except av.FFmpegError:
            pass
        times = sorted(times + at_joins)
        end_byte = 0 if whole is None else (whole.pos or 0) + whole.size
        return Packets(times, count, last[1], sound, clock.joins, at_joins, end_byte)

    def _open(self):
        """Opens the file (again): the one way back to the start that every format has."""
        self.close()
        if self.gpu is not None and self.pixel_format not in self.GPU_FORMATS:
            raise self._error(f"has {self.pixel_format} pixels, which the GPU gives in other bits")
        try:
            self.container = self.source.open(self.gpu)
        except (av.FFmpegError, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            if isinstance(error, ValueError):  # invalid data, or no format of the list
                reason = "it is damaged, or of no format that recordings have"
            raise self._error(f"cannot be opened as a video ({reason})") from error
        cover = av.stream.Disposition.attached_pic
        pictures = [s for s in self.container.streams.video if not s.disposition & cover]
        # An animated AVIF file has its first picture as a track of its own.
        pictures = [s for s in pictures if s.frames != 1] or pictures
        if not pictures:
            tracks = sorted({stream.type for stream in self.container.streams}) or ["none"]
            raise self._error(f"has no picture track (tracks: {', '.join(tracks)})")
        self.has_sound = bool(self.container.streams.audio)
        default = av.stream.Disposition.default
        self.stream = next((s for s in pictures if s.disposition & default), pictures[0])
        context = self.stream.codec_context
        if context is None:
            raise self._error("has a picture track of a format that PyAV does not decode")
        if context.height * context.width > MAX_FRAME_PIXELS:
            raise self._error(
                f"has no frame of up to {MAX_FRAME_PIXELS:,} pixels, but of "
                f"{context.height:,}x{context.width:,}"
            )
        context.options = {**context.options, "max_pixels": str(MAX_FRAME_PIXELS)}
        if self.one_of_several:
            context.thread_count = 1
        if self.gpu is not None and not context.is_hwaccel:
            raise self._error(f"is {context.name}, which the GPU does not decode")

    def _error(self, what):
        return ValueError(f"{self.name} {what}: {self.source.convert_hint()}.")


def _is_whole(frame):
    """Whether a frame that decoding began with needs no other: a key frame, or all of I slices."""
    return bool(frame.key_frame) or int(frame.pict_type) == INTRA
