"""Packed test samples, and the error budget: at most twice eager PyTorch's own error."""

import itertools
from dataclasses import dataclass

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
