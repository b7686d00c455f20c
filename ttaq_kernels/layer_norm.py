"""Layer norm, weight and bias per group of samples, and re-quantization in one pass over a tensor.

    mean = sum_c x / C,  rstd = 1 / sqrt(sum_c (x - mean)^2 / C + eps)        of each row
    v = ((x - mean) rstd) weight[g] + bias[g]
    q = clamp(rint(v * inv) + zero_point, qmin, qmax),  inv = 1 / scale
    y = v, (q - zero_point) * scale, or the codes q

Gradients, with g = dy where the unclamped code lies in [qmin, qmax], else 0, n = (x - mean) rstd and h = g weight:

    dweight = sum g n,  dbias = sum g,  dx = rstd (h - sum_c h / C - n sum_c h n / C)

What was clipped is computed again from x, never from codes. fp32 inside; a row is read once, and the sums of dweight
and dbias are added in a fixed order. Bytes per element of a 2-byte tensor: forward 4, to int8 codes 3; backward 6.
Called by vision transformers, with groups by the forward-only methods of `ttaq.tta`.
"""

from typing import Any

import torch
from torch import Tensor

from ttaq_kernels import _check
from ttaq_kernels._groups import check_groups
from ttaq_kernels._layer_norm_kernels import group_count, launch_backward, launch_forward
from ttaq_kernels._library import register_op
from ttaq_kernels.errors import KernelError
from ttaq_kernels.reference import layer_norm as reference
from ttaq_kernels.reference.norm_act_quant import gradient_carrier, stored_shift

__all__ = ["layer_norm", "layer_norm_codes"]

_WHO = "layer_norm"
_LONGEST = 8192  # channels of a row: what the registers of one program hold
_MOST = 1 << 30  # rows: counted in 32 bits
_CODE_LIMIT = 1 << 16  # as in fake_quantize


def _fake_forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    codes = rest[-2]
    statistics = x.new_empty(2, x.numel() // x.shape[-1], dtype=torch.float32)
    carrier = gradient_carrier(x) if codes else x.new_empty(0)
    return statistics, torch.empty_like(x, dtype=torch.int8 if codes else None), carrier


def _fake_backward(_grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    statistics, (count, need_x, need_affine) = rest[2], rest[-3:]
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    return dx, statistics.new_empty((2, count, x.shape[-1]) if need_affine else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, groups, scale, zero_point, qmin, qmax, codes, _ = inputs
    statistics, y, carrier = output
    ctx.mark_non_differentiable(statistics, y if codes else carrier)
    ctx.save_for_backward(x, weight, bias, statistics, groups, scale, zero_point)
    ctx.grid, ctx.codes, ctx.count = (qmin, qmax), codes, group_count(weight, bias)


def _backward(ctx: Any, _: Tensor | None, dy: Tensor | None, carried: Tensor | None) -> tuple[Tensor | None, ...]:
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    need_affine = need_weight or need_bias
    grad = carried if ctx.codes else dy
    dx, affine = _layer_norm_backward(grad, *ctx.saved_tensors, *ctx.grid, ctx.count, need_x, need_affine)
    dweight, dbias = affine if need_affine else (None, None)
    return dx if need_x else None, dweight if need_weight else None, dbias if need_bias else None, *[None] * 7


_GRID = "Tensor? scale, Tensor? zero_point, int qmin, int qmax"
_layer_norm_backward = register_op(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor statistics, Tensor? groups,"
    f" {_GRID}, int count, bool need_x, bool need_affine) -> (Tensor, Tensor)",
    cpu=reference.layer_norm_backward,
    cuda=launch_backward,
    fake=_fake_backward,
)
_layer_norm = register_op(
    f"layer_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? groups, {_GRID}, bool codes, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    cpu=reference.layer_norm_forward,
    cuda=launch_forward,
    fake=_fake_forward,
    setup_context=_save,
    backward=_backward,
)


def _norm(
    who: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    codes: tuple[int, int],
    limits: tuple[int, int],
    eps: float,
    to_codes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The checks and the op."""
    _check.check_input(who, "x", x)
    if x.ndim < 2 or not 0 < x.shape[-1] <= _LONGEST:
        raise KernelError(f"{who}: x has shape {tuple(x.shape)}, expected [N, ..., C] with 1 <= C <= {_LONGEST}")
    if x.numel() // x.shape[-1] > _MOST:
        raise KernelError(f"{who}: x has {x.numel() // x.shape[-1]} rows, expected at most {_MOST}; split the batch")
    weight, bias = (t.unsqueeze(0) if isinstance(t, Tensor) and t.ndim == 1 else t for t in (weight, bias))
    check_groups(who, x, x.shape[-1], weight, bias, groups)
    if not 0 < eps < float("inf"):
        raise KernelError(f"{who}: eps is {eps}, expected a positive number such as 1e-6")
    if (scale is None) != (zero_point is None):
        missing = "scale" if scale is None else "zero_point"
        raise KernelError(f"{who}: {missing} is None, expected scale and zero_point together, or neither")
    if scale is not None and zero_point is not None:
        _check.check_parameter(who, "scale", scale, x, [(), (1,)], "for one scale per tensor", torch.float32)
        _check.check_parameter(who, "zero_point", zero_point, x, [tuple(scale.shape)], "like scale", torch.int32)
        if scale.requires_grad and torch.is_grad_enabled():
            raise KernelError(f"{who}: scale requires a gradient, expected a constant; pass scale.detach()")
        if not limits[0] <= codes[0] < codes[1] <= limits[1]:
            raise KernelError(
                f"{who}: codes go from qmin={codes[0]} to qmax={codes[1]}, expected {limits[0]} <= qmin < qmax <= "
                f"{limits[1]}"
            )
    result: tuple[Tensor, Tensor, Tensor] = _layer_norm(
        x, weight, bias, groups, scale, zero_point, *codes, to_codes, float(eps)
    )
    return result


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-6,
    *,
    groups: Tensor | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    qmin: int = 0,
    qmax: int = 255,
) -> Tensor:
    """Layer norm over the last dimension, with the weight and bias of each sample's group, and re-quantization.

        v = (x - mean) / sqrt(var + eps) weight[g] + bias[g],  mean and biased var of each row
        y = v, or fake_quantize(v) in the same pass

    Args:
        x: float32, bfloat16 or float16, [N, ..., C] with C <= 8192 and at most 2^30 rows. A row of NaN or infinities
            gives NaN.
        weight, bias: float32 [C], or [G, C] for G groups of samples; None for 1 and 0.
        eps: added to the variance, > 0.
        groups: int32 [N], the group of each sample, 0 <= g < G (not checked: that would wait for the device). None for
            G equal parts of the batch, one after the other; N is then a multiple of G.
        scale, zero_point: float32 > 0 and int32, both () or (1,): one grid for the tensor, a constant. Without them
            nothing is quantized.
        qmin, qmax: smallest and largest code, -65536 <= qmin < qmax <= 65536.

    Returns:
        A tensor with the shape, type and memory layout of `x` (a tensor with gaps gives a dense one). Without a grid
        NaN stays NaN, with one it becomes the smallest value.

    Gradients: of `x`, `weight` and `bias`, straight through the rounding, 0 where the grid clips. None of `scale`.

    Exactness: arithmetic in float32, the result rounded once; repeatable bit for bit.

    Raises:
        KernelError: a type, shape, device or grid that does not fit, or a batch that has no G equal parts.
    """
    grid = (scale, zero_point, (qmin, qmax), (-_CODE_LIMIT, _CODE_LIMIT))
    return _norm(_WHO, x, weight, bias, groups, *grid, eps, False)[1]


def layer_norm_codes(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    eps: float = 1e-6,
    *,
    groups: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The codes of `layer_norm`, for layers that compute with them.

    Args: as for `layer_norm`.
        qmin, qmax: within -128, ..., 127, or within 0, ..., 255.

    Returns:
        codes: int8 with the shape and memory layout of `x`; codes of a grid that goes beyond 127 are stored minus 128.
        carrier: what connects the codes, which cannot have a gradient, with the backward pass, as for `norm_act_codes`.

    Gradients, exactness and errors as for `layer_norm`, which returns (code - zero_point) * scale.
    """
    who = "layer_norm_codes"
    for name, tensor, dtype in (("scale", scale, torch.float32), ("zero_point", zero_point, torch.int32)):
        _check.check_input(who, name, tensor, (dtype,))
    shift = stored_shift(qmax)
    grid = (scale, zero_point, (qmin, qmax), (shift - 128, shift + 127))
    _, codes, carrier = _norm(who, x, weight, bias, groups, *grid, eps, True)
    return codes, carrier
