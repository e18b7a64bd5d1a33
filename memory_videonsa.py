"""How much of a prompt is worked on at once, and what that takes; less where a GPU is nearly full.

A long prompt is read in chunks of tokens, its frames are encoded in chunks of patches, and the
selected branch holds partial results of so many queries. No size changes what is computed, only
what is held at the same time: results differ by rounding at most. commands/forecast.py goes by the
same rules.

The rows and shares were fitted to the peaks in docs/performance.md and docs/cards.md.
"""

import torch

# Tokens of a longer prompt with images or videos that `generate` reads at a time.
PREFILL_CHUNK_SIZE, LEAST_CHUNK_SIZE = 16384, 2048
CHUNK_QUERIES, LEAST_QUERIES = 9216, 1024  # whose partial results are held at once
PATCHES_PER_CHUNK, LEAST_PATCHES = 32768, 4096  # of the vision tower; four are a token
# Layers whose keys and values exist twice: one whose cache grows, and one packed for the branches.
COPIED_LAYERS = 2
# Beside quantised weights, a share of theirs that the allocator holds and cannot give out.
UNUSABLE_SHARE = 0.15
# What each of them may take of the memory that is free when it is made.
PREFILL_SHARE, QUERIES_SHARE, PATCHES_SHARE = 1 / 2, 1 / 4, 1 / 2
# Memory of one layer per token of a chunk, in rows of hidden_size and of intermediate_size
# activations: while its MLP runs, and while its attention runs.
MLP_HIDDEN_ROWS, MLP_INTERMEDIATE_ROWS = 4, 3
ATTENTION_HIDDEN_ROWS = 8
# Memory of a block of the vision tower per patch, in rows of its sizes; the patch's pixels come on
# top, in float32 and in the tower's dtype.
VISION_HIDDEN_ROWS, VISION_INTERMEDIATE_ROWS = 6, 3


def usable_memory(device: torch.device | str) -> int | None:
    """Bytes of a CUDA device that this process has or can get; None for other devices.

    What it has reserved counts, and a limit set by `set_per_process_memory_fraction` holds.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return None
    # Not all of these calls take a device without a number for the current one.
    number = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(number)
    limit = getattr(torch.cuda, "get_per_process_memory_fraction", lambda number: 1.0)(number)
    return min(free + torch.cuda.memory_reserved(number), int(limit * total))


def free_memory(device: torch.device | str) -> int | None:
    """Bytes of a CUDA device that this process can still fill; None for other devices."""
    usable = usable_memory(device)
    return None if usable is None else usable - torch.cuda.memory_allocated(device)


def units_that_fit(
    most: int, least: int, size: float, available: float | None, share: float
) -> int:
    """Of `most` units of `size` bytes, those that a share of the available bytes holds.

    At least `least` (or `most`, if that is less); all of them where `available` is None.
    """
    if available is None:
        return most
    return min(most, max(least, int(available * share / size)))


def prefill_tokens(most: int, text_config, itemsize: int, available: float | None) -> int:
    """Tokens of a prompt to read at a time: `most`, halved until the layers' MLPs fit.

    available: bytes beside weights, cache and `COPIED_LAYERS`, or None.
    """
    size, row = most, mlp_bytes(text_config, itemsize)
    wanted = units_that_fit(most, LEAST_CHUNK_SIZE, row, available, PREFILL_SHARE)
    while size > wanted:
        size //= 2
    return max(size, min(most, LEAST_CHUNK_SIZE))


def cache_bytes(text_config, tokens: int, itemsize: int) -> int:
    """Bytes of the keys and values of so many tokens."""
    head = text_config.hidden_size // text_config.num_attention_heads
    row = 2 * text_config.num_key_value_heads * head * itemsize
    return tokens * text_config.num_hidden_layers * row


def mlp_bytes(text_config, itemsize: int) -> int:
    """Bytes for a token while the MLP of a layer runs."""
    hidden = MLP_HIDDEN_ROWS * text_config.hidden_size
    return (hidden + MLP_INTERMEDIATE_ROWS * text_config.intermediate_size) * itemsize


def partial_bytes(heads: int, head_dim: int, num_selected: int, itemsize: int) -> int:
    """Bytes of a query's partial results of the selected branch: an output and a log-sum-exp for
    each of its heads and blocks.
    """
    return heads * num_selected * (head_dim * itemsize + 4)


def patch_bytes(vision_config, itemsize: int) -> int:
    """Bytes for a patch while a block of the vision tower runs."""
    rows = VISION_HIDDEN_ROWS * vision_config.hidden_size
    rows += VISION_INTERMEDIATE_ROWS * vision_config.intermediate_size
    return rows * itemsize + pixels_of_patch(vision_config) * (4 + itemsize)


def pixels_of_patch(vision_config) -> int:
    """Numbers that a patch's pixels are."""
    area = vision_config.patch_size**2
    return vision_config.in_channels * vision_config.temporal_patch_size * area
