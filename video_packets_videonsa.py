"""What packets and decoded frames tell: their times, and what was lost or skipped on the way.

`Clock` makes seconds of time stamps, through recordings that were joined as well; `Holes` tells
packets of which a part was never written, and `Losses` which frames of a damaged file are right.
Nothing here opens or decodes.
"""

import math
import re
from typing import NamedTuple


class Clock:
    """Seconds since the first frame for the packets of a track, which come in decoding order.

    Where recordings were joined the time stamps start again; there the time goes on from the end of
    the packet before. joins: the times at which that was so.  offset: seconds since the first join
    that are added to what the time stamps say.

    start: time stamp of the first frame.  tick: seconds of one time stamp.  interval: seconds that
    a packet lasts that does not say.  jumps: whether the format's time stamps may also jump ahead.
    """

    # Seconds by which time stamps go back or ahead where recordings were joined; the second is
    # FFmpeg's own.
    BACK, AHEAD = 0.5, 10

    def __init__(self, start, tick, interval, jumps):
        self.start, self.tick, self.interval, self.jumps = start, tick, interval, jumps
        self.last, self.end, self.offset, self.joins = None, 0.0, 0.0, []

    def seconds(self, packet) -> float | None:
        decoded = packet.dts
        stamp = decoded if packet.pts is None else packet.pts
        if stamp is None:
            return None
        time = (stamp - self.start) * self.tick + self.offset
        # FFmpeg does not know when the first packets of some files are decoded.
        if decoded is not None and self.last is not None:
            step = (decoded - self.last) * self.tick
            if step < -self.BACK or (self.jumps and step > self.AHEAD):
                self.offset += self.end - time
                time = self.end
                self.joins.append(time)
        self.last = self.last if decoded is None else decoded
        end = time + ((packet.duration or 0) * self.tick or self.interval)
        if end > self.end:
            self.end = end
        return time


class Packets(NamedTuple):
    """What the packets of a file tell without being decoded.

    times: of the frames that are shown, ascending, in seconds since the first.  count: of packets.
    last_stated: seconds that the last frame lasts by its packet, 0 if that does not say.
    end: of all tracks, -inf without time stamps.  joins: as `Clock` has them.  at_joins: times of
    packets that are said to be damaged, where only the recording ends.  end_byte: where in the file
    the last packet ends.
    """

    times: list
    count: int
    last_stated: float
    end: float
    joins: list
    at_joins: list
    end_byte: int


class Decoded(NamedTuple):
    """A frame, its time in seconds since the first one, and the times of the earliest frames that
    were lost and that were skipped since the frame before, None where none was."""

    time: float
    frame: object
    lost: float | None
    skipped: float | None

    @property
    def since(self):
        """The time from which on the frame before is not on screen."""
        return self.time if self.skipped is None else self.skipped


class Holes:
    """Parts of packets that were never written, as downloads leave them that were interrupted.

    They are zeros, of which decoders make a picture without a word.

    codec: the name of the decoder, FFmpeg's.
    """

    # Zeros that no packet holds. H.264, HEVC and MPEG forbid four, and the first two are padded to
    # eight bytes; a 4K checkerboard in VP8 had 28.
    ZEROS = dict.fromkeys(("h264", "hevc", "mpeg1video", "mpeg2video"), 8)
    ZEROS |= dict.fromkeys(("vp8", "vp9", "av1", "mpeg4", "h263", "flv1"), 128)
    ZEROS |= dict.fromkeys(("msmpeg4v2", "msmpeg4v3", "wmv1", "wmv2"), 128)
    # Padded with any number of zeros before a start code and at the end of a packet. A hole at the
    # end leaves a picture without its lower rows, of which the decoder tells.
    PADDED = ("mpeg1video", "mpeg2video")
    NOT_PADDING = re.compile(rb"\A\0+\Z|\0{8}[^\0\1]")

    def __init__(self, codec: str):
        self.zeros = bytes(self.ZEROS.get(codec, 0))
        self.padded = codec in self.PADDED

    def has(self, packet) -> bool:
        data = bytes(packet)
        if not self.zeros or self.zeros not in data:
            return False
        return not self.padded or self.NOT_PADDING.search(data) is not None


class Losses:
    """Which frames of a decoder can be trusted around damage, and what was lost to it.

    What a decoder makes up after a damaged packet is not to be shown: the next right frame is one
    that was sent before the damage, or a key frame sent after it. Frames come out in the order of
    their times, so what was sent and is passed by was lost.

    seen: whether there has been damage.  skipped: times of packets whose frames need not come out.
    """

    def __init__(self):
        self.seen, self.skipped = False, []
        self.sent = {}  # times by time stamp, of packets whose frames have not come out
        self.dropped = []  # times of frames that were not to be shown
        self.keys = set()  # time stamps of packets that are said to be key frames
        self.numbers, self.count = {}, 0  # of packets in the order of decoding, by time stamp
        self.damaged = []  # numbers of packets, up to the next key frame that has come out

    def send(self, packet, time, damaged, skipping):
        self.count += 1
        self.numbers[packet.pts] = self.count
        if packet.pts is not None and time is not None:
            self.sent[packet.pts] = time
            if skipping:
                self.skipped.append(time)
        if packet.is_keyframe:
            self.keys.add(packet.pts)
        if damaged:
            self.start(self.count)

    def start(self, number=None):
        """There is damage at the packet of this number; None: at the last one that was sent."""
        self.seen = True
        self.damaged.append(self.count if number is None else number)

    def look_at(self, frames, last, longest_gap):
        """Frames come out, `last` seconds being the time of the one before; see `receive`.

        All but the last of them may be made from the last one, and are not right if that is not.
        If they begin after a longer gap than there can be, frames were lost that they are made of.
        """
        for frame in frames:
            if frame.is_corrupt:
                self.start(self.numbers.get(frame.pts, 0))
        time = self.sent.get(frames[0].pts)
        gap = 0 if time is None or last in (None, -math.inf) else time - last
        if gap > longest_gap and len(frames) > 1:
            self.start(0)

    def receive(self, frame):
        """The time of a frame that has come out, None where its packet had none."""
        if len(self.sent) > 64 and not self.seen:  # packets of which no frame is ever shown
            passed = frame.pts if frame.pts is not None else -math.inf
            self.sent = {stamp: time for stamp, time in self.sent.items() if stamp >= passed}
            self.numbers = {stamp: self.numbers[stamp] for stamp in self.sent}
        time = self.sent.pop(frame.pts, None)
        if time in self.skipped:
            self.skipped.remove(time)
        return time

    def is_right(self, frame, time):
        """Whether a frame may be shown."""
        number = self.numbers.pop(frame.pts, self.count)
        if not frame.is_corrupt and not any(damaged <= number for damaged in self.damaged):
            return True
        # AV1 shows a picture again as a key frame, perhaps in the place of one that was lost.
        is_key = frame.key_frame and frame.pts in self.keys
        if frame.is_corrupt or number in self.damaged or (self.keys and not is_key):
            if time is not None:
                self.dropped.append(time)
            return False
        self.damaged = [damaged for damaged in self.damaged if damaged > number]
        return True  # and what follows

    def between(self, last, time):
        """The time of the first picture lost between two that are shown one after the other."""
        if not self.seen or time is None:
            return None
        missing = (t for t in (*self.sent.values(), *self.dropped) if last < t < time)
        lost = min((t for t in missing if t not in self.skipped), default=None)
        self.dropped = []
        return lost

    def skipped_between(self, last, time):
        """The time of the first picture skipped between two that come out one after the other."""
        if not self.skipped or time is None:
            return None
        first = min((t for t in self.skipped if last < t < time), default=None)
        self.skipped = [t for t in self.skipped if t > time]
        return first
