"""What is taken of a video: how many frames, of what size, and how many tokens they become.

`plan_video` is the one place that decides it, from the numbers of a video and what is asked for;
`VideoPlan` is its answer. Nothing here opens a file.
"""

import math
from dataclasses import dataclass

from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Of one picture or frame before it is resized; where Pillow, too, refuses a picture.
MAX_FRAME_PIXELS = 2 * 89_478_485
MOST_FRAMES = 10**9  # that a rate asks for; what is more than that, floats do not hold


@dataclass(frozen=True)
class VideoPlan:
    """What is taken of one video, as `plan_video` decided it.

    duration: seconds.  fps: the rate asked for, None when a number of frames was.
    requested: frames at that rate.  frames: frames taken, evenly spread over the duration.
    height, width: pixels of each frame.  tokens: placeholders in the prompt.
    frames_reason, size_reason: what kept frames or size from being what was asked, if anything.
    """

    duration: float
    fps: float | None
    requested: int
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
        frames = f"{self.frames} frame{'s' * (self.frames != 1)}"
        if self.frames < self.requested:
            frames = f"{self.frames} of {self.requested} frames"
        if self.frames_reason:
            frames += f" ({self.frames_reason})"
        size = f"{self.height}x{self.width}"
        if self.size_reason:
            size += f" ({self.size_reason})"
        return f"{describe_time(self.duration)}{rate} = {frames}, {size}, {self.tokens:,} tokens"


def describe_time(seconds: float) -> str:
    """A length or a time in a video: "7.5 s", "412 s", and from ten minutes on "0:12:30"."""
    if round(seconds) >= 600:
        return describe_clock(seconds)
    return f"{seconds:.0f} s" if seconds >= 100 else f"{seconds:.3g} s"


def describe_clock(seconds: float) -> str:
    """A time as hours, minutes and whole seconds: "0:12:30"."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def check_frame_size(height: int, width: int, name: str):
    """Raises ValueError for a picture that would take too much memory to decode.

    To be called with what the header says: a file of 100 KB may hold 30,000 x 30,000 pixels.
    """
    if height * width > MAX_FRAME_PIXELS:
        raise ValueError(
            f"{name} has {height:,}x{width:,} pixels, more than the {MAX_FRAME_PIXELS:,} that are "
            "decoded: scale it down first."
        )


def fit_size(
    height: int, width: int, min_pixels: int, max_pixels: int, factor: int = 28
) -> tuple[int, int]:
    """Qwen's rule: both sides multiples of `factor`, the area between the two limits."""
    if max(height, width) > 200 * min(height, width):
        raise ValueError(
            f"A frame of {height}x{width} pixels is more than 200 times as long as it is wide; "
            "crop it first."
        )
    # The library rounds a side of up to half a factor to nothing.
    least = factor // 2 + 1
    return smart_resize(max(height, least), max(width, least), factor, min_pixels, max_pixels)


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
    temporal_patch_size: int = 2,
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
    factor, temporal_patch_size: pixels per token and side, and frames per token.

    Raises ValueError when not even two frames fit, saying what would.
    """
    if fps is not None and fps <= 0:
        raise ValueError(f"fps is {fps}; it must be positive (2 is usual).")
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}; at least one frame must be taken.")
    check_frame_size(height, width, "A frame of the video")
    unit = factor * factor
    if max_pixels < unit:
        logger.warning_once(f"max_pixels is {max_pixels}; using {unit}, the area of one token.")
        max_pixels = unit
    if max_frames < temporal_patch_size:
        logger.warning_once(
            f"max_frames is {max_frames}; using {temporal_patch_size}, which share their tokens."
        )
    min_pixels = min(min_pixels, max_pixels)

    def even(count):
        return max(temporal_patch_size, int(count) // temporal_patch_size * temporal_patch_size)

    cap, available = even(max_frames), min(even(source_frames), source_frames)
    frames_reason = size_reason = ""
    if not sample:
        fps, requested, frames = None, source_frames, source_frames
    elif num_frames is not None:
        fps = None
        requested = even(round(num_frames / temporal_patch_size) * temporal_patch_size)
        frames = min(requested, available)
        if frames < requested:
            frames_reason = "all there are"
            logger.warning_once(f"num_frames is {num_frames}, but the video has {source_frames}.")
    else:
        # Half a source frame of tolerance: containers round durations.
        at_rate = int(min((duration + duration / source_frames / 2) * fps, MOST_FRAMES))
        at_rate = at_rate // temporal_patch_size * temporal_patch_size
        least = max(math.ceil(min_frames / temporal_patch_size), 1) * temporal_patch_size
        requested, frames = max(at_rate, 1), min(max(at_rate, least), cap, available)
        if frames < requested:
            frames_reason = "frame cap" if frames == cap else "all there are"
        elif frames > requested:
            frames_reason = "minimum"

    if size is not None:
        rows, columns = (max(factor, round(side / factor) * factor) for side in size)
    else:
        rows, columns = fit_size(height, width, min_pixels, max_pixels, factor)
        share = None
        if total_pixels:
            share = total_pixels * temporal_patch_size // frames
            share = max(share, int(1.05 * min_pixels), unit)
        if share is not None and rows * columns > share:
            rows, columns = fit_size(height, width, min_pixels, share, factor)
            size_reason = "total pixels"

    steps, tokens_per_step = math.ceil(frames / temporal_patch_size), rows * columns // unit
    budgets = {"token budget": max_tokens, "total pixels": total_pixels and total_pixels // unit}
    for name, tokens in budgets.items():
        if tokens is None or steps * tokens_per_step <= tokens:
            continue
        if tokens < tokens_per_step:
            raise ValueError(
                f"Two frames of {rows}x{columns} pixels are {tokens_per_step:,} tokens, more than "
                f"the {name} allows ({tokens:,}): allow {tokens_per_step:,} tokens "
                f"({tokens_per_step * unit:,} pixels), or lower max_pixels to "
                f"{max(tokens, 1) * unit:,}."
            )
        steps, frames_reason = tokens // tokens_per_step, name
        frames = steps * temporal_patch_size
        if name == "total pixels":
            logger.warning_once(
                f"total_pixels is {total_pixels:,}: at min_pixels, {requested} frames exceed it; "
                f"taking {frames}."
            )
    return VideoPlan(
        duration=duration,
        fps=fps,
        requested=requested,
        frames=frames,
        height=rows,
        width=columns,
        tokens=steps * tokens_per_step,
        frames_reason=frames_reason,
        size_reason=size_reason,
    )


def share_tokens(max_tokens: int, plans: list[VideoPlan]) -> list[int]:
    """Tokens for each of these videos: in proportion to what it would take, two frames at least."""
    total = sum(plan.tokens for plan in plans)
    shares = [plan.tokens * max_tokens // total for plan in plans]
    least = [plan.tokens // math.ceil(plan.frames / 2) for plan in plans]
    if sum(least) > max_tokens or all(map(int.__ge__, shares, least)):
        return shares  # those that are too small are refused
    rest = (max_tokens - sum(least)) / (total - sum(least))
    return [one + int((plan.tokens - one) * rest) for plan, one in zip(plans, least, strict=True)]
