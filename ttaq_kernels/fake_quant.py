"""Affine quantize-dequantize of a tensor, on one grid or on one grid per channel, with STE and LSQ gradients.

With QDrop an element keeps x_hat with a given probability, else x; `_philox` draws which, again in the backward.

    inv   = 1 / scale                                      once per scale, IEEE division
    q     = clamp(rint(x * inv) + zero_point, qmin, qmax)  rint rounds half to even; NaN -> qmin
    x_hat = (q - zero_point) * scale                       fp32, then one rounding to the type of x

Gradients, with u = rint(x * inv) + zero_point before the clamp, inside = qmin <= u <= qmax:

    dx     = where(inside, g, 0)
    dscale = sum g * (rint(x * inv) - x * inv inside, qmin - zero_point below, qmax - zero_point above)

Bytes per element of a 2-byte tensor: forward 4, backward 6, with or without dscale or drop (x is read again, no mask is
saved).
A dense tensor of any layout is read in memory order, as a matrix whose rows or columns are the channels; a tensor with
gaps is copied once. Called by the quantizers of `ttaq.nn`.
"""

from typing import Any

import torch
from torch import Tensor

from ttaq_kernels import _check
from ttaq_kernels._config import tuned
from ttaq_kernels._grid import check_grid
from ttaq_kernels._launch import tl, triton
from ttaq_kernels._library import register_op
from ttaq_kernels._math import reciprocal, round_within, rounds_within
from ttaq_kernels._matrix import ELEMENTWISE, Matrix, dense, tile
from ttaq_kernels._philox import Drop, check_drop, kept
from ttaq_kernels.errors import KernelError
from ttaq_kernels.reference import fake_quant as reference

# Device functions stay without types: Triton has none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

__all__ = ["fake_quantize"]

_WHO = "fake_quantize"
_NO_DROP = Drop.of(1.0)


@triton.jit
def _forward_kernel(
    x_ptr, scale_ptr, zero_point_ptr, seed_ptr, out_ptr, channels, rows, cols, col_blocks, qmin, qmax, threshold,
    CHANNEL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """out = (clamp(rint(x * inv) + zero_point, qmin, qmax) - zero_point) * scale, or x where that is not kept"""
    offs, mask, channel, exists = tile(channels, rows, cols, col_blocks, CHANNEL, BLOCK_ROWS, BLOCK_COLS)
    scale = tl.load(scale_ptr + channel, mask=exists, other=1.0)
    zero_point = tl.load(zero_point_ptr + channel, mask=exists, other=0)
    low, high = qmin - zero_point, qmax - zero_point
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    out = round_within(x * reciprocal(scale), low, high) * scale
    if BITS:
        keep = kept(seed_ptr, tl.program_id(0).to(tl.int64) * BLOCK_COLS, threshold, BITS, BLOCK_COLS)
        out = tl.where(keep[None, :], out, x)
    tl.store(out_ptr + offs, out, mask=mask)


@triton.jit
def _backward_kernel(
    x_ptr, scale_ptr, zero_point_ptr, seed_ptr, grad_ptr, dx_ptr, partial_ptr,
    channels, rows, cols, col_blocks, qmin, qmax, threshold,
    CHANNEL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BITS: tl.constexpr, LSQ: tl.constexpr,
):  # fmt: skip
    """dx = where(inside, grad, 0); with LSQ also this tile's sum per channel of grad * d x_hat / d scale."""
    offs, mask, channel, exists = tile(channels, rows, cols, col_blocks, CHANNEL, BLOCK_ROWS, BLOCK_COLS)
    scale = tl.load(scale_ptr + channel, mask=exists, other=1.0)
    zero_point = tl.load(zero_point_ptr + channel, mask=exists, other=0)
    low, high = qmin - zero_point, qmax - zero_point
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if BITS:
        # What has passed as it is has the gradients of a zero: 1 to x, 0 to scale.
        keep = kept(seed_ptr, tl.program_id(0).to(tl.int64) * BLOCK_COLS, threshold, BITS, BLOCK_COLS)
        x = tl.where(keep[None, :], x, 0.0)
    v = x * reciprocal(scale)
    inside = rounds_within(v, low, high)
    tl.store(dx_ptr + offs, tl.where(inside, grad, 0.0), mask=mask)
    if LSQ:
        slope = grad * (round_within(v, low, high) - tl.where(inside, v, 0.0))
        row_block = (tl.program_id(0) // col_blocks).to(tl.int64)
        col_block = tl.program_id(0) % col_blocks
        if CHANNEL == "col":
            col = col_block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
            tl.store(partial_ptr + row_block * cols + col, tl.sum(slope, axis=0), mask=col < cols)
        else:
            row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            tl.store(partial_ptr + row * col_blocks + col_block, tl.sum(slope, axis=1), mask=row < rows)


def _launch_forward(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
    out_dtype: torch.dtype | None = None,
    drop: Drop = _NO_DROP,
    seed: Tensor | None = None,
) -> Tensor:
    out = torch.empty_like(x, dtype=out_dtype)
    x = dense(x, out)
    tensors = (x, scale.contiguous(), zero_point.contiguous(), seed, out)
    config = tuned(_WHO, f"{str(x.dtype).removeprefix('torch.')} axis={axis} drop={drop.bits}", ELEMENTWISE, x)
    matrix = Matrix.of(x, axis, config.pop("TILE"))
    matrix.launch(_WHO, _forward_kernel, tensors, qmin, qmax, drop.threshold, BITS=drop.bits, **config)
    return out


def _launch_backward(
    lsq: bool,
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
    drop: Drop = _NO_DROP,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    dx = torch.empty_like(x)
    x = dense(x, dx)
    matrix = Matrix.of(x, axis)
    if not lsq:
        partial = None
    elif matrix.kind == "col":
        partial = scale.new_empty(matrix.row_blocks(), matrix.channels, 1)
    else:
        periods = matrix.rows // matrix.channels if matrix.channels else 0
        partial = scale.new_empty(periods, matrix.channels, matrix.col_blocks())
    tensors = (x, scale.contiguous(), zero_point.contiguous(), seed, dense(grad, dx), dx, partial)
    matrix.launch(_WHO, _backward_kernel, tensors, qmin, qmax, drop.threshold, BITS=drop.bits, LSQ=lsq)
    # Partial sums added in a fixed order, not atomically: the same input always gives the same bits.
    return dx, None if partial is None else partial.sum((0, 2)).reshape(scale.shape)


def _launch_drop(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, keep_quantized: float, seed: Tensor
) -> Tensor:
    return _launch_forward(x, scale, zero_point, qmin, qmax, None, None, Drop.of(keep_quantized), seed)


def _launch_drop_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    keep_quantized: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor | None]:
    return _launch_backward(True, grad, x, scale, zero_point, qmin, qmax, None, Drop.of(keep_quantized), seed)


_GRID = "Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax"
_ARGUMENTS = f"{_GRID}, int? axis"
_DROP_ARGUMENTS = f"{_GRID}, float keep_quantized, Tensor seed"

_ste_backward = register_op(
    f"fake_quantize_ste_backward(Tensor grad, {_ARGUMENTS}) -> Tensor",
    cpu=reference.ste_backward,
    cuda=lambda *arguments: _launch_backward(False, *arguments)[0],
    fake=lambda _, x, *_grid: torch.empty_like(x),
)
_lsq_backward = register_op(
    f"fake_quantize_lsq_backward(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor)",
    cpu=reference.lsq_backward,
    cuda=lambda *arguments: _launch_backward(True, *arguments),
    fake=lambda _, x, scale, *_grid: (torch.empty_like(x), torch.empty_like(scale)),
)
_drop_backward = register_op(
    f"fake_quantize_drop_backward(Tensor grad, {_DROP_ARGUMENTS}) -> (Tensor, Tensor)",
    cpu=reference.drop_backward,
    cuda=_launch_drop_backward,
    fake=lambda _, x, scale, *_rest: (torch.empty_like(x), torch.empty_like(scale)),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:3])
    ctx.grid = inputs[3:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dx, dscale = None, None
    if ctx.needs_input_grad[1]:
        dx, dscale = _lsq_backward(grad, *ctx.saved_tensors, *ctx.grid)
    elif ctx.needs_input_grad[0]:
        dx = _ste_backward(grad, *ctx.saved_tensors, *ctx.grid)
    return dx, dscale, None, None, None, None


def _save_drop(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:3], inputs[6])
    ctx.grid = inputs[3:6]


def _backward_drop(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    dx, dscale = _drop_backward(grad, *tensors, *ctx.grid, seed)
    return dx, dscale, None, None, None, None, None


_fake_quantize = register_op(
    f"fake_quantize({_ARGUMENTS}) -> Tensor",
    cpu=reference.fake_quantize,
    cuda=_launch_forward,
    fake=lambda x, *_: torch.empty_like(x),
    setup_context=_save,
    backward=_backward,
)
_fake_quantize_drop = register_op(
    f"fake_quantize_drop({_DROP_ARGUMENTS}) -> Tensor",
    cpu=reference.drop,
    cuda=_launch_drop,
    fake=lambda x, *_: torch.empty_like(x),
    setup_context=_save_drop,
    backward=_backward_drop,
)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    *,
    keep_quantized: float = 1.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Round `x` to the grid `(q - zero_point) * scale` with codes q = qmin, ..., qmax.

        q     = clamp(rint(x * (1 / scale)) + zero_point, qmin, qmax)
        x_hat = (q - zero_point) * scale

    Args:
        x: float32, bfloat16 or float16, any shape and layout, also empty.
        scale: float32 > 0, shape () or (1,), with `axis` (x.shape[axis],). Not checked to be positive: that would wait
            for the device.
        zero_point: int32, the shape of `scale`; qmin <= zero_point <= qmax.
        qmin, qmax: smallest and largest code, -65536 <= qmin < qmax <= 65536.
        axis: the dimension of `x` whose every index has its own scale; None for one scale.
        keep_quantized: the probability that an element is rounded; the others pass as they are (QDrop). Rounded to a
            multiple of 1/256; below 1 only without `axis`.
        seed: int64, shape () or (1,): what the elements are drawn with, by their place in memory. Equal seeds draw
            equally, also in the backward pass, so write another seed into it after that.

    Returns:
        A tensor with the shape, type and layout of `x` (a tensor with gaps gives a dense one). +Inf becomes the largest
        value of the grid, -Inf and NaN the smallest.

    Gradients: of `x` the incoming gradient where the unclamped code lies in [qmin, qmax], else 0 (straight-through). Of
    `scale`, only computed if it requires one, the sum of g * (rint(v) - v) inside, g * (qmin - zero_point) below and
    g * (qmax - zero_point) above, with v = x / scale (LSQ, Esser et al. 2020, eq. 3); repeatable bit for bit. An
    element that passes as it is passes its gradient on and adds nothing to that of `scale`.

    Exactness: in float32 equal to `torch.fake_quantize_per_tensor_affine` in each channel, bit for bit; bfloat16 and
    float16 are computed in float32 and rounded once.

    Raises:
        KernelError: a type, shape, device, axis, grid or probability that does not fit.

    Source of the random choice: QDrop (arXiv 2203.05740).
    """
    _check.check_input(_WHO, "x", x)
    axis = check_grid(_WHO, x, scale, zero_point, qmin, qmax, axis)
    check_drop(_WHO, keep_quantized, seed, x)
    if keep_quantized < 1 and axis is not None:
        raise KernelError(f"{_WHO}: keep_quantized is {keep_quantized} with axis={axis}, expected 1, or axis=None")
    result: Tensor
    if keep_quantized < 1:
        result = _fake_quantize_drop(x, scale, zero_point, qmin, qmax, keep_quantized, seed)
    else:
        result = _fake_quantize(x, scale, zero_point, qmin, qmax, axis)
    return result
