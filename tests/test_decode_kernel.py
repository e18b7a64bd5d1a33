"""Decoding's kernel against nsa_reference.py: interpreted here, at the model's sizes on a GPU.

It may err against float64 at most twice as much as the reference in the same dtype does. What a
cache holds past its length is NaN in every case: nothing of it may reach the result.
"""

from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

from videonsa import nsa_kernels as kernels
from videonsa import nsa_kernels_decode as decode
from videonsa import nsa_kernels_primitives as primitives
from videonsa import nsa_reference as reference

from numerics import assert_as_accurate

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
gpu = pytest.mark.gpu
sizes = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan", "quick_interpreter")


@dataclass(frozen=True)
class Cache:
    """Sizes of a cache with `length` keys of `capacity`; `padding` at the start of each row."""

    length: int
    capacity: int
    heads: int = 7
    kv_heads: int = 1
    head_dim: int = 16
    padding: tuple[int, ...] = (0,)
    transposed: bool = False

    def __str__(self):
        name = f"{self.length}of{self.capacity}x{self.heads}/{self.kv_heads}d{self.head_dim}"
        name += f"-padding{'-'.join(map(str, self.padding))}" if any(self.padding) else ""
        return name + ("-transposed" if self.transposed else "")


@pytest.fixture(autouse=True)
def large_tiles_on_a_small_gpu(monkeypatch):
    """The interpreter runs float32 in the tiles of 16-bit numbers, on 4 multiprocessors."""
    if not GPU:
        monkeypatch.setattr(primitives, "FLOAT32_TILE", 64)
        monkeypatch.setattr(decode, "_multiprocessors", lambda device: 4)


def filled(case, dtype, seed=0):
    """query, key, value, length, valid and scale, as `decode_attention` takes them."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads = len(case.padding), (case.heads, case.kv_heads)

    def normal(*shape):
        numbers = torch.randn(*shape, generator=generator, dtype=torch.float32)
        return numbers.to(DEVICE, dtype)

    query = normal(batch, heads[0], case.head_dim)
    key, value = (normal(batch, case.capacity, heads[1], case.head_dim) for _ in "kv")
    valid = None
    for x in (key, value):
        x[:, case.length :] = torch.nan
    if any(case.padding):
        padding = torch.tensor(case.padding, device=DEVICE)[:, None]
        valid = torch.arange(case.capacity, device=DEVICE) >= padding
        for x in (key, value):
            x[~valid] = torch.nan
    if case.transposed:
        key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value))
    length = torch.tensor([case.length], device=DEVICE)
    return query, key, value, length, valid, case.head_dim**-0.5


def check(case, dtype):
    query, key, value, *rest = filled(case, dtype)
    o = kernels.decode_attention(query, key, value, *rest)
    assert o.dtype == dtype and o.is_contiguous() and o.shape == query.shape
    if GPU:  # the interpreter runs one program after the other, always in the same order
        assert torch.equal(o, kernels.decode_attention(query, key, value, *rest)), "two runs differ"
    eager = reference.decode_attention(query, key, value, *rest)
    exact = reference.decode_attention(*(x.double() for x in (query, key, value)), *rest)
    assert_as_accurate("o", o, eager, exact)
    return o


TINY = [
    Cache(1, 40),
    Cache(63, 64),
    Cache(65, 65),
    Cache(64, 900),
    Cache(300, 2000, transposed=True),
    Cache(900, 900, 2, 2),
    Cache(200, 400, 8, 1, 32),
    Cache(130, 140, 32, 2),
    Cache(130, 130, 28, 1),
    Cache(150, 200, 14, 2, padding=(0, 149, 70), transposed=True),
    Cache(100, 300, padding=(100, 30)),
    Cache(70, 70, 12, 12, padding=(1, 2)),
]
FULL = [
    Cache(1, 8192, 28, 4, 128),
    Cache(8192, 8192, 28, 4, 128),
    Cache(8193, 9000, 28, 4, 128, transposed=True),
    Cache(55_296, 55_400, 28, 4, 128),
    Cache(131_072, 131_200, 28, 4, 128, transposed=True),
    Cache(131_072, 131_072, 28, 4, 128),
    Cache(4000, 5000, 28, 4, 128, padding=(0, 3999, 4000, 17)),
    Cache(3000, 3001, 16, 2, 128, padding=(0,) * 40),
    Cache(3000, 3001, 64, 8, 128),
    Cache(3000, 3001, 8, 8, 64),
    Cache(3000, 3001, 16, 1, 32),
    Cache(3000, 3001, 28, 1, 16, padding=(0, 100)),
]


@sizes("case", TINY, ids=str)
def test_decoding_is_as_accurate_as_eager(case):
    check(case, torch.float32)


@sizes("case", TINY[::3], ids=str)
def test_float16_is_as_accurate_as_eager(case):
    check(case, torch.float16)


def test_small_tiles_are_as_accurate_as_eager(monkeypatch):
    monkeypatch.setattr(primitives, "FLOAT32_TILE", 16)
    check(Cache(100, 300, padding=(100, 30, 0)), torch.float32)


@gpu
@sizes("case", FULL, ids=str)
def test_bfloat16_at_the_models_sizes(case):
    check(case, torch.bfloat16)


@gpu
@sizes("dtype", [torch.float16, torch.float32])
def test_other_dtypes_on_the_gpu(dtype):
    check(Cache(8193, 9000, 28, 4, 128, transposed=True), dtype)
    check(Cache(4000, 5000, 28, 4, 128, padding=(0, 3999, 4000, 17)), dtype)


@sizes("padding", [(0,), (0, 5, 2)], ids=["alone", "batch"])
@sizes("capacity", [40, 900, 0])
def test_a_row_without_keys_is_zero(padding, capacity):
    o = check(Cache(0, capacity, padding=padding), torch.float32)
    assert (o == 0).all()


def test_a_padded_row_is_that_row_alone():
    query, key, value, length, valid, scale = filled(Cache(60, 80, padding=(0, 20)), torch.float32)
    o = kernels.decode_attention(query, key, value, length, valid, scale)
    alone = (query[1:], key[1:, 20:], value[1:, 20:], length - 20, None, scale)
    torch.testing.assert_close(o[1:], kernels.decode_attention(*alone))


def test_an_empty_batch():
    query, key, value, length, _, scale = filled(Cache(5, 9), torch.float32)
    o = kernels.decode_attention(query[:0], key[:0], value[:0], length, None, scale)
    assert o.shape == (0, 7, 16)


def test_loud_scores_do_not_overflow():
    query, key, value, *rest = filled(Cache(500, 900), torch.float32)
    query = query * 1000
    torch.testing.assert_close(
        kernels.decode_attention(query, key, value, *rest),
        reference.decode_attention(query, key, value, *rest),
        atol=1e-4,
        rtol=1e-4,
    )


def test_keys_and_values_may_have_strides_of_their_own():
    query, key, value, length, _, scale = filled(Cache(70, 90, 4, 2), torch.float32)
    both = torch.stack([key, value], 3)  # [B, C, K, 2, D]
    mask = (torch.arange(180, device=DEVICE) % 7 != 3).view(1, 180)[:, ::2]
    apart = kernels.decode_attention(query, key, value, length, mask.contiguous(), scale)
    column = value.transpose(1, 2).contiguous().transpose(1, 2)
    for views in ((both[..., 0, :], both[..., 1, :]), (key, column)):
        assert torch.equal(kernels.decode_attention(query, *views, length, mask, scale), apart)


@sizes("splits", [1, 2, 3, 7, 200])
def test_any_number_of_splits(splits, monkeypatch):
    monkeypatch.setattr(decode, "_num_splits", lambda key, step: splits)
    check(Cache(390, 500), torch.bfloat16 if GPU else torch.float32)


def test_the_grid_follows_from_shapes_alone(monkeypatch):
    monkeypatch.setattr(decode, "_multiprocessors", lambda device: 132)

    def splits(batch, capacity, kv_heads):
        return decode._num_splits(torch.empty(batch, capacity, kv_heads, 16, device="meta"), 64)

    assert [splits(1, 131072, 4), splits(5, 131072, 4), splits(1, 131072, 1)] == [66, 13, 264]
    assert [splits(1, 130, 4), splits(1, 0, 4), splits(300, 9000, 4)] == [3, 1, 1]


WRONG = {
    "heads": ({"query": torch.zeros(1, 5, 16)}, "a multiple of the key heads"),
    "batch": ({"query": torch.zeros(2, 4, 16)}, "wanted one batch size"),
    "rank": ({"query": torch.zeros(1, 4, 1, 16)}, r"wanted \[batch, heads, D\]"),
    "shapes": ({"value": torch.zeros(1, 8, 2, 16)}, "query, key and value have shapes"),
    "stride": ({"value": torch.zeros(1, 9, 16, 2).transpose(2, 3)}, "the last stride 1"),
    "length": ({"length": torch.tensor(5)}, r"length is torch.int64 \(\)"),
    "int32": ({"length": torch.tensor([5]).int()}, "length is torch.int32"),
    "valid": ({"valid": torch.ones(1, 8).bool()}, "valid has shape"),
    "mask": ({"valid": torch.ones(1, 9)}, "valid is torch.float32; wanted bool"),
    "gradient": ({"query": torch.zeros(1, 4, 16).requires_grad_()}, "has no gradient"),
}


@sizes("module", [kernels, reference], ids=["kernels", "reference"])
@sizes("wrong", WRONG)
def test_what_does_not_fit_is_named(wrong, module):
    change, message = WRONG[wrong]
    names = ("query", "key", "value", "length", "valid", "scale")
    given = dict(zip(names, filled(Cache(5, 9, 4, 2), torch.float32), strict=True))
    given |= {name: x.to(DEVICE) for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        module.decode_attention(**given)


@sizes(
    ("dtype", "head_dim", "message"),
    [(torch.float32, 24, "head sizes"), (torch.float64, 16, "dtypes are")],
)
def test_what_the_kernels_cannot_do_is_named(dtype, head_dim, message):
    with pytest.raises(ValueError, match=message):
        kernels.decode_attention(*filled(Cache(5, 9, head_dim=head_dim), dtype))


@gpu
def test_a_recorded_graph_goes_on_while_the_cache_fills():
    query, key, value, length, _, scale = filled(Cache(4000, 4000, 28, 4, 128), torch.bfloat16)
    length.fill_(200)
    valid = torch.ones(1, 4000, dtype=torch.bool, device="cuda")
    valid[:, :50] = False
    call = (query, key, value, length, valid, scale)
    kernels.decode_attention(*call)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.decode_attention(*call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = kernels.decode_attention(*call)
    for now in (200, 201, 257, 1000, 4000, 0):
        length.fill_(now)
        query.copy_(torch.randn(query.shape))  # drawn on the CPU: a graph takes the GPU's generator
        valid[:, 100] = now % 2 == 0
        graph.replay()
        assert torch.equal(o, kernels.decode_attention(*call)), now
        exact = reference.decode_attention(*(x.double() for x in call[:3]), *call[3:])
        assert_as_accurate("o", o, reference.decode_attention(*call), exact)


@gpu
def test_no_length_or_capacity_compiles_anything():
    def compiled():
        functions = (decode._decode_forward, decode._merge_splits)
        caches = [cache for f in functions for cache in f.device_caches.values()]
        return sum(len(cache[0]) for cache in caches)

    def step(length, capacity):
        kernels.decode_attention(*filled(Cache(length, capacity, 28, 4, 128), torch.bfloat16))

    step(5000, 6000)
    before = compiled()
    for length, capacity in ((1, 6000), (6000, 6000), (64, 7001), (20_000, 20_480)):
        step(length, capacity)
    assert compiled() == before


@gpu
def test_caches_past_2_to_the_31_elements():
    """Four rows of 1.1M keys in one buffer: the last keys of the last row count."""
    capacity, batch = 1_100_000, 4
    buffer = torch.zeros(batch, capacity, 4, 128, dtype=torch.bfloat16, device="cuda")
    query = torch.ones(batch, 28, 128, dtype=torch.bfloat16, device="cuda")
    buffer[-1, -1] = 1
    length = torch.tensor([capacity], device="cuda")
    o = kernels.decode_attention(query, buffer, buffer, length, None, 1.0)
    torch.testing.assert_close(o[-1], torch.ones_like(o[-1]))
    assert (o[:-1] == 0).all()
