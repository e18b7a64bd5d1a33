"""The reference against a brute-force loop over tokens, and the invariants of the attention."""

from dataclasses import replace

import pytest
import torch
from videonsa import nsa_reference as nsa

from numerics import (
    FUNCTIONS,
    WRONG_LENGTHS,
    Case,
    assert_a_sample_of_one_token_sees_itself,
    assert_as_many_means_as_whole_blocks,
    assert_no_queries_give_zero_gradients,
    assert_unused_means_get_no_gradient,
    assert_wrong_lengths_are_refused,
    cumulative,
    packed,
)

GROUPS = [(4, 4), (14, 2), (16, 2), (16, 1)]  # G = 1, 7, 8, 16
LENGTHS = [(1,), (15,), (16,), (17,), (63,), (64, 65), (130, 1, 47)]
CASES = [
    *(Case(lengths) for lengths in LENGTHS),
    *(Case((65, 40), heads, kv_heads, note=f"G{heads // kv_heads}") for heads, kv_heads in GROUPS),
    Case((100, 37), cached=30),
    Case((70, 90), num_initial=1, num_local=2, note="forced"),
    Case((40,), block_size=1, window_size=1, num_selected=1, note="ones"),
    Case((0, 70, 0, 33, 0), note="empty"),
]


def brute_force(q, k, v, gates, cu_q, cu_k, case):
    """Token by token, head by head: the text of the definition and nothing else."""
    heads, kv_heads, block = case.heads, case.kv_heads, case.block_size
    group, scale = heads // kv_heads, q.shape[-1] ** -0.5
    rows, choices = [], []

    def attend(query, keys, values):
        if not len(keys):
            return torch.zeros_like(query)
        return torch.softmax(keys @ query * scale, dim=0) @ values

    for s in range(len(cu_q) - 1):
        keys, values = k[cu_k[s] : cu_k[s + 1]], v[cu_k[s] : cu_k[s + 1]]
        first = len(keys) - int(cu_q[s + 1] - cu_q[s])
        for row in range(int(cu_q[s]), int(cu_q[s + 1])):
            j = first + row - int(cu_q[s])
            own = j // block
            row_out, row_choice = [], []
            for g in range(kv_heads):
                complete = (j + 1) // block
                k_mean = keys[: complete * block, g].reshape(complete, block, case.head_dim).mean(1)
                v_mean = (
                    values[: complete * block, g].reshape(complete, block, case.head_dim).mean(1)
                )
                members = range(g * group, (g + 1) * group)
                importance = [0.0] * complete
                for h in members:
                    if complete:
                        p = torch.softmax(k_mean @ q[row, h] * scale, dim=0).tolist()
                        importance = [a + b for a, b in zip(importance, p, strict=True)]
                forced = {i for i in range(own + 1) if i < case.num_initial}
                forced |= {i for i in range(own + 1) if i > own - case.num_local}
                rest = [i for i in range(own) if i not in forced]
                rest.sort(key=lambda i, worth=importance: (-worth[i], i))
                blocks = sorted([*forced, *rest[: case.num_selected - len(forced)]])
                row_choice.append(blocks + [-1] * (case.num_selected - len(blocks)))
                tokens = [t for i in blocks for t in range(i * block, (i + 1) * block) if t <= j]
                near = slice(max(0, j - case.window_size + 1), j + 1)
                for h in members:
                    branches = (
                        attend(q[row, h], k_mean, v_mean),
                        attend(q[row, h], keys[tokens, g], values[tokens, g]),
                        attend(q[row, h], keys[near, g], values[near, g]),
                    )
                    weighted = zip(gates[row, h], branches, strict=True)
                    row_out.append(sum(gate * branch for gate, branch in weighted))
            rows.append(torch.stack(row_out))
            choices.append(row_choice)
    return torch.stack(rows), torch.tensor(choices, dtype=torch.int32)


def choose(q, k, v, cu_q, cu_k, case):
    """The blocks that the reference selects."""
    k_cmp, v_cmp = nsa.compress_blocks(k, v, cu_k, block_size=case.block_size)
    _, lse = nsa.compressed_attention(q, k_cmp, v_cmp, cu_q, cu_k, block_size=case.block_size)
    sizes = {key: value for key, value in case.sizes.items() if key != "window_size"}
    return nsa.select_blocks(q, k_cmp, lse, cu_q, cu_k, **sizes)


def dense(q, k, v, gates_unused, cu_q, cu_k):
    """Causal attention within each sample, every query's position being its own."""
    counts = (cu_q.diff(), cu_k.diff())
    positions = torch.cat([torch.arange(n) + (m - n) for n, m in zip(*counts, strict=True)])
    return nsa.dense_attention(q, k, v, positions, cu_q, cu_k)


@pytest.mark.parametrize("chunk", [nsa.CHUNK_ELEMENTS, 3000], ids=["whole", "chunked"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_choice_and_gradients_equal_the_loop(case, chunk, monkeypatch):
    monkeypatch.setattr(nsa, "CHUNK_ELEMENTS", chunk)
    *tensors, cu_q, cu_k = packed(case)
    for tensor in tensors:
        tensor.requires_grad_()
    expected, expected_choice = brute_force(*tensors, cu_q, cu_k, case)
    actual = nsa.nsa_attention(*tensors, cu_q, cu_k, **case.sizes)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    assert torch.equal(choose(*tensors[:3], cu_q, cu_k, case), expected_choice)

    toward = torch.randn(expected.shape, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * toward).sum(), tensors)
    got = torch.autograd.grad((actual * toward).sum(), tensors)
    for name, a, b in zip(("dq", "dk", "dv", "dgates"), got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 65])
def test_selecting_every_block_is_dense(length, heads, kv_heads):
    case = Case((length,), heads, kv_heads, num_selected=8)
    q, k, v, gates, cu_q, cu_k = packed(case)
    gates[:] = torch.tensor([0.0, 1.0, 0.0])
    actual = nsa.nsa_attention(q, k, v, gates, cu_q, cu_k, **case.sizes)
    torch.testing.assert_close(actual, dense(q, k, v, gates, cu_q, cu_k), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 65])
def test_a_window_over_everything_is_dense(length, heads, kv_heads):
    case = Case((length, 20), heads, kv_heads, window_size=65)
    q, k, v, gates, cu_q, cu_k = packed(case)
    gates[:] = torch.tensor([0.0, 0.0, 1.0])
    actual = nsa.nsa_attention(q, k, v, gates, cu_q, cu_k, **case.sizes)
    torch.testing.assert_close(actual, dense(q, k, v, gates, cu_q, cu_k), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
@pytest.mark.parametrize("token", [15, 16, 17, 63, 64])
def test_the_past_does_not_see_the_future(token, heads, kv_heads):
    case = Case((97,), heads, kv_heads)
    *tensors, cu_q, cu_k = packed(case)
    before = nsa.nsa_attention(*tensors, cu_q, cu_k, **case.sizes)
    for tensor in tensors[:3]:
        tensor[token:] += 7.0
    after = nsa.nsa_attention(*tensors, cu_q, cu_k, **case.sizes)
    assert torch.equal(before[:token], after[:token])
    assert (before[token:] - after[token:]).abs().amax((1, 2)).min() > 0


def test_a_given_scale_is_that_of_the_scores():
    """In place of 16 ** -0.5."""
    q, k, v, gates, cu_q, cu_k = packed(Case((70,)))
    plain = nsa.nsa_attention(2 * q, k, v, gates, cu_q, cu_k, **Case((70,)).sizes)
    scaled = nsa.nsa_attention(q, k, v, gates, cu_q, cu_k, **Case((70,)).sizes, scale=0.5)
    torch.testing.assert_close(plain, scaled, atol=1e-13, rtol=0)


def test_samples_do_not_touch_each_other():
    case = Case((70, 33, 90))
    *tensors, cu_q, cu_k = packed(case)
    together = nsa.nsa_attention(*tensors, cu_q, cu_k, **case.sizes)
    for start, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        alone = cumulative([end - start])
        rows = [tensor[start:end] for tensor in tensors]
        actual = nsa.nsa_attention(*rows, alone, alone, **case.sizes)
        torch.testing.assert_close(actual, together[start:end], atol=1e-13, rtol=0)


def test_cached_queries_equal_the_last_of_the_whole():
    case = Case((100,))
    q, k, v, gates, cu_q, cu_k = packed(case)
    whole = nsa.nsa_attention(q, k, v, gates, cu_q, cu_k, **case.sizes)
    for first in (1, 16, 50, 99):
        part = nsa.nsa_attention(
            q[first:], k, v, gates[first:], cumulative([100 - first]), cu_k, **case.sizes
        )
        torch.testing.assert_close(part, whole[first:], atol=1e-13, rtol=0)


def test_a_group_shares_one_choice_that_every_head_has_a_say_in():
    """The importance is the sum over the heads: a head alone would choose otherwise."""
    case = Case((200,), num_selected=2)
    q, k, v, _, cu_q, cu_k = packed(case)
    together = choose(q, k, v, cu_q, cu_k, case)
    assert together.shape == (200, 2, 2)
    alone = choose(q[:, [0, 7]], k, v, cu_q, cu_k, replace(case, heads=2))
    assert not torch.equal(together, alone)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_importances_go_to_the_lower_index(dtype):
    case = Case((16 * 21 + 5,), num_selected=4)
    q, k, v, _, cu_q, cu_k = packed(case, dtype)
    k[:] = k[:1]
    choice = choose(q, k, v, cu_q, cu_k, case)
    for j, row in enumerate(choice[:, 0].tolist()):
        own = j // 16
        wanted = [*range(min(3, own)), own]
        assert row == wanted + [-1] * (4 - len(wanted))


def test_unused_slots_may_come_first():
    case = Case((70,))
    q, k, v, _, cu_q, cu_k = packed(case)
    choice = choose(q, k, v, cu_q, cu_k, case)
    turned = choice.flip(-1)
    assert (turned[:16, :, 0] == -1).all()
    expected = nsa.selected_attention(q, k, v, choice, cu_q, cu_k, block_size=16)
    actual = nsa.selected_attention(q, k, v, turned, cu_q, cu_k, block_size=16)
    torch.testing.assert_close(actual, expected, atol=1e-13, rtol=0)


def test_empty_samples_change_nothing():
    q, k, v, gates, cu, _ = packed(Case((70, 130)))
    padded = torch.tensor([0, 0, 70, 70, 200, 200], dtype=torch.int32)
    sizes = Case((1,)).sizes
    expected = nsa.nsa_attention(q, k, v, gates, cu, cu, **sizes)
    assert torch.equal(nsa.nsa_attention(q, k, v, gates, padded, padded, **sizes), expected)


def test_without_a_complete_block_the_compressed_branch_is_zero_and_passes_no_gradient():
    case = Case((15, 3))
    q, k, v, _, cu_q, cu_k = packed(case)
    for tensor in (q, k, v):
        tensor.requires_grad_()
    k_cmp, v_cmp = nsa.compress_blocks(k, v, cu_k, block_size=16)
    o, lse = nsa.compressed_attention(q, k_cmp, v_cmp, cu_q, cu_k, block_size=16)
    assert (o == 0).all() and (lse == torch.inf).all()
    o.sum().backward()
    assert all(x.grad is None or (x.grad == 0).all() for x in (q, k, v))


def test_no_tokens_at_all():
    case = Case((0,))
    *tensors, cu_q, cu_k = packed(case)
    assert nsa.nsa_attention(*tensors, cu_q, cu_k, **case.sizes).shape == (0, 14, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_stays_near_float64(dtype):
    case = Case((150, 70))
    *tensors, cu_q, cu_k = packed(case, dtype)
    exact = nsa.nsa_attention(*(x.double() for x in tensors), cu_q, cu_k, **case.sizes)
    actual = nsa.nsa_attention(*tensors, cu_q, cu_k, **case.sizes)
    assert actual.dtype == dtype
    error = (actual.double() - exact).norm() / exact.norm()
    assert error < 2 * torch.finfo(dtype).eps


def test_memory_does_not_grow_with_the_square_of_the_length(monkeypatch):
    """No intermediate has a number for every pair of a query and a key."""
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    monkeypatch.setattr(nsa, "CHUNK_ELEMENTS", 2**15)
    case = Case((2000,), heads=2, kv_heads=2)
    *tensors, cu_q, cu_k = packed(case)
    with Watch(), torch.no_grad():
        nsa.nsa_attention(*tensors, cu_q, cu_k, **case.sizes)
    assert largest < 2000 * 2000 / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(9, 3, 16), "v": torch.zeros(9, 3, 16)}, "14 query heads cannot share 3"),
        ({"v": torch.zeros(9, 2, 8)}, "q, k and v have shapes"),
        ({"gates": torch.zeros(9, 14)}, "gates has shape"),
        ({"cu_seqlens_k": torch.tensor([0, 4, 9])}, "cu_seqlens_q and cu_seqlens_k have"),
        (
            {
                "k": torch.zeros(5, 2, 16),
                "v": torch.zeros(5, 2, 16),
                "cu_seqlens_k": torch.tensor([0, 5]),
            },
            "9 queries but 5 keys",
        ),
    ],
)
def test_wrong_shapes_are_named(change, message):
    names = ("q", "k", "v", "gates", "cu_seqlens_q", "cu_seqlens_k")
    arguments = dict(zip(names, packed(Case((9,)), torch.float32), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        nsa.nsa_attention(**arguments, **Case((9,)).sizes)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("compress_blocks", {"v": torch.zeros(9, 2, 8)}, "k and v have shapes"),
        ("select_blocks", {"lse": torch.zeros(9, 7)}, "lse has shape"),
        ("selected_attention", {"blocks": torch.zeros(9, 1, 3).int()}, "blocks has shape"),
        ("dense_attention", {"positions": torch.zeros(8).int()}, "positions has shape"),
    ],
)
def test_wrong_shapes_of_the_parts_are_named(name, change, message):
    """Also too few means for the lengths, which another block size would give."""
    q, k, v, _, cu_q, cu_k = packed(Case((9,)), torch.float32)
    arguments = {
        "compress_blocks": {"k": k, "v": v},
        "select_blocks": {"q": q, "k_cmp": k[:1], "lse": torch.zeros(9, 14)},
        "selected_attention": {"q": q, "k": k, "v": v, "blocks": torch.zeros(9, 2, 3).int()},
        "dense_attention": {"q": q, "k": k, "v": v, "positions": torch.zeros(9).int()},
    }[name]
    arguments |= {"cu_seqlens_k": cu_k}
    if name != "compress_blocks":
        arguments["cu_seqlens_q"] = cu_q
    sizes = {} if name == "dense_attention" else {"block_size": 8}
    sizes |= {"num_selected": 3} if name == "select_blocks" else {}
    getattr(nsa, name)(**arguments, **sizes)
    with pytest.raises(ValueError, match=message):
        getattr(nsa, name)(**arguments | change, **sizes)


def test_means_of_another_block_size_are_refused():
    q, k, v, _, cu_q, cu_k = packed(Case((9,)), torch.float32)
    for block_size, means in ((4, 1), (16, 1)):
        with pytest.raises(ValueError, match=f"has 1 means of {block_size} tokens"):
            nsa.compressed_attention(q, k[:means], v[:means], cu_q, cu_k, block_size=block_size)


@pytest.mark.parametrize("kind", WRONG_LENGTHS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_lengths_that_do_not_fit_are_refused(name, kind):
    assert_wrong_lengths_are_refused(nsa, name, kind)


@pytest.mark.parametrize("name", [x for x in FUNCTIONS if x.endswith("attention")])
def test_no_queries_give_zero_gradients(name):
    assert_no_queries_give_zero_gradients(nsa, name)


def test_there_are_as_many_means_as_whole_blocks():
    assert_as_many_means_as_whole_blocks(nsa)


def test_unused_means_get_no_gradient():
    assert_unused_means_get_no_gradient(nsa)


def test_a_sample_of_one_token_sees_itself():
    assert_a_sample_of_one_token_sees_itself(nsa)
