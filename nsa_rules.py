"""The rules of the attention that are needed where it does not run: its gates, and what is seen.

The reference, the model, the converter, training and evaluation take them from here; the kernels
have a copy of `is_complete`. This file imports no other of this project, so that commands can
import it as it is.
"""

import math

import torch

BRANCHES = ("compressed", "selected", "window")  # the order of the gates


def gate_weights(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """The weights of the branches: sigmoid(logits / temperature) (VideoNSA, section 2.1).

    logits [..., 3 H], a head's compressed, selected and window branch next to each other. Returns
    [..., H, 3], each weight between 0 and 1 by itself: the three need not sum to 1.
    """
    return (logits / temperature).sigmoid().unflatten(-1, (-1, 3))


def gate_logit(weight: float, temperature: float) -> float:
    """The logit whose `gate_weights` are `weight`, between 0 and 1: the inverse of that formula."""
    return temperature * math.log(weight / (1 - weight))


def is_complete(num_blocks: int, positions: torch.Tensor, block_size: int) -> torch.Tensor:
    """Which of a sample's first blocks have a mean that queries at positions [t] see.

    Block i is visible at position j when its last token is: (i + 1) * block_size - 1 <= j. Returns
    bool [t, num_blocks].
    """
    last = torch.arange(1, num_blocks + 1, device=positions.device) * block_size - 1
    return last <= positions[:, None]


def count_visits(
    positions: torch.Tensor, *, block_size: int, num_selected: int, window_size: int
) -> torch.Tensor:
    """How many keys the queries at positions [t] of one sample visit: int64 [t, 3], by branch.

    The compressed branch visits means, the other two tokens.
    """
    block, offset = positions // block_size, positions % block_size
    compressed = (positions + 1) // block_size  # as many as `is_complete`
    selected = block.clamp(max=num_selected - 1) * block_size + offset + 1
    window = (positions + 1).clamp(max=window_size)
    return torch.stack([compressed, selected, window], dim=-1)
