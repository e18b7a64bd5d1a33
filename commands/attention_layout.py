"""Where the vision tokens of a prompt stand: in which frame, at which second, on which patch.

The sparse attention counts packed vision tokens: blocks of them cross frame boundaries and know no
rows or columns. A `VisionLayout` leads from a block back to what a person can see. A *step* is what
one row of tokens over time stands for: the two frames of a video that share their tokens, or an
image. Steps are numbered through all images and videos of the prompt, in its order.
"""

from dataclasses import dataclass

import numpy as np
import torch

IMAGE_TIME = np.nan  # an image stands at no second


@dataclass(frozen=True)
class VisionLayout:
    """The images and videos of one prompt, for all of its tokens; numpy arrays.

    length: tokens of the prompt.
    step_of_token: int64 [length], the step of each token, -1 for text.
    packed: int64 [N], the tokens that attend sparsely, in order: packed token i is token packed[i].
    medium: int64 [steps], which image or video of the prompt a step belongs to, from 0.
    height, width: int64 [steps], tokens of the step; a token is 28 x 28 pixels of what was seen.
    first_token: int64 [steps], the step's first token.
    seconds: float64 [steps, 2], from when to when in its video; NaN for an image.
    """

    length: int
    step_of_token: np.ndarray
    packed: np.ndarray
    medium: np.ndarray
    height: np.ndarray
    width: np.ndarray
    first_token: np.ndarray
    seconds: np.ndarray

    @property
    def num_steps(self) -> int:
        return len(self.medium)

    @property
    def packed_steps(self) -> np.ndarray:
        """int64 [N], the step of each packed token."""
        return self.step_of_token[self.packed]

    def block_steps(self, block_size: int) -> np.ndarray:
        """float64 [blocks, steps]: the share of each block's tokens that is of each step.

        A block that crosses frames has shares of several; the last block may have fewer tokens.
        """
        steps = self.packed_steps
        counts = np.zeros((-(-len(steps) // block_size), self.num_steps))
        np.add.at(counts, (np.arange(len(steps)) // block_size, steps), 1)
        return counts / counts.sum(1, keepdims=True)


def locate_vision(config, inputs, seconds: list | None = None) -> VisionLayout:
    """The layout of one prompt from the processor's outputs for the whole conversation.

    config: the model's. inputs: input_ids [1, L], the grids, and what else the processor returned.
    seconds: of each video, when its steps begin, in its order; by default they are
        second_per_grid_ts (or one second) apart, from 0.
    Raises ValueError for several prompts, padding, and a prompt without images and videos.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if len(ids) != 1:
        raise ValueError(f"input_ids hold {len(ids)} prompts; attention is recorded of one alone.")
    if mask is not None and not bool((torch.as_tensor(mask) > 0).all()):
        raise ValueError("the prompt is padded; attention is recorded of one without padding.")
    ids = ids[0].cpu().numpy()
    sparse = {
        getattr(config, f"{modality}_token_id") for modality in config.text_config.nsa_modalities
    }
    steps, step_of_token = list(_steps(config, ids, inputs, seconds)), np.full(len(ids), -1)
    for number, (_, height, width, token, _, _) in enumerate(steps):
        step_of_token[token : token + height * width] = number
    if not steps:
        raise ValueError(
            "the prompt has no image and no video, so there is nothing to look at; give one."
        )
    medium, height, width, token, begin, end = zip(*steps, strict=True)
    return VisionLayout(
        length=len(ids),
        step_of_token=step_of_token,
        packed=np.flatnonzero(np.isin(ids, list(sparse)) & (step_of_token >= 0)),
        medium=np.array(medium),
        height=np.array(height),
        width=np.array(width),
        first_token=np.array(token),
        seconds=np.array([begin, end], dtype=float).T,
    )


def step_seconds(metadata, temporal_patch_size: int = 2) -> list[float]:
    """When each step of a video begins, from the `VideoMetadata` that the processor returns."""
    return [index / metadata.fps for index in metadata.frames_indices[::temporal_patch_size]]


def _steps(config, ids, inputs, seconds):
    """Yields (medium, height, width, first token, from, to) of each step, in the prompt's order.

    A step's tokens are neighbours; between the steps of a video there may be text, its timestamps.
    """
    names = {getattr(config, f"{kind}_token_id"): kind for kind in ("image", "video")}
    coming = {token: iter(_grids(config, kind, inputs, seconds)) for token, kind in names.items()}
    waiting = {token: [] for token in names}  # steps of the medium that is being read
    token, medium = 0, -1
    while token < len(ids):
        own = ids[token]
        if own not in names:
            token += 1
            continue
        if not waiting[own]:
            medium += 1
            waiting[own] = [(medium, *step) for step in next(coming[own], [])]
        step = waiting[own].pop(0) if waiting[own] else None
        size = step[1] * step[2] if step else 0
        if not size or (ids[token : token + size] == own).sum() < size:
            raise _misfit(names[own], token)
        number, height, width, *span = step
        yield number, height, width, token, *span
        token += size
    for own, missing in waiting.items():
        if missing:
            raise _misfit(names[own], token)


def _misfit(kind, token):
    return ValueError(
        f"the {kind} tokens up to token {token} do not fit {kind}_grid_thw; pass all that the "
        "processor returned, of the whole conversation."
    )


def _grids(config, kind, inputs, seconds):
    """[(height, width, from, to) of each step] of each image or video; sides in tokens."""
    merge, grids = config.vision_config.spatial_merge_size, inputs.get(f"{kind}_grid_thw")
    each = inputs.get("second_per_grid_ts")
    each = [] if each is None else [float(number) for number in each]
    grids = [] if grids is None else torch.as_tensor(grids).tolist()
    for number, (time, height, width) in enumerate(grids):
        if kind == "image":
            begins, ends = [IMAGE_TIME] * time, [IMAGE_TIME] * time
        else:
            apart = each[number] if number < len(each) else 1.0
            begins = [step * apart for step in range(time)]
            begins = begins if seconds is None else list(seconds[number])
            if len(begins) != time:
                raise ValueError(
                    f"seconds has {len(begins)} numbers for video {number}; wanted one for each "
                    f"of its {time} temporal steps."
                )
            ends = [*begins[1:], begins[-1] + apart]
        sides = [(height // merge, width // merge)] * time
        yield [(*side, *span) for side, *span in zip(sides, begins, ends, strict=True)]
