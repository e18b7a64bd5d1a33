"""The Triton kernels against nsa_reference.py: under Triton's interpreter here, on a GPU there.

A kernel may err against float64 at most twice as much as the reference in the same dtype does
(numerics.py). Without a GPU the shapes are tiny and bfloat16, which the interpreter gets wrong, is
left out; with one, `pytest -m gpu` runs the model's sizes.
"""

import inspect
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from paths import ROOT

pytest.importorskip("triton")

from videonsa import nsa_kernels as kernels
from videonsa import nsa_kernels_choice as choice
from videonsa import nsa_kernels_compressed as compressed
from videonsa import nsa_kernels_dense as dense
from videonsa import nsa_kernels_primitives as primitives
from videonsa import nsa_kernels_tiles as tiles
from videonsa import nsa_reference as reference

from numerics import (
    FUNCTIONS,
    WRONG_LENGTHS,
    Case,
    assert_a_sample_of_one_token_sees_itself,
    assert_as_accurate,
    assert_as_many_means_as_whole_blocks,
    assert_no_queries_give_zero_gradients,
    assert_unused_means_get_no_gradient,
    assert_wrong_lengths_are_refused,
    cumulative,
    packed,
)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NAMES = ("o", "dq", "dk", "dv", "dgates")
gpu = pytest.mark.gpu
sizes = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan", "quick_interpreter")


def tiny(lengths, heads=7, kv_heads=1, **changes):
    small = {"block_size": 8, "num_selected": 3, "window_size": 10}
    return Case(lengths, heads, kv_heads, **(small | changes))


def full(lengths, heads=28, kv_heads=4, **changes):
    large = {"head_dim": 128, "block_size": 64, "num_selected": 8, "window_size": 256}
    return Case(lengths, heads, kv_heads, **(large | changes))


TINY = [
    tiny((45,)),
    tiny((150,), 1, 1, block_size=128, num_selected=1, note="block128"),
    tiny((1, 30, 7)),
    tiny((150, 117), cached=100),
    tiny((0, 16, 0, 9, 0), 4, 2, note="empty"),
    tiny((150,), 2, 2, cached=110, note="G1"),
    tiny((150,), 16, 1, cached=130, note="G16"),
    tiny((160,), head_dim=32, num_selected=6, num_initial=1, num_local=2, cached=130),
    tiny((80,), 2, 1, block_size=32, num_selected=2, window_size=64, note="wide"),
]
FULL = [
    full((1300, 63, 1), num_selected=16),
    full((900, 1300), cached=700),
    full((64, 0, 1025), 16, 2, note="G8"),
    full((700, 65), 4, 4, note="G1"),
    full((700, 65), 16, 1, num_initial=1, num_local=2, note="G16-forced"),
    full((700, 129), 14, 2, head_dim=64, block_size=32, num_selected=6, window_size=100),
    full((700,), 6, 2, head_dim=32, block_size=8, num_selected=7, note="small"),
    full((1500,), 14, 2, head_dim=16, block_size=256, num_selected=2, window_size=1),
]


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """The interpreter runs float32 in the tiles of 16-bit numbers."""
    if not GPU:
        monkeypatch.setattr(primitives, "FLOAT32_TILE", 64)


@pytest.fixture(params=["tiles", "hybrid"])
def hybrid(request, monkeypatch):
    """Both ways of the selected branch, the second in several chunks."""
    if request.param == "hybrid":
        use_hybrid(monkeypatch)


def use_hybrid(monkeypatch):
    monkeypatch.setattr(tiles, "ALL_HOT_UP_TO", 0)
    monkeypatch.setattr(tiles, "CHUNK_QUERIES", 500 if GPU else 20)


def run(function, tensors, toward):
    """o and the gradients of all tensors."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    o = function(*tensors)
    return [o.detach(), *torch.autograd.grad(o, tensors, toward.to(o.dtype))]


def toward(q):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(q.shape, generator=generator, dtype=torch.float64).to(q.device, q.dtype)


def branches(module, q, k, v, gates, cu_q, cu_k, case, blocks):
    """The layer from a module's public functions, with a given choice."""
    block_size = case.block_size
    k_cmp, v_cmp = module.compress_blocks(k, v, cu_k, block_size=block_size)
    outputs = (
        module.compressed_attention(q, k_cmp, v_cmp, cu_q, cu_k, block_size=block_size)[0],
        module.selected_attention(q, k, v, blocks, cu_q, cu_k, block_size=block_size),
        module.window_attention(q, k, v, cu_q, cu_k, window_size=case.window_size),
    )
    return (torch.stack(outputs, -1) * gates.to(q.dtype).unsqueeze(2)).sum(-1)


def by_group(dtype, q, k, v, gates, cu_q, cu_k, case, blocks, do):
    """o and gradients of the reference, one key/value head at a time, which bounds its memory."""
    group, parts = q.shape[1] // k.shape[1], []
    for h in range(k.shape[1]):
        heads = slice(h * group, (h + 1) * group)
        one = [q[:, heads], k[:, h : h + 1], v[:, h : h + 1], gates[:, heads]]
        parts.append(
            run(
                lambda *x, h=h: branches(reference, *x, cu_q, cu_k, case, blocks[:, h : h + 1]),
                [x.to(dtype) for x in one],
                do[:, heads],
            )
        )
    return [torch.cat(x, 1) for x in zip(*parts, strict=True)]


def recorded(function, monkeypatch):
    """A list that what the layer gets from the named function is appended to."""
    record, original = [], getattr(kernels, function)

    def call(*args, **settings):
        record.append(original(*args, **settings))
        return record[-1]

    monkeypatch.setattr(kernels, function, call)
    return record


def slack(dtype):
    """A backward that takes p from lse rounds lse, which in float32 outweighs all else."""
    return 8.0 if dtype == torch.float32 else 2.0


def check_layer(case, dtype, monkeypatch, change=None):
    q, k, v, gates, cu_q, cu_k = packed(case, dtype, device=DEVICE)
    if change:
        change(q, k, v, gates)
    record, do = recorded("choose_blocks", monkeypatch), toward(q)
    inputs = (q, k, v, gates)
    fused = run(lambda *x: kernels.nsa_attention(*x, cu_q, cu_k, **case.sizes), inputs, do)
    again = fused
    if GPU:  # the interpreter runs one program after the other, always in the same order
        again = run(lambda *x: kernels.nsa_attention(*x, cu_q, cu_k, **case.sizes), inputs, do)
    blocks = record[0]
    exact = by_group(torch.float64, *inputs, cu_q, cu_k, case, blocks, do)
    eager = by_group(dtype, *inputs, cu_q, cu_k, case, blocks, do)
    apart = run(lambda *x: branches(kernels, *x, cu_q, cu_k, case, blocks), inputs, do)
    for name, a, b, c, e, x in zip(NAMES, fused, again, apart, eager, exact, strict=True):
        assert torch.equal(a, b), f"{name}: two runs differ"
        assert_as_accurate(name, a, e, x, slack(dtype))
        assert_as_accurate(f"{name} of the branches", c, e, x, slack(dtype))


@sizes("case", TINY[:2], ids=str)
def test_layer_and_branches_are_as_accurate_as_eager(case, monkeypatch):
    check_layer(case, torch.float32, monkeypatch)


@sizes("case", TINY[2:], ids=str)
def test_hybrid_is_as_accurate_as_eager(case, monkeypatch):
    use_hybrid(monkeypatch)
    lists = recorded("build_tile_lists", monkeypatch)
    check_layer(case, torch.float32, monkeypatch)
    if case.cached and case.heads == 7:  # groups of 16 leave tiles of 4 queries, all hot
        assert lists[0].hot_count.sum() > 0 and lists[0].cold_count.sum() > 0


def test_cold_pairs_of_the_last_of_many_samples(monkeypatch):
    """Its blocks have numbers past those of a single sample of as many keys."""
    use_hybrid(monkeypatch)
    q, k, v, _, cu_q, cu_k = packed(tiny((40,) * 5, 2, 1, cached=38), torch.float32, device=DEVICE)
    blocks = torch.tensor([2, 3, 4], dtype=torch.int32, device=DEVICE).expand(len(q), 1, 3)
    got, wanted = (
        module.selected_attention(q, k, v, blocks, cu_q, cu_k, block_size=8)
        for module in (kernels, reference)
    )
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_the_oldest_key_of_a_window_may_end_a_step():
    """Key 31 is the last of the kernel's first 32, and of the window of query 40."""
    q, k, v, _, cu_q, cu_k = packed(tiny((41,), 1, 1, cached=40), torch.float32, device=DEVICE)
    results = (
        run(lambda *x, m=m: m.window_attention(*x, cu_q, cu_k, window_size=10), (q, k, v), q)
        for m in (kernels, reference)
    )
    for name, got, wanted in zip(NAMES, *results, strict=False):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: n + m)


def test_float16_is_as_accurate_as_eager(monkeypatch):
    use_hybrid(monkeypatch)
    check_layer(tiny((127,), cached=100), torch.float16, monkeypatch)


def test_small_tiles_are_as_accurate_as_eager(monkeypatch):
    monkeypatch.setattr(primitives, "FLOAT32_TILE", 16)
    check_layer(tiny((33, 9), block_size=32, num_selected=1), torch.float32, monkeypatch)


def test_a_group_may_have_more_heads_than_a_tile_has_rows(monkeypatch):
    monkeypatch.setattr(primitives, "FLOAT32_TILE", 16)
    case = tiny((9,), 20, 1)
    *tensors, cu_q, cu_k = packed(case, torch.float32, device=DEVICE)
    got, wanted = (
        module.nsa_attention(*tensors, cu_q, cu_k, **case.sizes) for module in (kernels, reference)
    )
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_more_means_than_a_step_takes_are_as_accurate_as_eager(monkeypatch):
    """The steps that need no mask, of queries that see all of a tile's means."""
    monkeypatch.setattr(primitives, "FLOAT32_TILE", 16)
    monkeypatch.setattr(compressed, "QUERY_PARTS", 2)
    check_layer(tiny((175,), 2, 1, cached=126), torch.float32, monkeypatch)


def test_the_selected_blocks_are_handed_out():
    case, seen = tiny((30,), 2, 1, cached=3), []
    *tensors, cu_q, cu_k = packed(case, torch.float32, device=DEVICE)
    for module in (kernels, reference):
        module.nsa_attention(*tensors, cu_q, cu_k, **case.sizes, watch_blocks=seen.append)
    assert torch.equal(*seen)


def test_a_given_scale_is_that_of_the_scores():
    """In place of 16 ** -0.5; powers of two, so that the bits are the same."""
    case = tiny((30,), 2, 1)
    q, k, v, gates, cu_q, cu_k = packed(case, torch.float32, device=DEVICE)
    plain = kernels.nsa_attention(2 * q, k, v, gates, cu_q, cu_k, **case.sizes)
    scaled = kernels.nsa_attention(q, k, v, gates, cu_q, cu_k, **case.sizes, scale=0.5)
    assert torch.equal(plain, scaled)


@gpu
@sizes("case", FULL, ids=str)
def test_bfloat16_at_the_models_sizes(case, hybrid, monkeypatch):
    check_layer(case, torch.bfloat16, monkeypatch)


@gpu
@sizes("dtype", [torch.float16, torch.float32])
def test_other_dtypes_on_the_gpu(dtype, hybrid, monkeypatch):
    check_layer(full((500, 65), 14, 2, head_dim=64), dtype, monkeypatch)


@gpu
def test_float32_at_head_size_128(monkeypatch):
    check_layer(full((300,), 14, 2), torch.float32, monkeypatch)


def make_loud(q, k, v, gates):
    """Heads of very different scale, and gates that are exactly zero."""
    q[:, 1::7] *= 20
    gates[::3, :, 1] = 0


def crowd_one_block(q, k, v, gates):
    """All queries want the same block: its keys point where every query points."""
    q += 1
    k[8:16] += 2


@sizes("change", [make_loud, crowd_one_block])
def test_hard_values(change, monkeypatch):
    use_hybrid(monkeypatch)
    check_layer(tiny((130,), cached=100), torch.float32, monkeypatch, change)


@gpu
@sizes("change", [make_loud, crowd_one_block])
def test_hard_values_at_the_models_sizes(change, hybrid, monkeypatch):
    check_layer(full((1500,)), torch.bfloat16, monkeypatch, change)


def choose(module, q, k, v, cu_q, cu_k, case):
    k_cmp, v_cmp = module.compress_blocks(k, v, cu_k, block_size=case.block_size)
    _, lse = module.compressed_attention(q, k_cmp, v_cmp, cu_q, cu_k, block_size=case.block_size)
    options = {key: value for key, value in case.sizes.items() if key != "window_size"}
    return module.select_blocks(q, k_cmp, lse, cu_q, cu_k, **options), k_cmp, lse


def check_choice(case, dtype):
    """Choices equal those of float64 sums of the same means, except where scores tie."""
    q, k, v, _, cu_q, cu_k = packed(case, dtype, device=DEVICE)
    blocks, k_cmp, _ = choose(kernels, q, k, v, cu_q, cu_k, case)
    options = {key: value for key, value in case.sizes.items() if key != "window_size"}
    q, k_cmp = q.double(), k_cmp.double()
    _, lse = reference.compressed_attention(q, k_cmp, k_cmp, cu_q, cu_k, block_size=case.block_size)
    exact = reference.select_blocks(q, k_cmp, lse, cu_q, cu_k, **options)
    used = blocks >= 0
    assert torch.equal(used, exact >= 0)
    assert ((blocks[..., 1:] > blocks[..., :-1]) | ~used[..., 1:]).all(), "not ascending"
    differs = (blocks != exact).any(-1)
    # One pair of near-equal scores may change places; more than a few would be an error.
    assert differs.float().mean() < 2e-3, f"{int(differs.sum())} of {differs.numel()} rows differ"
    for row, head in differs.nonzero()[:20].tolist():
        sample = int((cu_q <= row).sum()) - 1
        before = (cu_k[: sample + 1].diff() // case.block_size).sum()
        keys = k_cmp[before:, head]
        mine, other = (set(x[row, head].tolist()) for x in (blocks, exact))
        group = slice(head * case.heads // case.kv_heads, (head + 1) * case.heads // case.kv_heads)
        score = q[row, group] @ keys.T * case.head_dim**-0.5 - lse[row, group, None]
        worth = score.exp().sum(0)
        gap = min(worth[i] for i in other - mine) - min(worth[i] for i in mine - other)
        assert gap.abs() < 1e-5


@sizes("group", [16, 2], ids=["one level", "two levels"])
@sizes(
    "case",
    [tiny((90, 20), cached=60), tiny((150,), num_initial=1, num_local=2, cached=120)],
    ids=str,
)
def test_choice_equals_float64(case, group, monkeypatch):
    monkeypatch.setattr(choice, "GROUP", group)
    monkeypatch.setattr(choice, "CHUNK_ROWS", 64)
    monkeypatch.setattr(choice, "MEANS", 16)
    check_choice(case, torch.float32)


def test_an_own_block_past_the_last_group_of_means_is_chosen(monkeypatch):
    """It is incomplete, and all groups of means are full."""
    monkeypatch.setattr(choice, "GROUP", 2)
    monkeypatch.setattr(choice, "MEANS", 16)
    check_choice(tiny((8 * 16 + 5,), cached=8 * 16), torch.float32)


@gpu
@sizes(
    "case",
    [full((4096, 3000), num_selected=32), full((70_000,), cached=69_000), FULL[4], FULL[6]],
    ids=str,
)
def test_choice_equals_float64_at_the_models_sizes(case):
    check_choice(case, torch.bfloat16)


def equal_blocks(case, dtype):
    """All keys equal, with values whose products are exact in any order of summation."""
    q, k, v, gates, cu_q, cu_k = packed(case, dtype, device=DEVICE)
    q, k = q.round().clamp(-3, 3), k[:1].sign().expand_as(k)
    return q, k.contiguous(), v, gates, cu_q, cu_k


def check_ties(case, dtype):
    q, k, v, _, cu_q, cu_k = equal_blocks(case, dtype)
    blocks = choose(kernels, q, k, v, cu_q, cu_k, case)[0]
    own = torch.arange(len(q), device=q.device)[:, None] // case.block_size
    slot = torch.arange(case.num_selected, device=q.device)
    past = own.clamp(max=case.num_selected - 1)
    wanted = torch.where(slot < past, slot, torch.where(slot == past, own, -1))
    assert torch.equal(blocks, wanted[:, None].expand_as(blocks).int())


@sizes("group", [16, 2], ids=["one level", "two levels"])
def test_equal_importances_go_to_the_lower_index(group, monkeypatch):
    monkeypatch.setattr(choice, "GROUP", group)
    check_ties(tiny((8 * 9 + 5,)), torch.float32)


@gpu
@sizes("blocks", [40, 600])
def test_equal_importances_go_to_the_lower_index_on_the_gpu(blocks):
    check_ties(full((64 * blocks + 5,)), torch.bfloat16)


def test_recomputing_gives_the_same_bits():
    case = full((2565,)) if GPU else tiny((45,))
    dtype = torch.bfloat16 if GPU else torch.float32
    *tensors, cu_q, cu_k = equal_blocks(case, dtype)

    def layer(*x):
        return kernels.nsa_attention(*x, cu_q, cu_k, **case.sizes)

    plain = run(layer, tensors, toward(tensors[0]))
    again = run(lambda *x: checkpoint(layer, *x, use_reentrant=False), tensors, toward(tensors[0]))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    with torch.no_grad():  # nothing is kept for a backward here
        assert torch.equal(layer(*tensors), plain[0])


def causal_positions(cu_q, cu_k):
    pairs = zip(cu_q.diff().tolist(), cu_k.diff().tolist(), strict=True)
    return torch.cat([torch.arange(n) + (m - n) for n, m in pairs]).to(DEVICE)


@sizes(("heads", "kv_heads"), [(7, 1), (2, 2)] if not GPU else [(28, 4), (6, 6), (18, 6), (9, 3)])
def test_samples_shorter_than_a_block(heads, kv_heads):
    """Compressed is zero and passes no gradient; selected and window are dense attention."""
    case = full((1, 2, 3, 7, 8, 9, 15), heads, kv_heads)
    if not GPU:
        case = tiny((1, 7, 8, 15), heads, kv_heads, block_size=16, num_selected=2, window_size=16)
    q, k, v, gates, cu_q, cu_k = packed(case, torch.float32, device=DEVICE)
    positions = causal_positions(cu_q, cu_k)
    wanted = run(
        lambda *x: reference.dense_attention(*x, positions, cu_q, cu_k), (q, k, v), toward(q)
    )
    for branch in range(3):
        gates.zero_()[..., branch] = 1
        got = run(
            lambda *x: kernels.nsa_attention(*x, gates, cu_q, cu_k, **case.sizes),
            (q, k, v),
            toward(q),
        )
        for name, a, b in zip(NAMES, got, wanted, strict=False):
            if branch == 0:
                assert (a == 0).all(), name
            else:
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: n + m)


def test_unused_slots_may_come_first(hybrid):
    case = full((300,)) if GPU else tiny((40,), num_selected=4)
    dtype = torch.bfloat16 if GPU else torch.float32
    q, k, v, _, cu_q, cu_k = packed(case, dtype, device=DEVICE)
    own = torch.arange(len(q), device=DEVICE)[:, None] // case.block_size
    late = torch.full((len(q), case.kv_heads, case.num_selected), -1, device=DEVICE).int()
    half = case.num_selected // 2
    late[:, :, half] = own
    late[:, :, half + 1] = torch.where(own > 0, 0, -1)
    early = late.roll(-half, -1)

    def attention(blocks):
        return run(
            lambda *x: kernels.selected_attention(
                *x, blocks, cu_q, cu_k, block_size=case.block_size
            ),
            (q, k, v),
            toward(q),
        )

    for a, b in zip(attention(late), attention(early), strict=True):
        assert a.isfinite().all() and torch.allclose(a, b, atol=1e-2 if GPU else 1e-6)


def test_empty_samples_change_no_bit():
    case = full((70, 130)) if GPU else tiny((20, 30))
    *tensors, cu, _ = packed(case, torch.float32, device=DEVICE)
    padded = cu[[0, 0, 1, 1, 2, 2]]

    def layer(cu):
        return run(
            lambda *x: kernels.nsa_attention(*x, cu, cu, **case.sizes), tensors, toward(tensors[0])
        )

    assert all(torch.equal(a, b) for a, b in zip(layer(cu), layer(padded), strict=True))


def test_no_queries_at_all():
    q, k, v, gates, cu_q, cu_k = packed(tiny((20,), cached=20), torch.float32, device=DEVICE)
    case = tiny((20,))
    assert kernels.nsa_attention(q, k, v, gates, cu_q, cu_k, **case.sizes).shape == (0, 7, 16)
    positions = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert kernels.dense_attention(q, k, v, positions, cu_q, cu_k).shape == (0, 7, 16)
    assert choose(kernels, q, k, v, cu_q, cu_k, case)[0].shape == (0, 1, 3)


@sizes("name", [x for x in FUNCTIONS if x.endswith("attention")])
def test_no_queries_give_zero_gradients(name):
    assert_no_queries_give_zero_gradients(kernels, name, DEVICE)


@sizes("kind", WRONG_LENGTHS)
@sizes("name", FUNCTIONS)
def test_lengths_on_the_cpu_that_do_not_fit_are_refused(name, kind):
    assert_wrong_lengths_are_refused(kernels, name, kind, DEVICE)


def test_there_are_as_many_means_as_whole_blocks():
    assert_as_many_means_as_whole_blocks(kernels, DEVICE)


def test_unused_means_get_no_gradient():
    assert_unused_means_get_no_gradient(kernels, DEVICE)


def test_a_sample_of_one_token_sees_itself():
    assert_a_sample_of_one_token_sees_itself(kernels, DEVICE)


def test_gradients_as_autograd_makes_them():
    """Stride 0, transposed, contiguous: the same gradients."""
    case = full((300,)) if GPU else tiny((20,))
    q, k, v, gates, cu_q, cu_k = packed(case, torch.float32, device=DEVICE)
    ones = torch.ones_like(q)
    shapes = (
        ones,
        torch.ones((), device=DEVICE).expand_as(q),
        torch.ones_like(q.transpose(0, 1)).transpose(0, 1),
    )
    results = [
        run(lambda *x: kernels.nsa_attention(*x, cu_q, cu_k, **case.sizes), (q, k, v, gates), do)
        for do in shapes
    ]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@sizes("token", [8, 13])
def test_the_past_does_not_see_the_future(token):
    case = tiny((30,))
    *tensors, cu_q, cu_k = packed(case, torch.float32, device=DEVICE)
    before = kernels.nsa_attention(*tensors, cu_q, cu_k, **case.sizes)
    for tensor in tensors[:3]:
        tensor[token:] += 7
    after = kernels.nsa_attention(*tensors, cu_q, cu_k, **case.sizes)
    assert torch.equal(before[:token], after[:token])
    assert (before[token:] - after[token:]).abs().amax((1, 2)).min() > 0


def check_dense(case, rows, dtype):
    """Every `rows`-th token of each sample asks, the last ones more densely."""
    _, k, v, _, _, cu_k = packed(case, dtype, device=DEVICE)
    kept = [
        torch.arange(n)[(torch.arange(n) % rows == 0) | (torch.arange(n) > n - 5)]
        for n in case.lengths
    ]
    cu_q = cumulative([len(x) for x in kept], DEVICE)
    positions = torch.cat(kept).to(DEVICE)
    q = packed(replace(case, lengths=(len(positions),)), dtype, seed=7, device=DEVICE)[0]
    got = run(lambda *x: kernels.dense_attention(*x, positions, cu_q, cu_k), (q, k, v), toward(q))
    again = run(lambda *x: kernels.dense_attention(*x, positions, cu_q, cu_k), (q, k, v), toward(q))
    eager, exact = (
        run(
            lambda *x: reference.dense_attention(*x, positions, cu_q, cu_k),
            [x.to(t) for x in (q, k, v)],
            toward(q),
        )
        for t in (dtype, torch.float64)
    )
    for name, a, b, e, x in zip(NAMES, got, again, eager, exact, strict=False):
        assert torch.equal(a, b), f"{name}: two runs differ"
        assert_as_accurate(name, a, e, x, slack(dtype))


@sizes("programs", [1, 8], ids=["whole", "split"])
@sizes("case", [tiny((300, 0, 9)), tiny((30,), 16, 2)], ids=str)
def test_dense_rows_are_as_accurate_as_eager(case, programs, monkeypatch):
    monkeypatch.setattr(dense, "PROGRAMS", programs)
    check_dense(case, 20, torch.float32)


@gpu
@sizes("case", [full((1000, 1, 3000)), full((2000,), 16, 2), full((600,), 4, 4)], ids=str)
@sizes("rows", [1, 50])
def test_dense_rows_at_the_models_sizes(case, rows):
    check_dense(case, rows, torch.bfloat16)


@gpu
@sizes("layout", ["contiguous", "fused"])
def test_long_streams(layout):
    """70,000 tokens in one sample; 480,000 as views of one buffer past 2**31 elements."""
    case = full((1,))
    torch.manual_seed(0)
    tokens = 480_000 if layout == "fused" else 70_000
    options = {"device": "cuda", "dtype": torch.bfloat16}
    buffer = torch.randn(tokens, 36, 128, **options)
    q, k, v = buffer.split([28, 4, 4], 1)
    gates = torch.rand(64, 28, 3, **options)
    cu_q, cu_k = cumulative([64], "cuda"), cumulative([tokens], "cuda")
    q = q[-64:]
    got = kernels.nsa_attention(q, k, v, gates, cu_q, cu_k, **case.sizes)
    copies = [x.contiguous() for x in (q, k, v)]
    assert torch.equal(got, kernels.nsa_attention(*copies, gates, cu_q, cu_k, **case.sizes))
    wanted = reference.nsa_attention(*copies, gates, cu_q, cu_k, **case.sizes).double()
    # The two may choose differently where scores tie; few do.
    error = ((got.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median()
    assert error < 1e-2
    if layout == "contiguous":  # every query at once, against the last ones alone
        q = buffer[:, :28].contiguous()
        gates = gates[:1].expand(tokens, 28, 3)
        whole = kernels.nsa_attention(q, k, v, gates, cu_k, cu_k, **case.sizes)
        few = kernels.nsa_attention(q[-64:], k, v, gates[-64:], cu_q, cu_k, **case.sizes)
        error = (whole[-64:].double() - few.double()).norm() / few.double().norm()
        assert error < 1e-2


@gpu
def test_a_layer_never_waits_for_the_device_nor_compiles_for_a_length():
    def step(lengths):
        *tensors, cu_q, cu_k = packed(full(lengths), torch.bfloat16, device="cuda")
        tensors = [x.requires_grad_() for x in tensors]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            o = kernels.nsa_attention(*tensors, cu_q, cu_k, **full(lengths).sizes)
            torch.autograd.grad(o, tensors, torch.ones_like(o))
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def compiled():
        modules = [sys.modules[x] for x in sys.modules if x.startswith("videonsa.nsa_kernels")]
        functions = {id(f): f for m in modules for f in vars(m).values()}
        caches = [f.device_caches for f in functions.values() if hasattr(f, "device_caches")]
        return sum(len(cache[0]) for per_device in caches for cache in per_device.values())

    step((9000, 77))
    before = compiled()
    for lengths in ((9001,), (8961, 1, 30), (9216,), (8999, 0)):
        step(lengths)
    assert compiled() == before


def test_the_functions_are_those_of_the_reference():
    assert sorted(kernels.__all__) == sorted([*FUNCTIONS, "decode_attention"])
    for name in kernels.__all__:
        theirs = inspect.signature(getattr(reference, name))
        assert inspect.signature(getattr(kernels, name)) == theirs, name


@sizes(
    ("change", "message"),
    [
        ({"head_dim": 24}, "head sizes"),
        ({"block_size": 24}, "powers of two"),
        ({"block_size": 4}, "powers of two"),
        ({"dtype": torch.float64}, "dtypes are"),
        ({"gates": torch.zeros(9, 14)}, "gates has shape"),
    ],
)
def test_what_the_kernels_cannot_do_is_named(change, message):
    dtype = change.pop("dtype", torch.float32)
    gates = change.pop("gates", None)
    case = tiny((9,), **change)
    *tensors, cu_q, cu_k = packed(case, dtype, device=DEVICE)
    if gates is not None:
        tensors[3] = gates
    with pytest.raises(ValueError, match=message):
        kernels.nsa_attention(*tensors, cu_q, cu_k, **case.sizes)


def test_tensors_of_different_dtypes_are_refused():
    q, k, v, gates, cu_q, cu_k = packed(tiny((9,)), torch.float32, device=DEVICE)
    with pytest.raises(ValueError, match="dtypes are torch.float16, torch.float32, torch.float32"):
        kernels.nsa_attention(q.half(), k, v, gates, cu_q, cu_k, **tiny((9,)).sizes)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
sys.path.insert(0, sys.argv[1])
import torch
from videonsa.nsa_kernels import compress_blocks
x = torch.zeros(4, 1, 16)
try:
    compress_blocks(x, x, torch.tensor([0, 4]), block_size=8)
except ImportError as error:
    assert "pip install triton" in str(error) and "nsa_backend" in str(error)
else:
    raise SystemExit("no error")
"""


def test_without_triton_the_import_works_and_the_first_call_advises():
    tools = str(ROOT / "tools")
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON, tools], check=True)
