"""RMSNorm, SwiGLU and rotary embedding in one pass over memory each, forward and backward.

Every function equals Qwen2.5-VL's own expression, rounding for rounding. On CUDA with Triton they
are kernels. They are that expression in plain PyTorch elsewhere, for other dtypes, for small
tensors, where launching a kernel takes longer than it saves (but not inside `recorded_launches`),
and under torch.compile, which fuses by itself; but RMSNorm of small tensors on CUDA is torch's own
kernel.

Shapes: N rows (tokens or patches), D features, I intermediate features, H heads.
Numbers: statistics and products in float32, row numbers in int64, rows on grid axis 0.
"""

import contextlib
import contextvars

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLRMSNorm,
    Qwen2MLP,
    rotate_half,
)

from .float8_videonsa import down_of_swiglu, linears, takes_float8

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

FUSED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_FEATURES = 32768  # of a row that one program keeps in registers
WEIGHT_GRADIENT_PROGRAMS = 512  # fixed, so that the sum over rows has one order on every device
SWIGLU_COLUMNS = 4096
MIN_FUSED_NUMEL = 2**18  # smaller tensors take longer to launch a Triton kernel than it saves
# In training, an MLP of more tokens than the first number keeps its input alone and runs in tiles
# of as many tokens as the second.
TILED_FROM, TILE = 65536 + 1024, 16384

_launches_are_recorded = contextvars.ContextVar("launches_are_recorded", default=False)


@contextlib.contextmanager
def recorded_launches():
    """Inside, small tensors go through the kernels too: a CUDA graph launches them for nothing.

    For the recording of the graph, and for the call before it that compiles what it will launch.
    """
    before = _launches_are_recorded.set(True)
    try:
        yield
    finally:
        _launches_are_recorded.reset(before)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, [..., D].

    Float32 inside, cast to x's dtype, then times the weight. Differentiable in x and weight.
    """
    if _runs_fused(x, weight) and x.shape[-1] <= MAX_FEATURES:
        return _apply(_RMSNorm, x, weight, eps)
    if x.is_cuda and x.dtype in FUSED_DTYPES and not torch.compiler.is_compiling():
        return weight * nn.functional.rms_norm(x, x.shape[-1:], eps=eps).to(x.dtype)
    normed = x.float()
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual + x, and `rms_norm` of that sum, each [..., D]. Differentiable in all but eps."""
    alike = x.dtype == residual.dtype and x.shape == residual.shape
    if alike and _runs_fused(x, residual, weight) and x.shape[-1] <= MAX_FEATURES:
        return _apply(_AddRMSNorm, x, residual, weight, eps)
    total = residual + x
    return total, rms_norm(total, weight, eps)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, [..., I] each, of one dtype. Differentiable in both."""
    if gate.dtype != up.dtype or not _runs_fused(gate, up):
        return nn.functional.silu(gate) * up
    return _apply(_SwiGLU, gate, up)


def swiglu_halves(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up where gate_up is [..., 2 I], gate first; so is its gradient, one tensor."""
    if not _runs_fused(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up
    return _apply(_SwiGLUHalves, gate_up)


def rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x * cos + rotate_half(x) * sin for x = query and x = key, in their dtype; differentiable.

    x [N, H, D] with cos and sin [N, D], or x [B, H, S, D] with cos and sin [B, S, D] or [1, S, D];
    H may differ. Arithmetic is in the wider dtype of x and cos: in the model's own, as the language
    model does it, or in float32, as the vision tower does, by the dtype of cos and sin alone.
    x need not be contiguous. The results lie in memory as [N, H, D] or [B, S, H, D].
    """
    if query.dtype == key.dtype and _runs_fused(query, key, cos, sin):
        return _apply(_Rotary, query, key, cos, sin)
    axis = -2 if query.ndim == 3 else 1
    cos, sin = cos.unsqueeze(axis), sin.unsqueeze(axis)
    wide = torch.promote_types(query.dtype, cos.dtype)
    return tuple(
        (x.to(wide) * cos + rotate_half(x.to(wide)) * sin).to(x.dtype) for x in (query, key)
    )


class VideoNSARMSNorm(Qwen2_5_VLRMSNorm):
    """Qwen2.5-VL's RMSNorm in one pass, with the addition before it where a residual is given."""

    kernel_layer_name = "VideoNSARMSNorm"  # not one of those that `use_kernels` puts in its place

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """[..., D] to the same; with a residual, the sum of both and its norm."""
        if residual is None:
            return rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return add_rms_norm(hidden_states, residual, self.weight, self.variance_epsilon)


class VideoNSAMLP(Qwen2MLP):
    """Qwen2.5-VL's MLP with its activation in one pass.

    x [..., hidden]. In training on very many tokens it runs in tiles of tokens that are computed
    again in the backward: 3 * intermediate_size activations for each of them would not fit.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad and torch.is_grad_enabled() and x.shape[:-1].numel() > TILED_FROM:
            tiles = x.flatten(0, -2).split(TILE)
            tiles = [checkpoint(self._forward, tile, use_reentrant=False) for tile in tiles]
            return torch.cat(tiles).view(x.shape)
        return self._forward(x)

    def _forward(self, x):
        if self.config.hidden_act != "silu":
            return super().forward(x)
        gate, up = linears(x, self.gate_proj, self.up_proj)
        if takes_float8(self.down_proj, gate):
            return down_of_swiglu(gate, up, self.down_proj)
        return self.down_proj(swiglu(gate, up))


def _runs_fused(*tensors):
    """Whether the kernels take these tensors."""
    return (
        triton is not None
        and not torch.compiler.is_compiling()
        and (tensors[0].numel() > MIN_FUSED_NUMEL or _launches_are_recorded.get())
        and all(x.is_cuda and x.dtype in FUSED_DTYPES for x in tensors)
    )


def _apply(function, *arguments):
    """Run an autograd function; without its bookkeeping where nothing wants a gradient."""
    if torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in arguments):
        return function.apply(*arguments)
    return function.run(*arguments)


def _rows(x):
    """x [..., D] as [N, D] whose features lie next to each other; copies only if they do not."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _warps(elements):
    return max(1, min(16, elements // 512))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def run(x, weight, eps):
        return _norm_forward(x, None, weight, eps)[1]

    @staticmethod
    def forward(ctx, x, weight, eps):
        _, y, scale = _norm_forward(x, None, weight, eps, with_scale=True)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return *_norm_backward(*ctx.saved_tensors, dy, None, ctx.needs_input_grad[1]), None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def run(x, residual, weight, eps):
        return _norm_forward(x, residual, weight, eps)[:2]

    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        total, y, scale = _norm_forward(x, residual, weight, eps, with_scale=True)
        ctx.save_for_backward(total, weight, scale)
        return total, y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dtotal, dy):
        dx, dweight = _norm_backward(*ctx.saved_tensors, dy, dtotal, ctx.needs_input_grad[2])
        return dx, dx, dweight, None


def _norm_forward(x, residual, weight, eps, with_scale=False):
    """The sum of x and residual or None, the norm, and float32 [N] 1 / sqrt(mean(x^2) + eps)."""
    rows, weight = _rows(x), weight.contiguous()
    count, features = rows.shape
    dtype = torch.promote_types(x.dtype, weight.dtype)
    y = torch.empty(rows.shape, dtype=dtype, device=x.device)
    scale = torch.empty(count, dtype=torch.float32, device=x.device) if with_scale else None
    total, added = None, None
    if residual is not None:
        total, added = torch.empty(rows.shape, dtype=x.dtype, device=x.device), _rows(residual)
    block = triton.next_power_of_2(features)
    if count:
        with torch.cuda.device_of(x):
            _rms_norm_forward[(count,)](
                rows,
                added,
                weight,
                total,
                y,
                scale,
                eps=eps,
                stride=rows.stride(0),
                added_stride=0 if added is None else added.stride(0),
                features=features,
                BLOCK=block,
                num_warps=_warps(block),
            )
    return None if total is None else total.view(x.shape), y.view(x.shape), scale


def _norm_backward(x, weight, scale, dy, dtotal, needs_dweight):
    """dx, to which dtotal is added where it is given, and dweight or None."""
    rows, dy, contiguous = _rows(x), _rows(dy), weight.contiguous()
    added = None if dtotal is None else _rows(dtotal)
    count, features = rows.shape
    dx = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    programs, partial = count, None
    if needs_dweight:
        programs = min(count, WEIGHT_GRADIENT_PROGRAMS)
        partial = torch.empty(programs, features, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(features)
    if count:
        with torch.cuda.device_of(x):
            _rms_norm_backward[(programs,)](
                rows,
                contiguous,
                scale,
                dy,
                added,
                dx,
                partial,
                stride=rows.stride(0),
                dy_stride=dy.stride(0),
                added_stride=0 if added is None else added.stride(0),
                rows=count,
                rows_per_program=-(-count // programs),
                features=features,
                BLOCK=block,
                num_warps=_warps(block),
            )
    return dx.view(x.shape), None if partial is None else partial.sum(0).to(weight.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def run(gate, up):
        shape = gate.shape
        gate, up = _rows(gate), _rows(up)
        y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        _launch_swiglu(_swiglu_forward, gate=gate, up=up, y=y)
        return y.view(shape)

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _SwiGLU.run(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate, dup = (
            torch.empty_like(dy, memory_format=torch.contiguous_format) for _ in ("dgate", "dup")
        )
        tensors = {"gate": gate, "up": up, "dy": dy, "dgate": dgate, "dup": dup}
        _launch_swiglu(_swiglu_backward, **{name: _rows(x) for name, x in tensors.items()})
        return dgate, dup


class _SwiGLUHalves(torch.autograd.Function):
    @staticmethod
    def run(gate_up):
        return _SwiGLU.run(*gate_up.chunk(2, dim=-1))

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return _SwiGLUHalves.run(gate_up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (gate_up,) = ctx.saved_tensors
        gradient = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        gate, up = _rows(gate_up).chunk(2, dim=1)
        dgate, dup = _rows(gradient).chunk(2, dim=1)
        _launch_swiglu(_swiglu_backward, gate=gate, up=up, dy=_rows(dy), dgate=dgate, dup=dup)
        return gradient


def _launch_swiglu(kernel, **tensors):
    """Launch over rows and blocks of columns of tensors [N, I], named as the kernel names them."""
    count, columns = tensors["gate"].shape
    block = min(SWIGLU_COLUMNS, triton.next_power_of_2(columns))
    blocks = triton.cdiv(columns, block)
    strides = {f"{name}_stride": x.stride(0) for name, x in tensors.items()}
    if count:
        with torch.cuda.device_of(tensors["gate"]):
            kernel[(count * blocks,)](
                **tensors,
                **strides,
                columns=columns,
                blocks=blocks,
                BLOCK=block,
                num_warps=_warps(block),
            )


class _Rotary(torch.autograd.Function):
    @staticmethod
    def run(query, key, cos, sin, backward=False):
        q, k = (_by_token(x) for x in (query, key))
        batch, length, _, features = q.shape
        cos, sin = (y.expand(batch, length, features).contiguous() for y in (cos, sin))
        turned = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
        heads = {"Q_HEADS": q.shape[2], "K_HEADS": k.shape[2]}
        wide = torch.promote_types(query.dtype, cos.dtype)
        if q.numel():
            with torch.cuda.device_of(query):
                _rotary_rows[(batch * length,)](
                    q,
                    k,
                    cos,
                    sin,
                    *turned,
                    *q.stride()[:3],
                    *k.stride()[:3],
                    length=length,
                    HALF=features // 2,
                    ROUND=wide != torch.float32,
                    BACKWARD=backward,
                    BLOCK=triton.next_power_of_2(features // 2),
                    **heads,
                    **{f"{x}_2": triton.next_power_of_2(n) for x, n in heads.items()},
                )
        return tuple(x[0] if query.ndim == 3 else x.transpose(1, 2) for x in turned)

    @staticmethod
    def forward(ctx, query, key, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _Rotary.run(query, key, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk):
        return *_Rotary.run(dq, dk, *ctx.saved_tensors, backward=True), None, None


def _by_token(x):
    """x [N, H, D] or [B, H, S, D] as a view [B, S, H, D] whose features lie next to each other."""
    x = x[None] if x.ndim == 3 else x.transpose(1, 2)
    return x if x.stride(3) == 1 else x.contiguous()


if triton is not None:

    @triton.jit
    def _rms_norm_forward(
        x, added, weight, total, y, scale, eps, stride, added_stride, features, BLOCK: tl.constexpr
    ):
        """One row of x [N, D]: writes y [N, D] and, if given, scale [N]. With `added` [N, D], y is
        the norm of x + added, which is written to total [N, D].
        """
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < features
        values = tl.load(x + row * stride + column, inside, 0.0)
        if added is not None:
            other = tl.load(added + row * added_stride + column, inside, 0.0)
            values = (values.to(tl.float32) + other.to(tl.float32)).to(values.dtype)
            tl.store(total + row * features + column, values, inside)
        wide = values.to(tl.float32)
        inverse = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 0) / features + eps)
        normed = (wide * inverse).to(values.dtype).to(tl.float32)
        weights = tl.load(weight + column, inside, 0.0).to(tl.float32)
        tl.store(y + row * features + column, (normed * weights).to(y.dtype.element_ty), inside)
        if scale is not None:
            tl.store(scale + row, inverse)

    @triton.jit
    def _rms_norm_backward(
        x,
        weight,
        scale,
        dy,
        added,
        dx,
        partial,
        stride,
        dy_stride,
        added_stride,
        rows,
        rows_per_program,
        features,
        BLOCK: tl.constexpr,
    ):
        """One program takes rows p, p + programs, ... of x and dy [N, D], with scale [N] of the
        forward, and writes dx [N, D] and, if given, its part of dweight: row p of partial
        [programs, D].

        With n = x * scale: dx = scale * (weight * dy - n * mean(weight * dy * n)), plus `added`
        [N, D] where it is given.
        """
        program = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < features
        weights = tl.load(weight + column, inside, 0.0).to(tl.float32)
        gradient = tl.zeros([BLOCK], tl.float32)
        for step in range(rows_per_program):
            row = program + step * tl.num_programs(0).to(tl.int64)
            present = inside & (row < rows)
            values = tl.load(x + row * stride + column, present, 0.0)
            inverse = tl.load(scale + row, row < rows, 0.0)
            upper = tl.load(dy + row * dy_stride + column, present, 0.0).to(tl.float32)
            normed = values.to(tl.float32) * inverse
            scaled = upper * weights
            mean = tl.sum(scaled * normed, 0) / features
            lower = inverse * (scaled - normed * mean)
            if added is not None:
                other = tl.load(added + row * added_stride + column, present, 0.0)
                lower += other.to(tl.float32)
            tl.store(dx + row * features + column, lower.to(dx.dtype.element_ty), present)
            gradient += upper * normed.to(values.dtype).to(tl.float32)
        if partial is not None:
            tl.store(partial + program * features + column, gradient, inside)

    @triton.jit
    def _locate(columns, blocks, BLOCK: tl.constexpr):
        """The row of this program, its columns [BLOCK], and which of them exist."""
        program = tl.program_id(0).to(tl.int64)
        column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
        return program // blocks, column, column < columns

    @triton.jit
    def _swiglu_forward(
        gate, up, y, gate_stride, up_stride, y_stride, columns, blocks, BLOCK: tl.constexpr
    ):
        """A block of columns of one row: reads gate and up [N, I], writes y [N, I]."""
        row, column, inside = _locate(columns, blocks, BLOCK)
        values = tl.load(gate + row * gate_stride + column, inside, 0.0)
        wide = values.to(tl.float32)
        active = (wide / (1.0 + tl.exp(-wide))).to(values.dtype).to(tl.float32)
        other = tl.load(up + row * up_stride + column, inside, 0.0).to(tl.float32)
        tl.store(y + row * y_stride + column, (active * other).to(y.dtype.element_ty), inside)

    @triton.jit
    def _swiglu_backward(
        gate,
        up,
        dy,
        dgate,
        dup,
        gate_stride,
        up_stride,
        dy_stride,
        dgate_stride,
        dup_stride,
        columns,
        blocks,
        BLOCK: tl.constexpr,
    ):
        """A block of columns of one row: reads gate, up and dy, writes dgate and dup, all [N, I].

        With s = sigmoid(gate): dup = dy * gate * s, dgate = dy * up * s * (1 + gate * (1 - s)).
        """
        row, column, inside = _locate(columns, blocks, BLOCK)
        values = tl.load(gate + row * gate_stride + column, inside, 0.0)
        wide = values.to(tl.float32)
        other = tl.load(up + row * up_stride + column, inside, 0.0).to(tl.float32)
        upper = tl.load(dy + row * dy_stride + column, inside, 0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-wide))
        active = (wide * sigmoid).to(values.dtype).to(tl.float32)
        slope = sigmoid * (1.0 + wide * (1.0 - sigmoid))
        left = (upper * other * slope).to(dgate.dtype.element_ty)
        tl.store(dgate + row * dgate_stride + column, left, inside)
        tl.store(dup + row * dup_stride + column, (upper * active).to(dup.dtype.element_ty), inside)

    @triton.jit
    def _product(a, b, dtype: tl.constexpr, ROUND: tl.constexpr):
        """a * b, rounded to `dtype` where the stock expression rounds it."""
        product = a * b
        if ROUND:
            product = product.to(dtype).to(tl.float32)
        return product

    @triton.jit
    def _rotate_heads(
        x, y, head_stride, cos_1, cos_2, sin_1, sin_2,
        HEADS: tl.constexpr, HEADS_2: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
        ROUND: tl.constexpr,
    ):  # fmt: skip
        """All heads of one token: reads x [H, D] at head_stride, writes y [H, D]."""
        head = tl.arange(0, HEADS_2).to(tl.int64)[:, None]
        column = tl.arange(0, BLOCK)[None, :]
        present = (head < HEADS) & (column < HALF)
        source = x + head * head_stride + column
        first = tl.load(source, present, 0.0)
        dtype = first.dtype
        x_1 = first.to(tl.float32)
        x_2 = tl.load(source + HALF, present, 0.0).to(tl.float32)
        y_1 = _product(x_1, cos_1, dtype, ROUND) - _product(x_2, sin_1, dtype, ROUND)
        y_2 = _product(x_2, cos_2, dtype, ROUND) + _product(x_1, sin_2, dtype, ROUND)
        target = y + head * HALF * 2 + column
        tl.store(target, y_1.to(dtype), present)
        tl.store(target + HALF, y_2.to(dtype), present)

    @triton.jit(do_not_specialize=["length"])
    def _rotary_rows(
        q, k, cos, sin, q_out, k_out, q_batch, q_token, q_head, k_batch, k_token, k_head, length,
        HALF: tl.constexpr, ROUND: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
        Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
        Q_HEADS_2: tl.constexpr, K_HEADS_2: tl.constexpr,
    ):  # fmt: skip
        """One token, all heads: reads q and k [B, S, H, D] of any strides and cos and sin
        [B, S, D], writes q_out and k_out [B, S, H, D]. 1 and 2 are the halves of D.

        Forward: y1 = x1 cos1 - x2 sin1, y2 = x2 cos2 + x1 sin2.
        Backward, where x is dy and y is dx: dx1 = dy1 cos1 + dy2 sin2, dx2 = dy2 cos2 - dy1 sin1.
        """
        row = tl.program_id(0).to(tl.int64)
        batch, token = row // length, row % length
        column = tl.arange(0, BLOCK)[None, :]
        inside = column < HALF
        angle = row * HALF * 2 + column
        cos_1 = tl.load(cos + angle, inside, 0.0).to(tl.float32)
        cos_2 = tl.load(cos + angle + HALF, inside, 0.0).to(tl.float32)
        sin_1 = tl.load(sin + angle, inside, 0.0).to(tl.float32)
        sin_2 = tl.load(sin + angle + HALF, inside, 0.0).to(tl.float32)
        if BACKWARD:
            sin_1, sin_2 = -sin_2, -sin_1
        _rotate_heads(
            q + batch * q_batch + token * q_token, q_out + row * Q_HEADS * HALF * 2, q_head,
            cos_1, cos_2, sin_1, sin_2, Q_HEADS, Q_HEADS_2, HALF, BLOCK, ROUND,
        )  # fmt: skip
        _rotate_heads(
            k + batch * k_batch + token * k_token, k_out + row * K_HEADS * HALF * 2, k_head,
            cos_1, cos_2, sin_1, sin_2, K_HEADS, K_HEADS_2, HALF, BLOCK, ROUND,
        )  # fmt: skip
