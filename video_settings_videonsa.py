"""What is asked of one video: settings of its message, of the call and of the processor, as one.

`resolve_settings` puts them together and `VideoSettings` checks every value, wherever it was given.
"""

import math
import numbers
import reprlib
from dataclasses import dataclass, fields
from difflib import get_close_matches

from transformers.utils import logging

from .video_plan_videonsa import VideoPlan, plan_video

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class VideoSettings:
    """All that is asked of one video: what `plan_video` takes, and

    resized_height, resized_width: the size of every frame, whatever the pixel bounds say.
    do_sample_frames: False for every frame there is; True also samples frames that are given.
    do_resize: False where frames that are given have a size that can be used already.
    video_start, video_end: seconds of the part of a file that is taken.
    video_readers: how many threads read a file at most; None: see `default_readers`.
    video_decoder: "cpu", or "cuda" where NVIDIA's decoder is to help.
    fps_given: whether fps was asked for, and is not a default.

    Raises ValueError for a value that is not of its setting's kind, by name.
    """

    fps: float | None
    num_frames: int | None
    min_frames: int
    max_frames: int
    min_pixels: int
    max_pixels: int
    total_pixels: int | None
    max_tokens: int | None
    resized_height: int | None
    resized_width: int | None
    do_sample_frames: bool | None
    do_resize: bool | None
    video_start: float | None
    video_end: float | None
    video_readers: int | None
    video_decoder: str | None
    fps_given: bool

    def __post_init__(self):
        for field in fields(self)[:-1]:
            value = read_setting(field.name, getattr(self, field.name))
            if value is None and field.type is int:
                raise ValueError(f"{field.name} is None; it must be a number.")
            object.__setattr__(self, field.name, value)
        if (self.resized_height is None) != (self.resized_width is None):
            raise ValueError(
                f"resized_height is {self.resized_height} and resized_width {self.resized_width}; "
                "give both or neither."
            )

    def plan(
        self, duration, frames, height, width, factor, temporal_patch_size, sample=True
    ) -> VideoPlan:
        """The plan of a video with these numbers; with all its frames where `sample` is false."""
        sample = sample and self.do_sample_frames is not False
        if sample and self.fps is None and self.num_frames is None:
            raise ValueError("Neither fps nor num_frames is set; give one of them.")
        size = (self.resized_height, self.resized_width)
        return plan_video(
            duration,
            frames,
            height,
            width,
            fps=self.fps,
            num_frames=self.num_frames,
            sample=sample,
            min_frames=self.min_frames,
            max_frames=self.max_frames,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
            total_pixels=self.total_pixels,
            max_tokens=self.max_tokens,
            size=None if self.resized_height is None else size,
            factor=factor,
            temporal_patch_size=temporal_patch_size,
        )


SETTINGS = tuple(field.name for field in fields(VideoSettings) if field.name != "fps_given")
ALIASES = {"nframes": "num_frames", "sample_fps": "fps"}
# Of a video, and of a call.
SWITCHES = ("do_sample_frames", "do_resize", "do_convert_rgb", "do_rescale", "do_normalize")
SWITCHES += ("cap_pixels_per_frame", "return_metadata", "return_mm_token_type_ids")
SWITCHES += ("progress", "stream", "timestamps")
SECONDS = ("video_start", "video_end")
DECODERS = ("cpu", "cuda")
# The least that a setting may be; a plan says why 0 tokens or pixels are too few.
LEAST = {"num_frames": 1, "max_frames": 1, "max_pixels": 1, "resized_height": 1, "resized_width": 1}
LEAST |= {"video_readers": 1}
COUNTS = ("num_frames", "min_frames", "max_frames", "video_readers")


def read_setting(name: str, value):
    """The value of a setting as what it is: a bool, float or int; None for what may be left out.

    Numbers may come as text ("2") or from NumPy and torch. Pixels and tokens are rounded down.

    Raises ValueError for everything else, such as lists, NaN and infinity.
    """
    if value is None:
        return None
    shown = reprlib.repr(value)  # a message may have a file in a setting's place
    if name in SWITCHES:
        if not _is_scalar(value) or value not in (0, 1):
            raise ValueError(f"{name} is {shown}; it must be True or False.")
        return bool(value)
    if name == "video_decoder":
        if not isinstance(value, str) or value not in DECODERS:
            raise ValueError(f"{name} is {shown}; it must be 'cpu' or 'cuda'.")
        return value
    number = as_number(value)
    if number is None or not math.isfinite(number):
        raise ValueError(f"{name} is {shown}; it must be a finite number.")
    if name == "fps":
        if number <= 0:
            raise ValueError(f"fps is {value}; it must be positive (2 is usual).")
        return number
    if number < LEAST.get(name, 0):
        raise ValueError(f"{name} is {value}; it must be at least {LEAST.get(name, 0)}.")
    if name in SECONDS:
        return number
    if name in COUNTS and number != int(number):
        raise ValueError(f"{name} is {value}; it must be a whole number.")
    return int(number)


def _is_scalar(value):
    return isinstance(value, numbers.Number) or getattr(value, "ndim", None) == 0


def as_number(value):
    """The value as a float, or None where it is no number; a bool is none."""
    if _is_scalar(value) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not (_is_scalar(value) or isinstance(value, str)):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _own_names(asked):
    """What is asked in one place and is not None, under the names that settings have here."""
    asked = {name: value for name, value in asked.items() if value is not None}
    for alias, name in ALIASES.items():
        if alias in asked and name in asked:
            raise ValueError(
                f"{alias} is {asked[alias]!r} and {name} {asked[name]!r}, two names of one "
                "setting; give one."
            )
    return {ALIASES.get(name, name): value for name, value in asked.items()}


def call_settings(asked: dict) -> dict:
    """What a call asks and is not None, with the pixel bounds of `size` under their own names.

    Raises ValueError for a size that is no pixel bounds, or other ones than those beside it.
    """
    asked = _own_names(asked)
    size = asked.pop("size", None)
    if size is None:
        return asked
    try:
        bounds = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    except (KeyError, TypeError):
        raise ValueError(
            f"size is {size!r}; it has shortest_edge and longest_edge, the bounds of a frame's "
            "area in pixels. For one size, give resized_height and resized_width."
        ) from None
    for name, value in bounds.items():
        if name in asked and read_setting(name, asked[name]) != read_setting(name, value):
            raise ValueError(
                f"size is {size!r} and {name} {asked[name]!r}, two names of one setting; give one."
            )
    return asked | bounds


def refuse_typos(names, known, what: str):
    """Raises ValueError for a name that is close to one of the known settings of `what`."""
    for name in sorted(set(map(str, names)) - {*known, *ALIASES}):
        if near := get_close_matches(name.lower(), known, 1, 0.65):
            raise ValueError(f"{name!r} is no setting of {what}; did you mean {near[0]!r}?")


def resolve_settings(message: dict, call: dict, defaults: dict) -> VideoSettings:
    """The settings of one video: its message's before the call's before the defaults.

    message, call: may leave settings out, or give None for them. A message may use the names of
    qwen-vl-utils (nframes, sample_fps), a call `size` for the pixel bounds.
    defaults: every setting; `fps_given` may be missing.

    Raises ValueError where fps and num_frames, or two names of one setting, are given in one place,
    for a name that is close to a setting's, and for a decoder (`video_backend`) that is not PyAV.
    """
    message, call = _own_names(message), call_settings(call)
    resolved = {"fps_given": False, **defaults}
    for asked in (message, call, resolved):
        if (backend := asked.pop("video_backend", None)) not in (None, "pyav"):
            raise ValueError(
                f"video_backend is {backend!r}, but videos are read with 'pyav' only: leave "
                "video_backend out, or give the frames that you have decoded."
            )
    unknown = (set(message) - set(SETTINGS)) | (set(call) - {*SETTINGS, *SWITCHES})
    refuse_typos(unknown, SETTINGS, "a video")
    if unknown:
        logger.warning_once(f"Not a setting of a video, ignored: {', '.join(sorted(unknown))}.")
    for asked in (call, message):
        if "fps" in asked and "num_frames" in asked:
            raise ValueError("fps and num_frames exclude each other; give one of them.")
        if "num_frames" in asked:
            resolved |= {"fps": None, "fps_given": False}
        elif "fps" in asked:
            resolved |= {"num_frames": None, "fps_given": True}
        resolved |= {name: value for name, value in asked.items() if name in SETTINGS}
    settings = VideoSettings(**resolved)
    for low, high in (("min_frames", "max_frames"), ("min_pixels", "max_pixels")):
        # A default minimum gives way to what is asked without a word.
        least, most = getattr(settings, low), getattr(settings, high)
        if low in {*call, *message} and least > most:
            logger.warning_once(f"{low} is {least:,}, more than {high}, {most:,}, which holds.")
    if (count := settings.num_frames) is not None:
        passed = {
            "min_frames": count < settings.min_frames,
            "max_frames": count > settings.max_frames,
        }
        for name in passed:
            if passed[name] and name in {*call, *message}:
                logger.warning_once(
                    f"{name} is {getattr(settings, name):,} and num_frames {count:,}, which holds: "
                    f"{name} bounds what a rate gives."
                )
    return settings
