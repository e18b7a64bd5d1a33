"""What one step of the engine attends to: its vision rows and their keys, and its other rows.

A step runs new tokens ("rows") of several requests, one request after the other: a whole prompt, a
chunk of one, what a cached prefix left, or one token of an answer. Vision rows attend to the vision
tokens of their own request, all of them up to their own place, wherever the cache has put those.
Text rows attend to everything before them; each run of them is one "request" for the engine's
own attention. All of this is known on the host, in NumPy, before the step is started.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Step(NamedTuple):
    """The rows of a step that has vision rows among them; int64 arrays, counts from zero int32.

    N vision rows, M keys of theirs, R runs of T text rows. Requests are counted as the step has
    them; a token's place is its index in its request.
    """

    vision_rows: np.ndarray  # [N], in the order of the requests
    vision_starts: np.ndarray  # [requests with vision rows + 1], where their vision rows begin
    key_starts: np.ndarray  # likewise, where their keys begin
    key_requests: np.ndarray  # [M]
    key_places: np.ndarray  # [M]
    text_rows: np.ndarray  # [T], run after run
    text_starts: np.ndarray  # [R + 1], where the runs begin
    text_requests: np.ndarray  # [R]
    text_lengths: np.ndarray  # int32 [R], keys of the last row of a run


def vision_mask(length: int, media: Iterable, modalities: Sequence[str]) -> np.ndarray:
    """bool [length], which tokens of a prompt attend sparsely.

    media: with `modality`, and `mm_position` of an offset, a length and maybe `is_embed`, a mask of
        the placeholders in it, as vLLM has them.
    modalities: those whose placeholders attend sparsely, the checkpoint's `nsa_modalities`.
    """
    mask = np.zeros(length, dtype=bool)
    for medium in media:
        if medium.modality in modalities:
            place = medium.mm_position
            is_embed = True if place.is_embed is None else np.asarray(place.is_embed)
            mask[place.offset : place.offset + place.length] = is_embed
    return mask


def make_step(
    masks: Sequence[np.ndarray | None], starts: Sequence[int], computed: Sequence[int]
) -> Step | None:
    """The step of these requests; None where no new token is a vision token.

    masks: of each request's prompt, as `vision_mask` returns it, or None for text alone. What comes
        after the prompt is text.
    starts: [requests + 1], where the rows of each begin.
    computed: [requests], how many tokens of each are in the cache already.
    """
    vision, keys, text = [], [], []
    for request, mask in enumerate(masks):
        first, num_cached = int(starts[request]), int(computed[request])
        num_rows = int(starts[request + 1]) - first
        seen = np.zeros(num_cached + num_rows, dtype=bool)
        if mask is not None:
            seen[: len(mask)] = mask[: len(seen)]
        new = seen[num_cached:]
        if new.any():
            vision.append(first + np.flatnonzero(new))
            keys.append((request, np.flatnonzero(seen)))
        text += [(request, first, num_cached, run) for run in _runs(~new)]
    if not vision:
        return None
    return Step(
        vision_rows=np.concatenate(vision),
        vision_starts=_counts_from_zero(map(len, vision)),
        key_starts=_counts_from_zero(len(positions) for _, positions in keys),
        key_requests=np.repeat([r for r, _ in keys], [len(positions) for _, positions in keys]),
        key_places=np.concatenate([positions for _, positions in keys]),
        text_rows=_join(first + np.arange(*run) for _, first, _, run in text),
        text_starts=_counts_from_zero(end - start for *_, (start, end) in text),
        text_requests=np.array([request for request, *_ in text], dtype=np.int64),
        text_lengths=np.array([cached + end for _, _, cached, (_, end) in text], dtype=np.int32),
    )


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """The (start, end) of each run of True."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _counts_from_zero(counts: Iterable[int]) -> np.ndarray:
    return np.cumsum([0, *counts], dtype=np.int32)


def _join(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])
