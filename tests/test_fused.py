"""The fused functions against the stock expressions: at most twice their error, gradients too."""

import copy

import pytest
import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as stock
from videonsa import fused_videonsa as fused

from numerics import assert_as_accurate


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Runs the kernels wherever Triton does, interpreted on the CPU too."""
    monkeypatch.setattr(
        fused, "_runs_fused", lambda *tensors: all(x.dtype != torch.float64 for x in tensors)
    )


def numbers(*shape, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)


def stock_rms_norm(x, weight, eps):
    norm = stock.Qwen2_5_VLRMSNorm(len(weight), eps)
    del norm.weight
    norm.weight = weight
    if x.dtype == torch.float64:  # the module itself would round to float32
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return norm(x)


def stock_add_rms_norm(x, residual, weight, eps):
    total = residual + x
    return total, stock_rms_norm(total, weight, eps)


def stock_swiglu(gate, up):
    return torch.nn.functional.silu(gate) * up


def stock_halves(gate_up):
    return stock_swiglu(*gate_up.chunk(2, dim=-1))


def stock_rotary(query, key, cos, sin):
    axis = 1 if query.ndim == 4 else -2
    if cos.dtype == torch.float32 and query.dtype != torch.float64:  # as the vision tower does it
        states = query.float(), key.float()
        wide = stock.apply_rotary_pos_emb(*states, cos, sin, unsqueeze_dim=axis)
        return tuple(x.to(query.dtype) for x in wide)
    return stock.apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim=axis)


def check(function, expression, inputs, dtype, constants=()):
    """`function` is as accurate as the stock `expression`, both against float64."""

    def run(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        fixed = [
            x.to(torch.float64 if dtype == torch.float64 else x.dtype)
            if isinstance(x, torch.Tensor)
            else x
            for x in constants
        ]
        outputs = function(*leaves, *fixed)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        uppers = [
            numbers(*output.shape, seed=9 + index, device=output.device).to(dtype)
            for index, output in enumerate(outputs)
        ]
        return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, uppers)]

    inputs = [x.to(dtype).double() for x in inputs]
    results = zip(
        run(function, dtype), run(expression, dtype), run(expression, torch.float64), strict=True
    )
    for index, (actual, eager, exact) in enumerate(results):
        assert actual.dtype == eager.dtype and actual.shape == eager.shape
        assert_as_accurate(f"tensor {index}", actual, eager, exact)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


@DTYPES
@pytest.mark.parametrize("shape", [(3, 5, 48), (1, 64)], ids=str)
def test_rms_norm(shape, dtype):
    check(
        lambda x, weight: fused.rms_norm(x, weight, 1e-6),
        lambda x, weight: stock_rms_norm(x, weight, 1e-6),
        [numbers(*shape) * 3, numbers(shape[-1], seed=1)],
        dtype,
    )


@DTYPES
@pytest.mark.parametrize("shape", [(3, 5, 48), (1, 64)], ids=str)
def test_add_rms_norm(shape, dtype):
    check(
        lambda *x: fused.add_rms_norm(*x, 1e-6),
        lambda *x: stock_add_rms_norm(*x, 1e-6),
        [numbers(*shape) * 3, numbers(*shape, seed=2), numbers(shape[-1], seed=1)],
        dtype,
    )


def test_add_rms_norm_rounds_the_sum_as_stock_does():
    x, residual = numbers(4, 16).half(), (numbers(4, 16, seed=2) * 300).half()
    weight = numbers(16, seed=1).half()
    got, wanted = (f(x, residual, weight, 1e-6) for f in (fused.add_rms_norm, stock_add_rms_norm))
    assert torch.equal(got[0], wanted[0])
    torch.testing.assert_close(got[1], wanted[1])


@pytest.mark.parametrize("used", [0, 1], ids=["sum alone", "norm alone"])
def test_add_rms_norm_where_one_of_its_outputs_is_unused(used):
    check(
        lambda *x: fused.add_rms_norm(*x, 1e-6)[used],
        lambda *x: stock_add_rms_norm(*x, 1e-6)[used],
        [numbers(3, 24), numbers(3, 24, seed=2)],
        torch.float32,
        constants=[numbers(24, seed=1).float()],
    )


def test_add_rms_norm_of_views_and_of_two_dtypes():
    x, residual = numbers(6, 40).float()[:, 4:28], numbers(24, 6, seed=2).float().T
    weight = numbers(24, seed=1).float()
    for other in (residual, residual[:1], residual.half()):
        got, wanted = (f(x, other, weight, 1e-6) for f in (fused.add_rms_norm, stock_add_rms_norm))
        torch.testing.assert_close(got, wanted)


def test_no_rows():
    x = torch.zeros(0, 16, requires_grad=True)
    table, heads = torch.zeros(0, 8), x.view(0, 2, 8)
    for y in (
        fused.rms_norm(x, torch.ones(16), 1e-6),
        torch.cat(fused.add_rms_norm(x, x, torch.ones(16), 1e-6)),
        fused.swiglu_halves(x),
        torch.cat(fused.rotary(heads, heads, table, table)),
    ):
        assert not len(y) and torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_rms_norm_of_more_rows_than_programs(monkeypatch):
    monkeypatch.setattr(fused, "WEIGHT_GRADIENT_PROGRAMS", 4)
    check(
        lambda x, weight: fused.rms_norm(x, weight, 1e-6),
        lambda x, weight: stock_rms_norm(x, weight, 1e-6),
        [numbers(11, 24), numbers(24, seed=1)],
        torch.float32,
    )


def test_rms_norm_with_a_wider_weight_gives_what_stock_gives():
    x, weight = numbers(4, 16).half(), numbers(16, seed=1).float()
    actual, expected = fused.rms_norm(x, weight, 1e-6), stock_rms_norm(x, weight, 1e-6)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected)


def test_rms_norm_of_a_view_and_a_frozen_weight():
    x = numbers(6, 40).float()[:, 4:28].requires_grad_()
    weight = numbers(24, seed=1).float()
    (actual,) = torch.autograd.grad(fused.rms_norm(x, weight, 1e-6).pow(2).sum(), x)
    (expected,) = torch.autograd.grad(stock_rms_norm(x, weight, 1e-6).pow(2).sum(), x)
    torch.testing.assert_close(actual, expected)


@DTYPES
def test_swiglu(dtype, monkeypatch):
    monkeypatch.setattr(fused, "SWIGLU_COLUMNS", 16)  # several programs a row
    inputs = [numbers(2, 3, 40) * 3, numbers(2, 3, 40, seed=1)]
    check(fused.swiglu, stock_swiglu, inputs, dtype)


@DTYPES
def test_swiglu_of_the_halves_of_one_matrix(dtype):
    check(fused.swiglu_halves, stock_halves, [numbers(5, 44) * 3], dtype)
    gate_up = numbers(5, 44).to(dtype)
    views = fused.swiglu(gate_up[:, :22], gate_up[:, 22:])
    torch.testing.assert_close(views, fused.swiglu_halves(gate_up), rtol=0, atol=0)


@DTYPES
@pytest.mark.parametrize("wide", [False, True], ids=["model-dtype", "float32"])
@pytest.mark.parametrize("layout", ["tokens", "batch"])
def test_rotary(layout, wide, dtype):
    table = torch.float32 if wide else dtype
    if layout == "tokens":
        inputs, angles = [numbers(7, 3, 20), numbers(7, 1, 20, seed=2)], numbers(7, 20, seed=1)
    else:
        inputs, angles = [numbers(2, 5, n, 20, seed=n) for n in (3, 2)], numbers(2, 5, 20, seed=1)
    # Halves that differ: a backward pass that takes the wrong one must fail.
    cos, sin = angles.cos().to(table), angles.sin().to(table)

    def of(function):
        def call(query, key, cos, sin):
            states = [x if layout == "tokens" else x.transpose(1, 2) for x in (query, key)]
            return function(*states, cos, sin)

        return call

    check(of(fused.rotary), of(stock_rotary), inputs, dtype, constants=[cos, sin])


def test_rotary_of_parts_of_a_fused_projection_and_one_table_for_a_batch():
    qkv = numbers(6, 3, 2, 16).float()
    angles = numbers(6, 16, seed=1).float()
    expected = stock_rotary(
        qkv[:, 0].contiguous(), qkv[:, 1].contiguous(), angles.cos(), angles.sin()
    )
    actual = fused.rotary(qkv[:, 0], qkv[:, 1], angles.cos(), angles.sin())
    torch.testing.assert_close(actual, expected)
    query, key = numbers(2, 4, 6, 16).float(), numbers(2, 1, 6, 16, seed=2).float()
    cos, sin = angles.cos()[None], angles.sin()[None]
    actual = fused.rotary(query, key, cos, sin)
    torch.testing.assert_close(actual, stock_rotary(query, key, cos, sin))
    assert all(x.transpose(1, 2).is_contiguous() for x in actual)


def test_plain_expressions_are_the_stock_ones(monkeypatch):
    monkeypatch.setattr(fused, "_runs_fused", lambda *tensors: False)
    x, weight = numbers(3, 16).bfloat16(), numbers(16, seed=1).bfloat16()
    assert torch.equal(fused.rms_norm(x, weight, 1e-6), stock_rms_norm(x, weight, 1e-6))
    sums = zip(
        fused.add_rms_norm(x, 2 * x, weight, 1e-6),
        stock_add_rms_norm(x, 2 * x, weight, 1e-6),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in sums)
    assert torch.equal(fused.swiglu_halves(x), stock_halves(x))
    heads = x.view(3, 2, 8)
    for dtype in (torch.bfloat16, torch.float32):
        cos, sin = (weight[:8].expand(3, 8).to(dtype) * k for k in (1, 2))
        turned = zip(
            fused.rotary(heads, heads[:, :1], cos, sin),
            stock_rotary(heads, heads[:, :1], cos, sin),
            strict=True,
        )
        assert all(torch.equal(a, b) for a, b in turned)


def test_modules_keep_the_stock_parameters_and_results():
    config = stock.Qwen2_5_VLConfig().text_config
    config.hidden_size, config.intermediate_size = 16, 24
    for theirs, ours in (
        (stock.Qwen2MLP(config), fused.VideoNSAMLP(config)),
        (stock.Qwen2_5_VLRMSNorm(16), fused.VideoNSARMSNorm(16)),
    ):
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        x = numbers(2, 3, 16).float()
        torch.testing.assert_close(ours(x), theirs(x))
    total, normed = ours(x, 2 * x)
    torch.testing.assert_close(total, 3 * x)
    torch.testing.assert_close(normed, theirs(3 * x))


def test_very_many_tokens_learn_in_tiles(monkeypatch):
    config = stock.Qwen2_5_VLConfig().text_config
    config.hidden_size, config.intermediate_size = 16, 24
    mlp, results, calls = fused.VideoNSAMLP(config), [], []
    mlp.down_proj.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    for limit in (100, 7):
        monkeypatch.setattr(fused, "TILED_FROM", limit)
        monkeypatch.setattr(fused, "TILE", 3)
        x = numbers(2, 4, 16).float().requires_grad_()
        y = mlp(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in mlp.parameters())])
        mlp.zero_grad()
    torch.testing.assert_close(*results)
    assert calls == [2, 3, 3, 2]


def test_mlp_under_an_adapter():
    from peft import LoraConfig, inject_adapter_in_model

    config = stock.Qwen2_5_VLConfig().text_config
    config.hidden_size, config.intermediate_size = 16, 24
    mlp = fused.VideoNSAMLP(config)
    x = numbers(3, 16).float()
    before = mlp(x)
    names = ["gate_proj", "up_proj", "down_proj"]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=names, init_lora_weights=False), mlp)
    after = mlp(x)
    assert not torch.allclose(before, after)
    after.sum().backward()
    assert all(p.grad is not None for name, p in mlp.named_parameters() if "lora" in name)


@pytest.mark.gpu
@pytest.mark.parametrize("rows, features", [(4097, 1280), (4097, 3584), (1, 3584)])
def test_rms_norm_at_real_sizes(rows, features):
    check(
        lambda x, weight: fused.rms_norm(x, weight, 1e-6),
        lambda x, weight: stock_rms_norm(x, weight, 1e-6),
        [numbers(rows, features, device="cuda"), numbers(features, seed=1, device="cuda")],
        torch.bfloat16,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("rows, features", [(4097, 1280), (4097, 3584), (1, 3584)])
def test_add_rms_norm_at_real_sizes(rows, features):
    check(
        lambda *x: fused.add_rms_norm(*x, 1e-6),
        lambda *x: stock_add_rms_norm(*x, 1e-6),
        [numbers(rows, features, seed=seed, device="cuda") for seed in (0, 2)]
        + [numbers(features, seed=1, device="cuda")],
        torch.bfloat16,
    )


@pytest.mark.gpu
def test_a_recorded_graph_runs_small_tensors_through_the_kernels(monkeypatch):
    """One launch for a norm, not the two or more of torch; outside, the choice is as before."""
    monkeypatch.undo()
    x, weight = (numbers(n, device="cuda").bfloat16() for n in (3584, 3584))
    x = x[None]
    eager = fused.add_rms_norm(x, x, weight, 1e-6)
    with fused.recorded_launches():
        assert fused._runs_fused(x)
        fused.add_rms_norm(x, x, weight, 1e-6)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = fused.add_rms_norm(x, x, weight, 1e-6)
    assert not fused._runs_fused(x)
    graph.replay()
    torch.testing.assert_close(recorded, eager)


@pytest.mark.gpu
def test_few_rows_of_rms_norm(monkeypatch):
    monkeypatch.undo()
    inputs = [numbers(3, 3584, device="cuda"), numbers(3584, seed=1, device="cuda")]
    assert not fused._runs_fused(*inputs)
    check(
        lambda x, weight: fused.rms_norm(x, weight, 1e-6),
        lambda x, weight: stock_rms_norm(x, weight, 1e-6),
        inputs,
        torch.bfloat16,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [3420, 3456, 18944])
def test_swiglu_at_real_sizes(columns):
    gate_up = numbers(2051, 2 * columns, device="cuda")
    check(fused.swiglu, stock_swiglu, list(gate_up.chunk(2, dim=1)), torch.bfloat16)
    check(fused.swiglu_halves, stock_halves, [gate_up], torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("heads, features, table", [(16, 80, torch.float32)])
def test_vision_rotary_at_real_sizes(heads, features, table):
    angles = numbers(4099, features, seed=1, device="cuda") * 30
    check(
        fused.rotary,
        stock_rotary,
        [numbers(4099, heads, features, seed=seed, device="cuda") for seed in (0, 2)],
        torch.bfloat16,
        constants=[angles.cos().to(table), angles.sin().to(table)],
    )


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(28, 4), (4, 4)])
def test_text_rotary_at_real_sizes(heads):
    angles = numbers(1, 4099, 128, seed=1, device="cuda") * 30
    check(
        fused.rotary,
        stock_rotary,
        [numbers(1, n, 4099, 128, seed=n, device="cuda") for n in heads],
        torch.bfloat16,
        constants=[angles.cos().bfloat16(), angles.sin().bfloat16()],
    )


@pytest.mark.gpu
def test_tiles_at_real_sizes(monkeypatch):
    monkeypatch.setattr(fused, "TILED_FROM", 1000)
    monkeypatch.setattr(fused, "TILE", 300)
    config = stock.Qwen2_5_VLConfig().text_config
    config.hidden_size, config.intermediate_size = 3584, 18944
    torch.manual_seed(0)
    eager = stock.Qwen2MLP(config).to("cuda", torch.bfloat16)
    mlp = fused.VideoNSAMLP(config).to("cuda", torch.bfloat16)
    mlp.load_state_dict(eager.state_dict())
    results, calls = [], []
    mlp.down_proj.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    for module in (mlp, eager, copy.deepcopy(eager).double()):
        dtype = module.down_proj.weight.dtype
        x = numbers(1, 1001, 3584, device="cuda").bfloat16().to(dtype).requires_grad_()
        y = module(x)
        y.backward(numbers(*y.shape, seed=1, device="cuda").bfloat16().to(dtype))
        results.append([y.detach(), x.grad, *(p.grad for p in module.parameters())])
    for index, (actual, plain, exact) in enumerate(zip(*results, strict=True)):
        assert_as_accurate(f"tensor {index}", actual, plain, exact)
    assert calls[:4] == [300, 300, 300, 101]


@pytest.mark.gpu
def test_swiglu_past_2_to_the_31_elements():
    rows = 2**31 // 4096 + 3
    gate = torch.zeros(rows, 4096, dtype=torch.float16, device="cuda")
    up = torch.ones(1, 4096, dtype=torch.float16, device="cuda").expand(rows, 4096)
    gate[-1] = 1
    y = fused.swiglu(gate, up)
    assert not y[:-1].any() and torch.allclose(
        y[-1].float(), torch.tensor(0.731, device="cuda"), atol=1e-3
    )
