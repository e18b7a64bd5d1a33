"""Positions over time, height and width, and what a cache remembers to go on from them.

Qwen2.5-VL gives text one position and a vision token three. `rope_index` counts them within one
prompt, as the model was trained with; `positions_of_new_tokens` goes on after the tokens of a
cache. What that takes is the cache's `NSAState`: stock Qwen2.5-VL keeps one number (`rope_deltas`)
with the model, which serves one conversation at a time; here it is with the cache, so that one
model serves many.
"""

import math
from dataclasses import dataclass
from itertools import repeat

import torch


@dataclass
class NSAState:
    """What is remembered of the first n tokens of a cache; tokens after those are text.

    vision bool [B, n]: which are vision tokens.
    max_position int64 [B, n]: the largest position, of any axis, up to each token.
    """

    vision: torch.Tensor
    max_position: torch.Tensor

    def until(self, length: int, valid: torch.Tensor | None = None) -> "NSAState":
        """The state of exactly the first `length` tokens; valid bool [B, >= length] or None."""
        known = min(length, self.vision.shape[1])
        text = self.vision.new_ones(len(self.vision), length - known)
        text = text if valid is None else valid[:, known:length]
        nowhere = self.max_position.new_full((len(self.max_position), 1), -1)
        last = self.max_position[:, known - 1 : known] if known else nowhere
        return NSAState(
            torch.cat([self.vision[:, :known], torch.zeros_like(text)], dim=1),
            torch.cat([self.max_position[:, :known], last + text.long().cumsum(1)], dim=1),
        )

    def followed_by(
        self, vision: torch.Tensor, position_ids: torch.Tensor, valid: torch.Tensor | None
    ) -> "NSAState":
        """The state of these tokens and of S new ones.

        vision bool [B, S]; position_ids int64 [B, S] of text, or [3 or 4, B, S] with the three axes
        last; valid bool [B, n + S] or None.
        """
        new = position_ids[-3:].amax(0) if position_ids.ndim == 3 else position_ids
        new = new.expand(len(vision), -1)
        if valid is not None:
            new = new.masked_fill(~valid[:, self.vision.shape[1] :], -1)
        max_position = torch.cat([self.max_position, new], dim=1).cummax(dim=1).values
        return NSAState(torch.cat([self.vision, vision], dim=1), max_position)


def state_in(cache, length: int | torch.Tensor) -> NSAState | None:
    """The state that a cache carries; None if there is none, and its tokens are all text.

    What the cache no longer has, because it was cropped or emptied, is forgotten. A length on the
    device, of a static cache while decoding, is not waited for.
    """
    state, prompt = getattr(cache, "nsa_state", None), getattr(cache, "nsa_prompt", None)
    if isinstance(length, int):
        if state is not None and length < state.vision.shape[1]:
            state = cache.nsa_state = state.until(length) if length else None
        if prompt is not None and length < prompt.shape[1]:
            cache.nsa_prompt = prompt[:, :length]
    return state


def check_prompt(cache, input_ids: torch.Tensor, cached: int, attention_mask) -> None:
    """Raise ValueError where a conversation [B, S] does not begin with the prompt that is cached.

    `generate` leaves its prompt with the cache, as `nsa_prompt`; of answers, whose text may be cut
    into other tokens again, nothing is known. Waits for the ids' device.
    """
    prompt = getattr(cache, "nsa_prompt", None)
    if prompt is None or len(prompt) != len(input_ids):
        return
    known = min(cached, prompt.shape[1])
    differs = input_ids[:, :known] != prompt[:, :known].to(input_ids.device)
    if attention_mask is not None:
        differs &= attention_mask[:, :known].bool()
    if differs.any():
        row, place = differs.nonzero()[0].tolist()
        raise ValueError(
            f"token {place} of row {row} of input_ids is {int(input_ids[row, place])}, but the "
            f"cache, of {cached} tokens, was filled with {int(prompt[row, place])} there. Pass the "
            "whole conversation that the cache was filled with, new tokens with an attention_mask "
            "of the cached and the new ones, or another cache."
        )


def state_of(cache, length: int, valid: torch.Tensor | None, like: torch.Tensor) -> NSAState:
    """The state of exactly a cache's first `length` tokens, for as many rows as `like` has."""
    state = getattr(cache, "nsa_state", None)
    if state is None or length == 0:
        none = torch.zeros(len(like), 0, dtype=torch.long, device=like.device)
        state = NSAState(none.bool(), none)
    rows = len(state.vision)
    if rows != len(like):  # each row several times, as caches repeat theirs
        if len(like) % rows:
            raise ValueError(
                f"the cache has {rows} rows, but there are {len(like)} of tokens. Pass the cache "
                "of this batch, or one that is new."
            )
        times = len(like) // rows
        repeated = (x.repeat_interleave(times, dim=0) for x in (state.vision, state.max_position))
        state = NSAState(*repeated)
    return state.until(length, valid)


def positions_of_new_tokens(
    config,
    state: NSAState,
    num_new: int,
    valid: torch.Tensor | None,
    input_ids: torch.Tensor | None = None,
    **media,
) -> torch.Tensor:
    """Positions of the new tokens after those of `state`, int64 [3, B or 1, num_new].

    valid bool [B, cached + new] or None. input_ids [B, num_new] are needed with media: the new
    images' and videos' grids and seconds, as `rope_index` takes them. Text goes on one past the
    largest position of the cached tokens, on every axis.
    """
    cached = state.vision.shape[1]
    start = state.max_position[:, -1:] + 1 if cached else 0
    new = None if valid is None else valid[:, cached:]
    if input_ids is not None and any(
        media.get(name) is not None for name in ("image_grid_thw", "video_grid_thw")
    ):
        return rope_index(config, input_ids, new, **media)[0] + start
    if new is None:
        new = torch.ones(1, num_new, dtype=torch.bool, device=state.vision.device)
    return (new.long().cumsum(1) - 1 + start).clamp(min=0).expand(3, -1, -1)


def rope_index(
    config,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    image_grid_thw: torch.Tensor | None = None,
    video_grid_thw: torch.Tensor | None = None,
    second_per_grid_ts: torch.Tensor | list[float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of prompts [B, S] as Qwen2.5-VL was trained with them.

    Two things differ from the library's own: the text after an image or video starts past its
    largest position, time included, and seconds are not cut to whole ones.
    Returns int64 [3, B, S], zero at padding, and [B, 1], how many more positions than tokens a row
    has: the library's `rope_deltas`, which nothing here reads.
    """
    grids = {
        config.image_token_id: _rows(image_grid_thw),
        config.video_token_id: _rows(video_grid_thw),
    }
    seconds = _seconds(second_per_grid_ts, 0 if video_grid_thw is None else len(video_grid_thw))
    if config.text_config.nsa_semantics == "released":
        seconds = repeat(1.0)  # as the original evaluates: it never says what a step lasts
    positions = torch.zeros(3, *input_ids.shape, dtype=torch.long, device=input_ids.device)
    deltas = []
    for row, ids in enumerate(input_ids):
        valid = torch.ones_like(ids, dtype=torch.bool)
        if attention_mask is not None:
            valid = attention_mask[row].bool()
        spans = _spans(config, ids[valid], grids, seconds)
        positions[:, row, valid] = torch.cat(spans, dim=1)
        deltas.append(positions[:, row].max() + 1 - valid.sum())
    return positions, torch.stack(deltas)[:, None]


def _seconds(given, videos):
    """An iterator over the seconds of a temporal step of each video: one, where none are given."""
    if given is None:
        return iter([1.0] * videos)  # as stock takes it
    try:
        seconds = [float(number) for number in given]
    except (TypeError, ValueError):
        seconds = [math.nan]
    if not all(0 <= number < math.inf for number in seconds):
        raise ValueError(
            f"second_per_grid_ts is {given!r}; wanted a number for each video, the seconds of a "
            "temporal step."
        )
    if videos and len(seconds) != videos:
        raise ValueError(
            f"second_per_grid_ts has {len(seconds)} numbers for the {videos} videos of "
            "video_grid_thw; wanted the seconds of a temporal step for each of them."
        )
    return iter(seconds)


def _rows(grid):
    """An iterator over the [t, h, w] lists of a grid tensor, or over nothing."""
    return iter([] if grid is None else grid.tolist())


def _spans(config, ids, grids, seconds):
    """The positions of one sample without padding: [3, n] for each run of text, each medium.

    Where text stands between the temporal steps of a video, as the processor's timestamps do, each
    run of steps is placed like a video of its own.
    """
    kinds = torch.zeros_like(ids)
    for token_id in grids:
        kinds[ids == token_id] = token_id
    kinds, counts = torch.unique_consecutive(kinds, return_counts=True)
    spans, start = [torch.empty(3, 0, dtype=torch.long, device=ids.device)], 0
    rest, second = None, None  # the grid of the steps of a video that are yet to come
    for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True):
        while count > 0:
            if kind in grids:
                is_video = kind == config.video_token_id
                grid = rest if is_video and rest else next(grids[kind], None)
                if grid is None:
                    raise ValueError(
                        f"input_ids hold {count} tokens with id {kind} that no grid accounts "
                        "for. Pass the image_grid_thw and video_grid_thw of every placeholder, "
                        "as the processor returns them with input_ids."
                    )
                if is_video:
                    second = second if rest else next(seconds)
                    taken = _steps_in(config, grid, count)
                    rest = [grid[0] - taken, *grid[1:]] if taken < grid[0] else None
                    grid = [taken, *grid[1:]] if taken else grid
                span = _medium_positions(config, grid, second if is_video else None)
            else:
                span = torch.arange(count)[None].expand(3, -1)
            if span.shape[1] > count:
                raise _misfit(count, kind, grid, span.shape[1])
            span = span.to(ids.device)
            spans.append(span + start)
            start += int(span.max()) + 1
            count -= span.shape[1]
    if rest:
        missing = math.prod(rest) // config.vision_config.spatial_merge_size**2
        raise _misfit(0, config.video_token_id, rest, missing)
    return spans


def _steps_in(config, grid, count):
    """The temporal steps of a video that so many tokens are, no more than it has."""
    time, height, width = grid
    return min(count // (height * width // config.vision_config.spatial_merge_size**2), time)


def _misfit(count, kind, grid, wanted):
    return ValueError(
        f"input_ids hold {count} tokens with id {kind} where an image or video of the grid "
        f"{list(grid)} stands, which has {wanted}. Pass input_ids and the grids of all images and "
        "videos in them as the processor returned them together."
    )


def _medium_positions(config, grid, second_per_grid):
    """[3, t * h * w] of one image (without seconds) or video, from its patch grid."""
    vision = config.vision_config
    time, height, width = grid
    height, width = height // vision.spatial_merge_size, width // vision.spatial_merge_size
    step = 1 if second_per_grid is None else vision.tokens_per_second * second_per_grid
    axes = (
        (torch.arange(time) * torch.as_tensor(step, device="cpu")).long(),
        torch.arange(height),
        torch.arange(width),
    )
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
