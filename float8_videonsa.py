"""Products of float8 weights and activations, scaled by the row, as torchao stores the weights.

A layer takes part whose weight is torchao's `Float8Tensor` with activations quantised by the row
(`Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())`). Left to itself it quantises its
input in passes of its own over memory, and makes NaN of a row of zeros. Here one kernel finds the
scale of a row and casts it, once for all the layers that read it, and SwiGLU hands its result over
in float8. Elsewhere than on CUDA with Triton both are plain PyTorch. Other layers, also those under
hooks or adapters, in training or under torch.compile, are called as they are.

Shapes: N rows (tokens), D features, I intermediate features.
Numbers: float8_e4m3fn; a row's scale is its largest magnitude over 448, in float32.
"""

from typing import NamedTuple

import torch
from torch import nn

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
LEAST = 1e-12  # taken for the largest magnitude of a row of zeros
MAX_FEATURES = 32768  # of a row that one program keeps in registers


class Float8Rows(NamedTuple):
    """values float8 [N, D] and their scale float32 [N, 1], whose product is what they stand for."""

    values: torch.Tensor
    scale: torch.Tensor


def linears(x: torch.Tensor, *layers: nn.Module) -> list[torch.Tensor]:
    """What the layers give for x [..., D], which is cast to float8 once for all that take it so."""
    if not all(takes_float8(layer, x) for layer in layers):
        return [layer(x) for layer in layers]
    rows = cast_rows(x.reshape(-1, x.shape[-1]))
    return [float8_linear(layer, rows).view(*x.shape[:-1], -1) for layer in layers]


def down_of_swiglu(gate: torch.Tensor, up: torch.Tensor, down: nn.Module) -> torch.Tensor:
    """down(silu(gate) * up) for gate and up [..., I], if `takes_float8(down, gate)`."""
    rows = swiglu_rows(*(x.reshape(-1, x.shape[-1]) for x in (gate, up)))
    return float8_linear(down, rows).view(*gate.shape[:-1], -1)


def takes_float8(layer: nn.Module, x: torch.Tensor) -> bool:
    """Whether the layer is one of float8 by the row that nothing else has a hand in, and x fits."""
    weight = getattr(layer, "weight", None)
    if type(layer) is not nn.Linear or type(weight).__name__ != "Float8Tensor":
        return False
    return (
        x.device == weight.device
        and x.dtype == weight.dtype == torch.bfloat16
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
        and "forward" not in vars(layer)
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and _is_by_row(weight)
    )


def float8_linear(layer: nn.Linear, rows: Float8Rows) -> torch.Tensor:
    """[N, out_features] in bfloat16: the product by the layer's weight, plus its bias."""
    weight = layer.weight
    return torch._scaled_mm(
        rows.values,
        weight.qdata.t(),
        rows.scale,
        weight.scale.t(),
        bias=layer.bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=weight.mm_config.use_fast_accum,
    )


def cast_rows(x: torch.Tensor) -> Float8Rows:
    """x [N, D] in float8."""
    if not _runs_fused(x):
        return _plain_rows(x.float())
    x = x.contiguous()
    rows = _empty_rows(x)
    if len(x):
        with torch.cuda.device_of(x):
            block = triton.next_power_of_2(x.shape[1])
            _cast_rows[(len(x),)](
                x, *rows, x.shape[1], LEAST=LEAST, LARGEST=LARGEST, BLOCK=block, num_warps=8
            )
    return rows


def swiglu_rows(gate: torch.Tensor, up: torch.Tensor) -> Float8Rows:
    """silu(gate) * up in float8, for gate and up [N, I]."""
    if not _runs_fused(gate):
        return _plain_rows(nn.functional.silu(gate.float()) * up.float())
    gate, up = gate.contiguous(), up.contiguous()
    rows = _empty_rows(gate)
    columns = gate.shape[1]
    if len(gate):
        # A row as a power of two and what is left of it: fewer idle lanes than one larger power.
        first = triton.next_power_of_2(columns // 2 + 1)
        rest = triton.next_power_of_2(max(columns - first, 1))
        with torch.cuda.device_of(gate):
            _swiglu_rows[(len(gate),)](
                gate, up, *rows, columns, LEAST=LEAST, LARGEST=LARGEST, FIRST=first, REST=rest,
                num_warps=16,
            )  # fmt: skip
    return rows


def _runs_fused(x):
    """Whether the kernels take it."""
    return triton is not None and x.is_cuda and x.shape[-1] <= MAX_FEATURES


def _plain_rows(wide):
    scale = wide.abs().amax(1, keepdim=True).clamp(min=LEAST) / LARGEST
    return Float8Rows((wide / scale).to(FLOAT8), scale)


def _empty_rows(x):
    values = torch.empty(x.shape, dtype=FLOAT8, device=x.device)
    return Float8Rows(values, torch.empty(len(x), 1, dtype=torch.float32, device=x.device))


def _is_by_row(weight):
    """Whether torchao would quantise the input of this weight as `cast_rows` does."""
    asked = weight.act_quant_kwargs
    return (
        asked is not None
        and asked.float8_dtype == weight.qdata.dtype == FLOAT8
        and type(asked.granularity).__name__ == "PerRow"
        and asked.hp_value_lb is None
        and asked.hp_value_ub is None
        and weight.scale.shape == (len(weight.qdata), 1)
    )


if triton is not None:

    @triton.jit
    def _scale(largest, scale, row, LEAST: tl.constexpr, LARGEST: tl.constexpr):
        """What a row's values are multiplied by, whose largest magnitude this is; writes scale."""
        largest = tl.maximum(largest, LEAST)
        tl.store(scale + row, largest / LARGEST)
        return LARGEST / largest

    @triton.jit
    def _cast_rows(
        x, values, scale, columns, LEAST: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr
    ):
        """One row: reads x [N, D], writes values [N, D] and scale [N]."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < columns
        wide = tl.load(x + row * columns + column, inside, 0.0).to(tl.float32)
        factor = _scale(tl.max(tl.abs(wide), 0), scale, row, LEAST, LARGEST)
        target = values + row * columns + column
        tl.store(target, (wide * factor).to(values.dtype.element_ty), inside)

    @triton.jit
    def _activated(gate, up, offset, inside):
        """silu(gate) * up in float32."""
        wide = tl.load(gate + offset, inside, 0.0).to(tl.float32)
        other = tl.load(up + offset, inside, 0.0).to(tl.float32)
        return wide / (1.0 + tl.exp(-wide)) * other

    @triton.jit
    def _swiglu_rows(
        gate, up, values, scale, columns,
        LEAST: tl.constexpr, LARGEST: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    ):  # fmt: skip
        """One row, held as FIRST and REST columns: reads gate and up [N, I], writes values and
        scale [N].
        """
        row = tl.program_id(0).to(tl.int64)
        column, later = tl.arange(0, FIRST), FIRST + tl.arange(0, REST)
        first = _activated(gate, up, row * columns + column, column < columns)
        rest = _activated(gate, up, row * columns + later, later < columns)
        largest = tl.maximum(tl.max(tl.abs(first), 0), tl.max(tl.abs(rest), 0))
        factor = _scale(largest, scale, row, LEAST, LARGEST)
        target = values + row * columns
        tl.store(target + column, (first * factor).to(values.dtype.element_ty), column < columns)
        tl.store(target + later, (rest * factor).to(values.dtype.element_ty), later < columns)
