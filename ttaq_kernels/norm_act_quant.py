"""Batch norm, residual, activation and re-quantization in one pass over a tensor.

    z = batch_norm(x) + residual              see `batch_norm`: mixed statistics, optional sample mask
    a = z, relu(z) or relu6(z)
    q = clamp(rint(a * inv) + zero_point, qmin, qmax),  inv = 1 / scale
    y = a, (q - zero_point) * scale, or the codes q

Gradients with respect to z: dy where 0 < z (and z < 6) and the unclamped code lies in [qmin, qmax], else 0; from there
as in `batch_norm`, and unchanged to the residual. What was clipped is computed again from x, never from codes.

Bytes per element of a 2-byte tensor, on two reads of x (statistics first): forward 6, to int8 codes 5, to packed 4-bit
codes 4.5; the residual adds 2. Backward 10 (x and dy twice, dx); a residual adds 4, with or without a gradient of its
own. Called by networks that keep activations quantized between their layers.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ttaq_kernels import _check
from ttaq_kernels._batch_norm_kernels import STATISTICS
from ttaq_kernels._batch_norm_launch import launch_backward, launch_forward
from ttaq_kernels._library import register_op
from ttaq_kernels.batch_norm import check_arguments
from ttaq_kernels.errors import KernelError
from ttaq_kernels.reference import norm_act_quant as reference
from ttaq_kernels.reference.norm_act_quant import Epilogue
from ttaq_kernels.reference.pack import kernel_bytes

__all__ = ["norm_act_codes", "norm_act_quant"]

_ACTIVATIONS = ("identity", "relu", "relu6")
_CODE_LIMIT = 1 << 16  # as in fake_quantize
_GRID = "Tensor? residual, Tensor? scale, Tensor? zero_point, int qmin, int qmax, str act"


def _launch_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    source_mean: Tensor | None,
    source_var: Tensor | None,
    sample_mask: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *after, output, alpha, eps, _ = rest
    vectors = (weight, bias, source_mean, source_var)
    y, statistics, carrier = launch_forward(
        x, *vectors, sample_mask, alpha, eps, who="norm_act_quant", after=Epilogue(*after), output=output
    )
    return statistics, y, carrier


def _launch_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    sample_mask: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *after, alpha, need_x, need_affine, need_residual = rest
    needs = (need_x, need_affine, need_residual)
    return launch_backward(
        grad, x, weight, bias, statistics, sample_mask, alpha, *needs, who="norm_act_quant", after=Epilogue(*after)
    )


def _fake_forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    output = rest[-4]
    statistics = x.new_empty(STATISTICS, x.shape[1], dtype=torch.float32)
    if output == "values":
        return statistics, torch.empty_like(x), x.new_empty(0)
    carrier = x.new_empty((1,) * x.ndim).expand(x.shape)
    if output == "codes":
        return statistics, torch.empty_like(x, dtype=torch.int8), carrier
    rows = x.shape[0] * math.prod(x.shape[2:])
    return statistics, x.new_empty(rows, kernel_bytes(x.shape[1], 4), dtype=torch.uint8), carrier


def _fake_backward(_grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_x, need_affine, need_residual = rest[-3:]
    dx, dresidual = (torch.empty_like(x) if need else x.new_empty(0) for need in (need_x, need_residual))
    return dx, rest[2].new_empty((2, x.shape[1]) if need_affine else 0), dresidual


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, _, sample_mask, residual, scale, zero_point, qmin, qmax, act, kind, alpha, _, through = inputs
    statistics, y, carrier = output
    ctx.mark_non_differentiable(statistics, carrier if kind == "values" else y)
    # Without anything that clips, the gradient does not depend on what is added to the normalised tensor.
    clips = scale is not None or act != "identity"
    added = (bias, residual, scale, zero_point) if clips else (None,) * 4
    ctx.save_for_backward(x, weight, statistics, sample_mask, *added)
    ctx.grid, ctx.alpha = (qmin, qmax, act), alpha if through else 0.0
    ctx.values = kind == "values"


def _backward(ctx: Any, _: Tensor | None, dy: Tensor | None, carried: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, statistics, sample_mask, bias, residual, scale, zero_point = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    need_residual = ctx.needs_input_grad[6]
    need_affine = need_weight or need_bias
    after = (residual, scale, zero_point, *ctx.grid)
    needs = (need_x, need_affine, need_residual)
    grad = dy if ctx.values else carried
    dx, sums, dresidual = _backward_op(grad, x, weight, bias, statistics, sample_mask, *after, ctx.alpha, *needs)
    dweight, dbias = sums if need_affine else (None, None)
    first = (dx if need_x else None, dweight if need_weight else None, dbias if need_bias else None)
    return *first, None, None, None, dresidual if need_residual else None, *[None] * 9


_backward_op = register_op(
    f"norm_act_quant_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor statistics,"
    f" Tensor? sample_mask, {_GRID}, float alpha, bool need_x, bool need_affine, bool need_residual)"
    " -> (Tensor, Tensor, Tensor)",
    cpu=reference.norm_act_quant_backward,
    cuda=_launch_backward,
    fake=_fake_backward,
)
_forward_op = register_op(
    f"norm_act_quant(Tensor x, Tensor? weight, Tensor? bias, Tensor? source_mean, Tensor? source_var,"
    f" Tensor? sample_mask, {_GRID}, str output, float alpha, float eps, bool statistics_gradient)"
    " -> (Tensor, Tensor, Tensor)",
    cpu=reference.norm_act_quant_forward,
    cuda=_launch_forward,
    fake=_fake_forward,
    setup_context=_save,
    backward=_backward,
)


def _check_after(
    who: str, x: Tensor, residual: Tensor | None, scale: Tensor | None, zero_point: Tensor | None, act: str
) -> None:
    if residual is not None:
        _check.check_parameter(who, "residual", residual, x, [tuple(x.shape)], "like x", x.dtype)
    if act not in _ACTIVATIONS:
        raise KernelError(f"{who}: act is {act!r}, expected one of {', '.join(_ACTIVATIONS)}")
    if (scale is None) != (zero_point is None):
        missing = "scale" if scale is None else "zero_point"
        raise KernelError(f"{who}: {missing} is None, expected scale and zero_point together, or neither")
    if scale is not None and zero_point is not None:
        _check.check_parameter(who, "scale", scale, x, [(), (1,)], "for one scale per tensor", torch.float32)
        _check.check_parameter(who, "zero_point", zero_point, x, [tuple(scale.shape)], "like scale", torch.int32)
        if scale.requires_grad and torch.is_grad_enabled():
            raise KernelError(
                f"{who}: scale requires a gradient, expected a constant; pass scale.detach(), or learn it with "
                "fake_quantize after batch_norm"
            )


def norm_act_quant(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    source_mean: Tensor | None,
    source_var: Tensor | None,
    alpha: float = 1.0,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    act: str = "identity",
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    qmin: int = 0,
    qmax: int = 255,
    sample_mask: Tensor | None = None,
    statistics_gradient: bool = True,
) -> Tensor:
    """fake_quantize(act(batch_norm(x) + residual)) in one pass, see there.

    Args:
        x, weight, bias, source_mean, source_var, alpha, eps, sample_mask, statistics_gradient: as for `batch_norm`.
        residual: a tensor like `x` (shape and type, any memory layout), added before the activation.
        act: "identity", "relu" or "relu6".
        scale, zero_point: float32 > 0 and int32, both () or (1,): one grid for the tensor, a constant. Without them
            nothing is quantized.
        qmin, qmax: smallest and largest code, as for `fake_quantize`.

    Returns:
        A tensor with the shape, type and memory layout of `x` (a tensor with gaps gives a dense one). Without a grid
        NaN stays NaN, with one it becomes the smallest value.

    Gradients: of `x`, `weight`, `bias` and `residual`, straight through the rounding, 0 where the activation or the
    grid clips. None of `scale`: calibration learns scales, with `fake_quantize`.

    Exactness: in float32 equal to the three ops one after the other, bit for bit. In bfloat16 and float16 it rounds
    once, they round after each op. Repeatable bit for bit.

    Raises:
        KernelError: a type, shape, device, setting or grid that does not fit; a scale that requires a gradient.
    """
    who = "norm_act_quant"
    vectors = {"weight": weight, "bias": bias, "source_mean": source_mean, "source_var": source_var}
    mask = check_arguments(who, x, vectors, alpha, eps, sample_mask)
    _check_after(who, x, residual, scale, zero_point, act)
    if not -_CODE_LIMIT <= qmin < qmax <= _CODE_LIMIT:
        raise KernelError(
            f"{who}: codes go from qmin={qmin} to qmax={qmax}, expected {-_CODE_LIMIT} <= qmin < qmax <= {_CODE_LIMIT}"
        )
    after = (residual, scale, zero_point, qmin, qmax, act, "values")
    arguments = (x, *vectors.values(), mask, *after, float(alpha), float(eps), statistics_gradient)
    y: Tensor = _forward_op(*arguments)[1]
    return y


def norm_act_codes(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    source_mean: Tensor | None,
    source_var: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    alpha: float = 1.0,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    act: str = "identity",
    packed: bool = False,
    sample_mask: Tensor | None = None,
    statistics_gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """The codes of `norm_act_quant`, for layers that compute with them.

    Args: as for `norm_act_quant`.
        qmin, qmax: within -128, ..., 127, or within 0, ..., 255; packed within 0, ..., 15.
        packed: two codes in a byte.

    Returns:
        codes: int8 with the shape and memory layout of `x`; codes of a grid that goes beyond 127 are stored minus 128.
            Packed, uint8 [N * S, 32 * ceil(C / 64)], one row for each position of each sample: channel c is in byte
            32 * (c // 64) + c % 32 of its row, in the low half if c % 64 < 32, else in the high half; channels beyond
            the last are 0 (see `ttaq_kernels.pack`).
        carrier: what connects the codes, which cannot have a gradient, with the backward pass: zeros with the shape and
            type of `x` in the memory of one element. The layer that reads the codes takes it as an input too and
            returns, as its gradient, that of the dequantized values (code - zero_point) * scale + carrier.

    Gradients, exactness and errors as for `norm_act_quant`, which returns (code - zero_point) * scale.
    """
    who = "norm_act_codes"
    vectors = {"weight": weight, "bias": bias, "source_mean": source_mean, "source_var": source_var}
    mask = check_arguments(who, x, vectors, alpha, eps, sample_mask)
    for name, tensor in {"scale": scale, "zero_point": zero_point}.items():
        _check.check_input(who, name, tensor, (torch.float32 if name == "scale" else torch.int32,))
    _check_after(who, x, residual, scale, zero_point, act)
    shift = 0 if packed else reference.stored_shift(qmax)
    low, high = (0, 15) if packed else (-128 + shift, 127 + shift)
    if not low <= qmin < qmax <= high:
        raise KernelError(
            f"{who}: codes go from qmin={qmin} to qmax={qmax}, expected {low} <= qmin < qmax <= {high} to store them "
            f"in {4 if packed else 8} bits"
        )
    after = (residual, scale, zero_point, qmin, qmax, act, "packed" if packed else "codes")
    arguments = (x, *vectors.values(), mask, *after, float(alpha), float(eps), statistics_gradient)
    _, codes, carrier = _forward_op(*arguments)
    return codes, carrier
