"""The texts of a call and the media that stand for their placeholders: read and counted."""

from collections.abc import Callable

import numpy as np

from .message_parts_videonsa import describe_source, plain_source
from .planned_video_videonsa import are_frames, list_videos


def read_texts(text) -> str | list[str] | None:
    """The text of a call, or its list of texts; ValueError for anything else."""
    if text is None or isinstance(text, str):
        return text
    texts = text.tolist() if isinstance(text, np.ndarray) else text
    if not isinstance(texts, (list, tuple)):
        raise ValueError(f"text is {describe_source(text)}; it must be a string or a list of them.")
    if not texts:
        raise ValueError("text is an empty list; it must be a string or a list of them.")
    for one in texts:
        if not isinstance(one, str):
            raise ValueError(f"text holds {describe_source(one)}; it must be a list of strings.")
    return list(texts)


def count_images(images) -> int:
    """How many images these are: one, an array of several [N, ...], or lists of them."""
    if isinstance(images, (list, tuple)):
        return sum(map(count_images, images))
    if images is None:
        return 0
    return len(images) if getattr(images, "ndim", 3) == 4 else 1


def count_videos(videos) -> int | None:
    """How many videos a list has; None where it is one video itself, a list of frames."""
    return None if are_frames(plain_source(videos)) else len(list_videos(videos))


def count_by_sample(media, text, count: Callable) -> list[int] | None:
    """How many media each text has, where they are a list of lists, one for each; else None."""
    lists = (list, tuple)
    if not isinstance(text, lists) or not isinstance(media, lists) or len(media) != len(text):
        return None
    counts = [count(item) if isinstance(item, lists) else None for item in media]
    return None if None in counts else counts


def check_placeholders(text: str | list[str], token: str, kind: str, given: int) -> None:
    """Raise a ValueError where the texts have another number of placeholders than media came."""
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


def check_samples(texts: list[str], token: str, kind: str, counts: list[int] | None) -> None:
    """Raise a ValueError where a text has another number of placeholders than its list of media."""
    found = [one.count(token) for one in texts]
    if counts not in (None, found):
        raise ValueError(
            f"The texts have {found} {token} placeholders, but the lists of {kind}s, one for each "
            f"text, have {counts}: put each {kind} into the list of its text."
        )


def write_video(token: str, grid, merge_size: int, times: list[float] | None = None) -> str:
    """What stands for a video in the text: its tokens, the time of each temporal step before them.

    grid: [time, height, width] in patches, of which merge_size**2 are a token.
    times: seconds of each frame, of which the middle of each temporal step's is written, as in
        Qwen3-VL: "<12.5 seconds>". Without them there are tokens only.
    """
    steps, height, width = (int(number) for number in grid)
    tokens = token * (height * width // merge_size**2)
    if times is None:
        return tokens * steps
    size = -(-len(times) // steps)
    groups = [times[step * size : (step + 1) * size] for step in range(steps)]
    # The last frame of an odd number stands for two.
    middles = [(group[0] + group[-1]) / 2 for group in groups]
    return "".join(f"<{middle:.1f} seconds>{tokens}" for middle in middles)
