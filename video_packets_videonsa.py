"""What packets and decoded frames tell: their times, and what was lost or skipped on the way.

`Clock` makes seconds of time stamps, through recordings that were joined as well; `Losses` says
which frames of a damaged file are right. Nothing here opens or decodes.
"""

import math
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


class Losses:
    """Which frames of a decoder can be trusted around damage, and what was lost to it.

    What a decoder makes up after a damaged packet is not to be shown: the next right frame is one
    that was sent before the damage, or the next key frame. Frames come out in the order of their
    times, so what was sent and is passed by was lost.

    seen: whether there has been damage.  skipped: times of packets whose frames need not come out.
    """

    def __init__(self):
        self.seen, self.skipped = False, []
        self.sent = {}  # times by time stamp, of packets whose frames have not come out
        self.dropped = []  # times of frames that were not to be shown
        self.sound = None  # while there is damage, the time stamps of what was sent before it
        self.keys = set()  # time stamps of packets that are said to be key frames

    def send(self, packet, time, damaged, skipping):
        if packet.pts is not None and time is not None:
            self.sent[packet.pts] = time
            if skipping:
                self.skipped.append(time)
        if packet.is_keyframe:
            self.keys.add(packet.pts)
        if damaged:
            self.start(packet)

    def start(self, packet=None):
        """There is damage from this packet on, or at one that is not known."""
        self.seen = True
        if self.sound is None:
            self.sound = set() if packet is None else set(self.sent) - {packet.pts}

    def receive(self, frame):
        """The time of a frame that has come out, None where its packet had none."""
        if len(self.sent) > 64 and not self.seen:  # packets of which no frame is ever shown
            passed = frame.pts if frame.pts is not None else -math.inf
            self.sent = {stamp: time for stamp, time in self.sent.items() if stamp >= passed}
        time = self.sent.pop(frame.pts, None)
        if time in self.skipped:
            self.skipped.remove(time)
        return time

    def is_right(self, frame, time):
        """Whether a frame may be shown."""
        if frame.is_corrupt:
            self.start()
        if self.sound is None or (frame.pts in self.sound and not frame.is_corrupt):
            return True
        # AV1 shows a picture again as a key frame, perhaps in the place of one that was lost.
        is_key = frame.key_frame and frame.pts in self.keys
        if frame.is_corrupt or (self.keys and not is_key):
            if time is not None:
                self.dropped.append(time)
            return False
        self.sound = None  # right again from here on
        return True

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
