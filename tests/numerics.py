"""Packed test samples, the error budget (at most twice eager PyTorch's own error), and what is
checked of the reference and the kernels alike."""

import itertools
from dataclasses import dataclass

import pytest
import torch


@dataclass(frozen=True)
class Case:
    """Sizes of packed samples; `cached` are the keys of each sample that have no query."""

    lengths: tuple[int, ...]
    heads: int = 14
    kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 16
    num_selected: int = 4
    window_size: int = 32
    num_initial: int = 0
    num_local: int = 1
    cached: int = 0
    note: str = ""

    def __str__(self):
        lengths = "-".join(map(str, self.lengths))
        cached = f"-cached{self.cached}" if self.cached else ""
        return (
            f"{lengths}x{self.heads}/{self.kv_heads}{cached}{'-' if self.note else ''}{self.note}"
        )

    @property
    def sizes(self):
        """The keyword arguments of `nsa_attention`."""
        return {
            "block_size": self.block_size,
            "num_selected": self.num_selected,
            "window_size": self.window_size,
            "num_initial": self.num_initial,
            "num_local": self.num_local,
        }


def cumulative(lengths, device="cpu"):
    """int32 [0, l0, l0 + l1, ...]."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def packed(case, dtype=torch.float64, seed=42, device="cpu"):
    """Random q, k, v, gates and the cumulative lengths of queries and keys."""
    generator = torch.Generator().manual_seed(seed)
    queries = [length - min(case.cached, length) for length in case.lengths]

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q = normal(sum(queries), case.heads, case.head_dim)
    k, v = (normal(sum(case.lengths), case.kv_heads, case.head_dim) for _ in "kv")
    gates = normal(sum(queries), case.heads, 3).sigmoid()
    tensors = [x.to(device=device, dtype=dtype) for x in (q, k, v, gates)]
    return *tensors, cumulative(queries, device), cumulative(case.lengths, device)


def assert_as_accurate(name, actual, eager, exact, slack=2.0):
    """`actual` errs at most `slack` times as much as `eager` does, against `exact` (float64)."""
    floor = torch.finfo(actual.dtype).eps * exact.abs().max()
    allowed = slack * (eager.double() - exact).abs().max() + floor
    error = (actual.double() - exact).abs().max()
    assert error <= allowed, f"{name}: max error {error:.1e}, allowed {allowed:.1e}"


def public_calls(module, case, q, k, v, gates, cu_q, cu_k):
    """Each public function of the reference or the kernels: its inputs with gradients, a call.

    The call takes nothing and returns the output; the means and the choice are made up.
    """
    means = [x[: len(x) // case.block_size] for x in (k, v)]
    lse = q.new_zeros(q.shape[:2], dtype=torch.float32)
    positions = torch.zeros(len(q), dtype=torch.int64, device=q.device)
    shape = (len(q), case.kv_heads, case.num_selected)
    blocks = torch.zeros(shape, dtype=torch.int32, device=q.device)
    lengths, block = (cu_q, cu_k), {"block_size": case.block_size}
    choice = {key: value for key, value in case.sizes.items() if key != "window_size"}
    window = {"window_size": case.window_size}
    return {
        "compress_blocks": ([k, v], lambda: module.compress_blocks(k, v, cu_k, **block)[0]),
        "compressed_attention": (
            [q, k, v],
            lambda: module.compressed_attention(q, *means, *lengths, **block)[0],
        ),
        "select_blocks": ([], lambda: module.select_blocks(q, means[0], lse, *lengths, **choice)),
        "selected_attention": (
            [q, k, v],
            lambda: module.selected_attention(q, k, v, blocks, *lengths, **block),
        ),
        "window_attention": (
            [q, k, v],
            lambda: module.window_attention(q, k, v, *lengths, **window),
        ),
        "dense_attention": (
            [q, k, v],
            lambda: module.dense_attention(q, k, v, positions, *lengths),
        ),
        "nsa_attention": (
            [q, k, v, gates],
            lambda: module.nsa_attention(q, k, v, gates, *lengths, **case.sizes),
        ),
    }


FUNCTIONS = (
    "compress_blocks",
    "compressed_attention",
    "select_blocks",
    "selected_attention",
    "window_attention",
    "dense_attention",
    "nsa_attention",
)
# Lengths that do not fit 20 queries and 20 keys, and what the error says of them.
WRONG_LENGTHS = {
    "short": ([0, 12, 15], "cu_seqlens_[qk] ends at 15 tokens, but its tensor has"),
    "long": ([0, 12, 40], "cu_seqlens_[qk] ends at 40 tokens, but its tensor has"),
    "from 1": ([1, 12, 20], r"cu_seqlens_[qk] is \[1, 12, 20\]; wanted cumulative lengths"),
    "down": ([0, 21, 20], r"cu_seqlens_[qk] is \[0, 21, 20\]; wanted cumulative lengths"),
    "float": ([0.0, 12.0, 20.0], "dtype torch.float32; wanted integers"),
    "none": ([], "wanted integers, one cumulative length per sample and a leading zero"),
    "nested": ([[0, 12, 20]], "wanted integers, one cumulative length per sample"),
}


def assert_wrong_lengths_are_refused(module, name, kind, device="cpu"):
    case = Case((12, 8), 4, 2, block_size=8)
    tensors = packed(case, torch.float32, device=device)[:4]
    ends, message = WRONG_LENGTHS[kind]
    wrong = torch.tensor(ends)
    good = torch.tensor([0, 12, 20])
    for lengths in ((wrong, good), (good, wrong)):
        if name == "compress_blocks" and lengths[0] is wrong:
            continue
        with pytest.raises(ValueError, match=message):
            public_calls(module, case, *tensors, *lengths)[name][1]()


def assert_no_queries_give_zero_gradients(module, name, device="cpu"):
    """Also to the keys, and connected: a process that has no video must not leave them out."""
    case = Case((12, 8), 4, 2, block_size=8, cached=20)
    *tensors, cu_q, cu_k = packed(case, torch.float32, device=device)
    assert not len(tensors[0])
    for x in tensors:
        x.requires_grad_()
    inputs, call = public_calls(module, case, *tensors, cu_q, cu_k)[name]
    o = call()
    assert o.shape == tensors[0].shape and o.dtype == torch.float32
    for gradient, x in zip(torch.autograd.grad(o.sum(), inputs), inputs, strict=True):
        assert gradient.shape == x.shape and (gradient == 0).all()


def assert_as_many_means_as_whole_blocks(module, device="cpu"):
    """One row for each block_size keys of the pack; those that no sample's block fills are zero."""
    case = Case((9, 1, 8, 7, 7), 2, 2, block_size=8)
    _, k, v, _, _, cu_k = packed(case, torch.float32, device=device)
    for means, x in zip(module.compress_blocks(k, v, cu_k, block_size=8), (k, v), strict=True):
        assert means.shape == (4, 2, 16)
        torch.testing.assert_close(means[:2], torch.stack([x[:8].mean(0), x[10:18].mean(0)]))
        assert (means[2:] == 0).all()


def assert_unused_means_get_no_gradient(module, device="cpu"):
    """The rows past the last sample's last block are read by no query."""
    case = Case((9, 1, 8, 7, 7), 2, 2, block_size=8)
    q, k, v, _, cu_q, cu_k = packed(case, torch.float32, device=device)
    means = [x[:4].clone().requires_grad_() for x in (k, v)]
    o, _ = module.compressed_attention(q, *means, cu_q, cu_k, block_size=8)
    for gradient in torch.autograd.grad(o.sum(), means):
        assert gradient[:2].isfinite().all() and (gradient[2:] == 0).all()


def assert_a_sample_of_one_token_sees_itself(module, device="cpu"):
    """Wherever it is in the pack: its block is not complete, so two branches give its own v."""
    case = Case((1, 9, 1, 1), 4, 2, block_size=8)
    q, k, v, gates, cu_q, cu_k = packed(case, torch.float32, device=device)
    o = module.nsa_attention(q, k, v, gates, cu_q, cu_k, **case.sizes)
    alone = [0, 10, 11]
    wanted = v.repeat_interleave(2, 1) * gates[..., 1:].sum(-1, keepdim=True)
    torch.testing.assert_close(o[alone], wanted[alone])
    positions = torch.zeros(len(q), dtype=torch.int64, device=device)
    dense = module.dense_attention(q, k, v, positions, cu_q, cu_k)
    torch.testing.assert_close(dense[alone], v.repeat_interleave(2, 1)[alone])
