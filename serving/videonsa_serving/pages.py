"""Where the engine's cache keeps the keys and values of tokens; it knows nothing of vLLM.

A layer's cache is [pages, K, page size, 2 * D]. What lies where within a page differs from backend
to backend; each function of a layout gives views of the keys and of the values, [pages, page size,
K, D]. Pages of a request are anywhere, listed in its row of the block table.
"""

import torch

KeysAndValues = tuple[torch.Tensor, torch.Tensor]


def cpu_layout(cache: torch.Tensor) -> KeysAndValues:
    """vLLM's attention on a CPU in float32: for each head the page's keys, then its values.

    The dimensions of keys come before their tokens, which the operator reads as vectors.
    """
    pages, heads, page_size, both = cache.shape
    keys, values = cache.view(pages, heads, 2, -1).unbind(2)
    keys = keys.unflatten(2, (both // 2, page_size)).permute(0, 3, 1, 2)
    return keys, values.unflatten(2, (page_size, both // 2)).transpose(1, 2)


def flash_layout(cache: torch.Tensor) -> KeysAndValues:
    """FlashAttention: for each head and token its key, then its value."""
    return cache.transpose(1, 2).chunk(2, dim=-1)


def read_tokens(
    layout: KeysAndValues, block_table: torch.Tensor, requests: torch.Tensor, places: torch.Tensor
) -> KeysAndValues:
    """Keys and values [M, K, D] of tokens at `places` [M] of `requests` [M].

    block_table: [requests, pages of each], which page has the next so many tokens of a request.
    """
    keys, values = layout
    page_size = keys.shape[1]
    index = (block_table[requests, places // page_size].long(), places % page_size)
    return keys[index], values[index]
