"""Recordings that were joined byte by byte, by what stands in the file.

FFmpeg reads on in some formats and stops after the first recording in others, without a word.
These functions look at a few bytes; they know nothing of decoding. An address is not looked at.
"""

import struct
from enum import Enum

MATROSKA, MP4 = "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2"
# Formats of which FFmpeg reads the first recording alone, and which begin with a word of their own.
FIRST_ALONE = ("flv", "live_flv", "asf", "ogg", "apng", "wtv")
SEGMENT = bytes.fromhex("18538067")  # begins what a Matroska file holds; its size follows
# What may stand between the last packet of a recording and the next recording: an index.
SEARCHED = 1 << 16
FRAGMENT = 1 << 10  # bytes of a fragment of an MP4 file that tell its first track and its time


class Rest(Enum):
    """What becomes of the recordings after the first one."""

    NOTHING = "there are none"
    READ = "FFmpeg reads them, but its index tells of one recording only"
    LEFT_OUT = "FFmpeg does not read them"
    MISREAD = "FFmpeg takes other bytes for them, or hides some of them"


def rest_of(source, container) -> Rest:
    """What stands after the first recording of a Matroska or an MP4 file.

    source: a `VideoSource`.  container: the same, opened with PyAV.
    """
    name = container.format.name
    if name not in (MATROSKA, MP4):
        return Rest.NOTHING
    with source.raw() as file:
        return _after_segment(file, container.size) if name == MATROSKA else _after_movie(file)


def begins_again(source, container, end: int) -> bool:
    """Whether another recording, which is not read, begins soon after byte `end`, the last read."""
    if container.format.name not in FIRST_ALONE:
        return False
    with source.raw() as file:
        beginning = file.read(6)
        file.seek(end)
        return len(beginning) == 6 and beginning in file.read(SEARCHED)


def _after_segment(file, size):
    head = file.read(1 << 12)
    at = head.find(SEGMENT)
    if at < 0:
        return Rest.NOTHING
    start = at + len(SEGMENT)
    length = 9 - head[start].bit_length()  # bytes of the size, whose first bit set tells
    segment = int.from_bytes(head[start : start + length], "big") & ((1 << 7 * length) - 1)
    if segment == (1 << 7 * length) - 1:  # not known, as of a live recording
        return Rest.NOTHING
    return Rest.READ if start + length + segment < size else Rest.NOTHING


def _after_movie(file):
    """Follows the boxes of an MP4 file: each begins with its size and kind.

    A second `moov` is another recording, or the header of a stream again. FFmpeg skips it and reads
    on only where fragments (`moof`) come before and after it.
    """
    at, movies, before = 0, 0, None
    while len(head := _read(file, at, 16)) >= 8:
        size, kind = struct.unpack(">I4s", head[:8])
        if size == 1 and len(head) == 16:
            size = int.from_bytes(head[8:], "big")
        movies += kind == b"moov"
        if kind == b"moof":
            if movies > 1:
                goes_on = _goes_on(_read(file, before, FRAGMENT), _read(file, at, FRAGMENT))
                return Rest.READ if goes_on else Rest.MISREAD
            before = at
        if size < 8 or (movies > 1 and before is None):  # size 0: up to the end of the file
            break
        at += size
    return Rest.LEFT_OUT if movies > 1 else Rest.NOTHING


def _read(file, at, count):
    file.seek(at)
    return file.read(count)


def _goes_on(before, after):
    """Whether FFmpeg reads a fragment rightly that follows another one and a header.

    It does where samples are found from where the fragment stands (no base offset in `tfhd`, which
    counts from the start of the file), and the clock (`tfdt`) does not start again.
    """
    offset = int.from_bytes(_field(after, b"tfhd", 4), "big") & 1
    same_track = _field(before, b"tfhd", 8)[4:] == _field(after, b"tfhd", 8)[4:]
    return not offset and not (same_track and _decode_time(after) <= _decode_time(before))


def _decode_time(fragment):
    long = _field(fragment, b"tfdt", 1) == b"\1"  # by the box's version
    return int.from_bytes(_field(fragment, b"tfdt", 12 if long else 8)[4:], "big")


def _field(fragment, kind, count):
    """The first bytes of a box in a fragment, after its kind."""
    at = fragment.find(kind) + 4
    return fragment[at : at + count]
