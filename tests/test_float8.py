"""Float8 products by the row: as accurate as plain casts, and only of layers of that kind."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as stock
from videonsa import attention_videonsa as attention
from videonsa import float8_videonsa as float8
from videonsa import fused_videonsa as fused

from numerics import assert_as_accurate
from tiny import make_model


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Runs the kernels wherever Triton does, interpreted on the CPU too.

    There they write float16, because the interpreter rounds to float8 wrongly, and PyTorch casts.
    """
    monkeypatch.setattr(float8, "_runs_fused", lambda x: True)
    if torch.cuda.is_available():
        return
    product = float8.float8_linear

    def empty(x):
        return float8.Float8Rows(torch.empty_like(x, dtype=torch.float16), torch.empty(len(x), 1))

    monkeypatch.setattr(float8, "_empty_rows", empty)
    monkeypatch.setattr(
        float8, "float8_linear", lambda layer, rows: product(layer, in_float8(rows))
    )


def in_float8(rows):
    return rows._replace(values=rows.values.to(torch.float8_e4m3fn))


class Float8Tensor(torch.Tensor):
    """Stands for torchao's class of that name, by the attributes that are read of it."""


def numbers(*shape, seed=0, device="cpu"):
    """Some features are thirty times as large as others, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    x[..., ::7] *= 30
    return x.to(device, torch.bfloat16)


def plain_cast(x):
    """float32 [N, D] that float8 rows of x can hold."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return (x.float() / scale).to(torch.float8_e4m3fn).float() * scale


def quantised(layer):
    """The layer with a weight as torchao has it."""
    whole = layer.weight.detach()
    scale = whole.float().abs().amax(1, keepdim=True) / 448
    layer.weight = nn.Parameter(whole.as_subclass(Float8Tensor), requires_grad=False)
    layer.weight.qdata = (whole.float() / scale).to(torch.float8_e4m3fn)
    layer.weight.scale = scale
    layer.weight.mm_config = SimpleNamespace(use_fast_accum=True)
    layer.weight.act_quant_kwargs = SimpleNamespace(
        float8_dtype=torch.float8_e4m3fn,
        granularity=type("PerRow", (), {})(),
        hp_value_lb=None,
        hp_value_ub=None,
    )
    return layer.requires_grad_(False)


def make_layer(inputs, outputs, bias=True, device="cpu"):
    torch.manual_seed(outputs)
    return quantised(nn.Linear(inputs, outputs, bias, device=device, dtype=torch.bfloat16))


def make_mlp(hidden, inner, device="cpu"):
    config = stock.Qwen2_5_VLConfig().text_config
    config.hidden_size, config.intermediate_size = hidden, inner
    torch.manual_seed(0)
    mlp = fused.VideoNSAMLP(config).to(device, torch.bfloat16)
    return mlp, [quantised(layer) for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]


def stands_for(rows):
    return rows.values.float() * rows.scale


def check_rows(actual, x):
    """As near to x float64 [N, D] as a plain cast; the largest of a row is the largest float8."""
    actual = in_float8(actual)
    assert_as_accurate("rows", stands_for(actual), plain_cast(x), x)
    largest = actual.values.float().abs().amax(1)
    assert ((largest == 448) | (x.abs().amax(1) == 0)).all()


@pytest.mark.parametrize("features", [16, 48, 320])
def test_rows_are_cast_by_their_largest(features):
    x = numbers(5, features)
    x[1] = 0
    check_rows(float8.cast_rows(x), x.double())
    assert not float8.cast_rows(x).values.float()[1].any()
    assert not len(float8.cast_rows(x[:0]).values)
    turned = numbers(features, 5).T
    assert torch.equal(
        *(stands_for(float8.cast_rows(view)) for view in (turned, turned.contiguous()))
    )


def test_without_kernels_rows_are_cast_alike(monkeypatch):
    monkeypatch.setattr(float8, "_runs_fused", lambda x: False)
    test_rows_are_cast_by_their_largest(48)
    test_swiglu_ends_in_float8(48)
    test_linears_are_as_accurate_as_plain_casts()


@pytest.mark.parametrize("columns", [16, 48, 320, 1024])
def test_swiglu_ends_in_float8(columns):
    gate, up = numbers(4, columns) / 10, numbers(4, columns, seed=1)
    up[1] = 0
    wanted = nn.functional.silu(gate.double()) * up.double()
    check_rows(float8.swiglu_rows(gate, up), wanted)
    assert not len(float8.swiglu_rows(gate[:0], up[:0]).values)


def check_linears(rows, hidden, outputs, device="cpu"):
    x = numbers(2, rows, hidden, device=device)
    x[0, 0] = 0
    layers = [make_layer(hidden, size, bias, device) for size, bias in outputs]
    assert all(float8.takes_float8(layer, x) for layer in layers)
    for layer, actual in zip(layers, float8.linears(x, *layers), strict=True):
        assert actual.shape == (2, rows, layer.out_features) and actual.dtype == torch.bfloat16
        bias = 0 if layer.bias is None else layer.bias.double()
        exact = x.double() @ layer.weight.as_subclass(torch.Tensor).double().T + bias
        weight = layer.weight.qdata.double() * layer.weight.scale.double()
        plain = plain_cast(x).double() @ weight.T + bias
        assert_as_accurate("product", actual, plain, exact)
        assert torch.equal(actual[0, 0], layer.bias if layer.bias is not None else 0 * actual[0, 0])


def test_linears_are_as_accurate_as_plain_casts():
    check_linears(3, 48, [(32, True), (64, False)])


def check_mlp(rows, hidden, inner, device="cpu"):
    mlp, layers = make_mlp(hidden, inner, device)
    x = numbers(1, rows, hidden, device=device) / 10
    weights = [layer.weight.as_subclass(torch.Tensor).double() for layer in layers]
    rounded = [layer.weight.qdata.double() * layer.weight.scale.double() for layer in layers]

    def run(x, gate, up, down, cast):
        x = cast(x).double()
        return cast(nn.functional.silu(x @ gate.T) * (x @ up.T)).double() @ down.T

    exact, plain = run(x, *weights, lambda x: x), run(x, *rounded, plain_cast)
    assert_as_accurate("MLP", mlp(x), plain, exact)


def test_the_mlp_hands_float8_over(monkeypatch):
    calls, product = [], float8.float8_linear
    monkeypatch.setattr(
        float8, "float8_linear", lambda layer, rows: calls.append(rows) or product(layer, rows)
    )
    check_mlp(5, 48, 80)
    assert len(calls) == 3 and calls[0] is calls[1]  # one cast for gate and up


def test_other_layers_are_called_as_they_are():
    x = numbers(3, 48)
    plain = nn.Linear(48, 32, dtype=torch.bfloat16)
    hooked, replaced, wrapped = make_layer(48, 32), make_layer(48, 32), make_layer(48, 32)
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    replaced.forward = lambda x: x + 1
    by_tensor, unscaled, bounded = make_layer(48, 32), make_layer(48, 32), make_layer(48, 32)
    by_tensor.weight.scale = torch.ones(1, 1)
    unscaled.weight.act_quant_kwargs = None
    bounded.weight.act_quant_kwargs.hp_value_ub = 3.0
    wrapped = nn.Sequential(wrapped)
    others = (plain, hooked, replaced, by_tensor, unscaled, bounded, wrapped)
    assert not any(float8.takes_float8(layer, x) for layer in others)
    fitting = make_layer(48, 32)
    assert float8.takes_float8(fitting, x)
    assert not float8.takes_float8(fitting, x.float())
    assert not float8.takes_float8(fitting, x.clone().requires_grad_())
    with torch.no_grad():
        assert float8.takes_float8(fitting, x.clone().requires_grad_())
    both = float8.linears(x, plain, plain)
    assert torch.equal(both[0], plain(x)) and torch.equal(both[1], plain(x))


def language_layers(model):
    """The linear layers of the language model, but for gates and head."""
    layers = model.model.language_model.named_modules()
    return [
        layer for name, layer in layers if isinstance(layer, nn.Linear) and ".g_proj_" not in name
    ]


@pytest.mark.parametrize("kind", ["video", "text"])
def test_the_language_model_hands_float8_over(kind, prompts, monkeypatch):
    """All of its layers but gates and head; padding, of which attention makes zeros, as well."""
    calls, product = [], float8.float8_linear
    monkeypatch.setattr(
        float8, "float8_linear", lambda layer, rows: calls.append(layer) or product(layer, rows)
    )
    model = make_model(4, 2, dtype=torch.bfloat16, head_dim=16)
    rows = [prompts.row(3, ("video", 3, 2, 4), 4) if kind == "video" else prompts.row(7)]
    inputs = prompts.batch(*rows, prompts.row(3))
    present = inputs["attention_mask"].bool()
    assert not present.all()
    layers = language_layers(model)
    assert len(layers) == 2 * 7
    with torch.no_grad():
        whole = model(**inputs).logits[present]
        for layer in layers:
            quantised(layer)
        seen = model(**inputs).logits[present]
    assert len(calls) == 2 * 7 and set(calls) == set(layers)
    assert 0 < (seen - whole).norm() / whole.norm() < 0.3


def test_text_attends_as_in_stock(prompts, monkeypatch):
    """By the path for float8, bit for bit, if layers are whole."""
    model, inputs = make_model(4, 2), prompts.batch(prompts.row(9), prompts.row(5))
    wanted = model.generate(**inputs, max_new_tokens=4, output_logits=True, **RETURNED)
    calls, dense = [], attention.VideoNSAAttention._forward_float8
    monkeypatch.setattr(attention, "takes_float8", lambda layer, x: True)
    monkeypatch.setattr(
        attention.VideoNSAAttention,
        "_forward_float8",
        lambda *arguments: calls.append(arguments) or dense(*arguments),
    )
    seen = model.generate(**inputs, max_new_tokens=4, output_logits=True, **RETURNED)
    assert len(calls) == 2 * 4
    assert all(torch.equal(*pair) for pair in zip(seen.logits, wanted.logits, strict=True))


RETURNED = {"return_dict_in_generate": True, "do_sample": False}


def torchao_layer(inputs, outputs, device="cpu"):
    workflow = pytest.importorskip(
        "torchao.quantization.quantize_.workflows.float8.float8_tensor", reason="needs torchao"
    )
    from torchao.float8.inference import Float8MMConfig

    asked = workflow.QuantizeTensorToFloat8Kwargs()
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, device=device, dtype=torch.bfloat16).requires_grad_(False)
    weight = workflow.Float8Tensor.from_hp(
        layer.weight, mm_config=Float8MMConfig(use_fast_accum=True), act_quant_kwargs=asked
    )
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def check_torchao(rows, hidden, outputs, device="cpu"):
    layer, x = torchao_layer(hidden, outputs, device), numbers(rows, hidden, device=device)
    assert float8.takes_float8(layer, x)
    (actual,) = float8.linears(x, layer)
    torch.testing.assert_close(actual, layer(x), rtol=0.1, atol=0.02 * float(actual.abs().max()))
    x[0] = 0
    assert torch.equal(float8.linears(x, layer)[0][0], layer.bias)


def test_torchao_s_layers_give_what_torchao_gives():
    check_torchao(4, 48, 64)


@pytest.mark.gpu
def test_rows_at_real_sizes():
    for features in (3584, 18944):
        x = numbers(2051, features, device="cuda")
        x[7] = 0
        check_rows(float8.cast_rows(x), x.double())
    gate, up = (numbers(515, 18944, seed=seed, device="cuda") / 5 for seed in (0, 1))
    exact = nn.functional.silu(gate.double()) * up.double()
    check_rows(float8.swiglu_rows(gate, up), exact)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 515])
def test_products_at_real_sizes(rows):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs float8 products")
    check_linears(rows, 3584, [(3584, True), (512, True), (18944, False)], "cuda")
    check_mlp(rows, 3584, 18944, "cuda")


@pytest.mark.gpu
def test_torchao_s_layers_at_real_sizes():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs float8 products")
    check_torchao(515, 3584, 3584, "cuda")
