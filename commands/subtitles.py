"""What is said in a video, from SubRip (.srt) and WebVTT (.vtt) files, as text before a question.

Both formats are blocks between empty lines: perhaps a number or a name, a line of two times around
an arrow, then the text. Other blocks, such as WebVTT's header, notes and styles, have no arrow and
are passed over, and so are tags in the text.
"""

import re
from pathlib import Path
from typing import NamedTuple

from video_plan_videonsa import describe_clock

TIME = r"(?:(\d+):)?(\d+):(\d+)[.,](\d+)"
TIMES = re.compile(rf"{TIME}\s*-->\s*{TIME}")
TAG = re.compile(r"<[^<>]*>|\{\\[^{}]*\}")  # <i>, <c.yellow>, <00:00:01.000>, {\an8}
SUFFIXES = (".srt", ".vtt")


class Spoken(NamedTuple):
    """A text and the seconds at which it begins and ends."""

    start: float
    end: float
    text: str


def read_subtitles(path: str | Path) -> list[Spoken]:
    """The texts of a file in the order of their times, each on one line.

    Raises ValueError for a file that is not UTF-8 and for one in which no text has times.
    """
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 ({error}): save it as UTF-8, for example with iconv -t UTF-8"
        ) from error
    spoken = []
    for block in re.split(r"\n[ \t]*\n", content.replace("\r\n", "\n").replace("\r", "\n")):
        found = TIMES.search(block)
        if found is None:
            continue
        _, _, text = block[found.end() :].partition("\n")  # settings may follow the times
        text = " ".join(TAG.sub("", text).split())
        if text:
            numbers = found.groups()
            spoken.append(Spoken(_seconds(*numbers[:4]), _seconds(*numbers[4:]), text))
    if not spoken:
        raise ValueError(f"{path} has no texts with times; it must be a SubRip or WebVTT file")
    return sorted(spoken)


def with_subtitles(spoken: list[Spoken], question: str) -> str:
    """The question after all that is said, with the time at which each text begins."""
    if not spoken:
        return question
    lines = [f"[{describe_clock(one.start)}] {one.text}" for one in spoken]
    return "\n".join(["What is said in the video:", *lines, "", question])


def subtitles_of(file: str, where: str | Path) -> Path | None:
    """The subtitles of a video: `where`, or the file of its name in the folder `where`."""
    where = Path(where)
    if not where.is_dir():
        return where
    paths = (where / f"{Path(file).stem}{suffix}" for suffix in SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def _seconds(hours, minutes, seconds, fraction):
    return int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds) + float(f"0.{fraction}")
