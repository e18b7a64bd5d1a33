"""Gated native sparse attention: means of blocks, selected blocks and a window, weighed by gates.

    o_j = g_cmp * compressed(j) + g_slc * selected(j) + g_win * window(j)

`nsa_attention` is the whole of it, the other functions its parts. nsa_reference.py defines them in
plain PyTorch; tensors on a GPU go to the functions of the same names in nsa_kernels.py, in Triton.
This file and the card beside it are the package's own; the others are VideoNSA's as they are.
"""

import functools

import torch

from . import nsa_kernels, nsa_reference
from .nsa_rules import gate_weights


def _by_device(name):
    """The function of this name, in Triton or in PyTorch, as its first tensor's device wants it."""
    in_pytorch, in_triton = getattr(nsa_reference, name), getattr(nsa_kernels, name)

    @functools.wraps(in_pytorch)
    def attention(*args, **kwargs):
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        return (in_triton if next(tensors).is_cuda else in_pytorch)(*args, **kwargs)

    return attention


nsa_attention = _by_device("nsa_attention")
compress_blocks = _by_device("compress_blocks")
compressed_attention = _by_device("compressed_attention")
select_blocks = _by_device("select_blocks")
selected_attention = _by_device("selected_attention")
window_attention = _by_device("window_attention")
dense_attention = _by_device("dense_attention")
decode_attention = _by_device("decode_attention")

__all__ = [
    "compress_blocks",
    "compressed_attention",
    "decode_attention",
    "dense_attention",
    "gate_weights",
    "nsa_attention",
    "select_blocks",
    "selected_attention",
    "window_attention",
]
