"""Affine quantize-dequantize of a tensor, on one grid or on one grid per channel, with STE and LSQ gradients.

    inv   = 1 / scale                                      once per scale, IEEE division
    q     = clamp(rint(x * inv) + zero_point, qmin, qmax)  rint rounds half to even; NaN -> qmin
    x_hat = (q - zero_point) * scale                       fp32, then one rounding to the type of x

Gradients, with u = rint(x * inv) + zero_point before the clamp, inside = qmin <= u <= qmax:

    dx     = where(inside, g, 0)
    dscale = sum g * (rint(x * inv) - x * inv inside, qmin - zero_point below, qmax - zero_point above)

Bytes per element of a 2-byte tensor: forward 4, backward 6, with or without dscale (x is read again, no mask is saved).
A dense tensor of any layout is read in memory order, as a matrix whose rows or columns are the channels; a tensor with
gaps is copied once. Called by the quantizers of `ttaq.nn`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttaq_kernels import _check
from ttaq_kernels._launch import ceil_div, launch, next_power_of_2, tl, triton
from ttaq_kernels._library import register_op
from ttaq_kernels._math import round_half_even
from ttaq_kernels.errors import KernelError
from ttaq_kernels.reference import fake_quant as reference

# Device functions stay without types: Triton has none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

__all__ = ["fake_quantize"]

_CODE_LIMIT = 1 << 16  # far inside the 2**22 to which the rounding is exact
_TILE = 2048  # elements of one program
_COLUMNS = 64  # of one program where the columns are the channels: more rows then share one partial sum of dscale


@triton.jit
def _tile(
    channels, rows, cols, col_blocks, CHANNEL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr
):  # fmt: skip
    """Offsets and mask of this program's tile of a [rows, cols] matrix, and the channel of each row or column."""
    program = tl.program_id(0)
    first_row = (program // col_blocks).to(tl.int64) * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    offs_row = first_row + row
    offs_col = (program % col_blocks).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    mask = (offs_row < rows) & (offs_col < cols)
    offs = offs_row * cols + offs_col
    if CHANNEL == "tensor":
        # There is one row: leaving it out keeps the offsets aligned, whatever the number of columns.
        offs = program.to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
        mask = offs < cols
        channel = row
    elif CHANNEL == "row":
        channel = tl.minimum(offs_row, rows - 1)
    elif CHANNEL == "plane":
        channel = ((first_row % channels).to(tl.int32) + row) % channels
    else:
        channel = tl.minimum(offs_col, cols - 1)
    return offs, mask, channel


@triton.jit
def _forward_kernel(
    x_ptr, scale_ptr, zero_point_ptr, out_ptr, channels, rows, cols, col_blocks, qmin, qmax,
    CHANNEL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """out = (clamp(rint(x * inv) + zero_point, qmin, qmax) - zero_point) * scale"""
    offs, mask, channel = _tile(channels, rows, cols, col_blocks, CHANNEL, BLOCK_ROWS, BLOCK_COLS)
    scale = tl.load(scale_ptr + channel)
    zero_point = tl.load(zero_point_ptr + channel).to(tl.float32)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    u = round_half_even(x * tl.div_rn(1.0, scale)) + zero_point
    # The lower bound first: maximum drops NaN, which so becomes qmin.
    q = tl.minimum(tl.maximum(u, qmin.to(tl.float32)), qmax.to(tl.float32))
    tl.store(out_ptr + offs, (q - zero_point) * scale, mask=mask)


@triton.jit
def _backward_kernel(
    x_ptr, scale_ptr, zero_point_ptr, grad_ptr, dx_ptr, partial_ptr, channels, rows, cols, col_blocks, qmin, qmax,
    CHANNEL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, LSQ: tl.constexpr,
):  # fmt: skip
    """dx = where(inside, grad, 0); with LSQ also this tile's sum per channel of grad * d x_hat / d scale."""
    offs, mask, channel = _tile(channels, rows, cols, col_blocks, CHANNEL, BLOCK_ROWS, BLOCK_COLS)
    scale = tl.load(scale_ptr + channel)
    zero_point = tl.load(zero_point_ptr + channel).to(tl.float32)
    low, high = qmin.to(tl.float32), qmax.to(tl.float32)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    v = x * tl.div_rn(1.0, scale)
    u = round_half_even(v) + zero_point
    inside = (u >= low) & (u <= high)
    tl.store(dx_ptr + offs, tl.where(inside, grad, 0.0), mask=mask)
    if LSQ:
        q = tl.minimum(tl.maximum(u, low), high)
        slope = grad * ((q - zero_point) - tl.where(inside, v, 0.0))
        row_block = (tl.program_id(0) // col_blocks).to(tl.int64)
        col_block = tl.program_id(0) % col_blocks
        if CHANNEL == "col":
            col = col_block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
            tl.store(partial_ptr + row_block * cols + col, tl.sum(slope, axis=0), mask=col < cols)
        else:
            row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            tl.store(partial_ptr + row * col_blocks + col_block, tl.sum(slope, axis=1), mask=row < rows)


class _Matrix(NamedTuple):
    """A dense tensor in memory order, tiled for the kernels.

    By `kind` the channels are its rows ("row"), its rows again and again ("plane") or its columns ("col"), or there is
    one channel and one row ("tensor").
    """

    channels: int
    rows: int
    cols: int
    kind: str
    block_rows: int
    block_cols: int

    @classmethod
    def of(cls, x: Tensor, axis: int | None) -> "_Matrix":
        channels = 1 if axis is None else x.shape[axis]
        if axis is None or channels == 1:
            kind, cols = "tensor", x.numel()
        elif x.stride(axis) == 1:
            kind, cols = "col", channels
        else:
            cols = x.stride(axis)
            kind = "row" if cols * channels == x.numel() else "plane"
        rows = x.numel() // cols if cols else 0
        block_cols = min(_COLUMNS if kind == "col" else _TILE, next_power_of_2(cols))
        return cls(channels, rows, cols, kind, min(_TILE // block_cols, next_power_of_2(rows)), block_cols)

    def row_blocks(self) -> int:
        return ceil_div(self.rows, self.block_rows)

    def col_blocks(self) -> int:
        return ceil_div(self.cols, self.block_cols)

    def launch(self, kernel: Any, tensors: tuple[Tensor | None, ...], qmin: int, qmax: int, **options: Any) -> None:
        sizes = (self.channels, self.rows, self.cols, self.col_blocks(), qmin, qmax)
        blocks: dict[str, Any] = {"CHANNEL": self.kind, "BLOCK_ROWS": self.block_rows, "BLOCK_COLS": self.block_cols}
        launch("fake_quantize", kernel, self.row_blocks() * self.col_blocks(), *tensors, *sizes, **blocks, **options)


def _dense(tensor: Tensor, layout: Tensor) -> Tensor:
    """`tensor` with the strides of `layout`, copied only if it has others."""
    return tensor if tensor.stride() == layout.stride() else torch.empty_like(layout, dtype=tensor.dtype).copy_(tensor)


def _launch_forward(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    out = torch.empty_like(x, dtype=out_dtype)
    x = _dense(x, out)
    tensors = (x, scale.contiguous(), zero_point.contiguous(), out)
    _Matrix.of(x, axis).launch(_forward_kernel, tensors, qmin, qmax)
    return out


def _launch_backward(
    lsq: bool, grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None
) -> tuple[Tensor, Tensor | None]:
    dx = torch.empty_like(x)
    x = _dense(x, dx)
    matrix = _Matrix.of(x, axis)
    if not lsq:
        partial = None
    elif matrix.kind == "col":
        partial = scale.new_empty(matrix.row_blocks(), matrix.channels, 1)
    else:
        periods = matrix.rows // matrix.channels if matrix.channels else 0
        partial = scale.new_empty(periods, matrix.channels, matrix.col_blocks())
    tensors = (x, scale.contiguous(), zero_point.contiguous(), _dense(grad, dx), dx, partial)
    matrix.launch(_backward_kernel, tensors, qmin, qmax, LSQ=lsq)
    # Partial sums added in a fixed order, not atomically: the same input always gives the same bits.
    return dx, None if partial is None else partial.sum((0, 2)).reshape(scale.shape)


_ARGUMENTS = "Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax, int? axis"

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


_fake_quantize = register_op(
    f"fake_quantize({_ARGUMENTS}) -> Tensor",
    cpu=reference.fake_quantize,
    cuda=_launch_forward,
    fake=lambda x, *_: torch.empty_like(x),
    setup_context=_save,
    backward=_backward,
)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None = None
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

    Returns:
        A tensor with the shape, type and layout of `x` (a tensor with gaps gives a dense one). +Inf becomes the largest
        value of the grid, -Inf and NaN the smallest.

    Gradients: of `x` the incoming gradient where the unclamped code lies in [qmin, qmax], else 0 (straight-through). Of
    `scale`, only computed if it requires one, the sum of g * (rint(v) - v) inside, g * (qmin - zero_point) below and
    g * (qmax - zero_point) above, with v = x / scale (LSQ, Esser et al. 2020, eq. 3); repeatable bit for bit.

    Exactness: in float32 equal to `torch.fake_quantize_per_tensor_affine` in each channel, bit for bit; bfloat16 and
    float16 are computed in float32 and rounded once.

    Raises:
        KernelError: a type, shape, device, axis or grid that does not fit.
    """
    who = "fake_quantize"
    _check.check_input(who, "x", x)
    shapes: tuple[tuple[int, ...], ...] = ((), (1,))
    meaning = "for one scale per tensor (axis=None)"
    if axis is not None:
        meaning = f"= x.shape[axis={axis}]"
        axis = _check.check_axis(who, axis, x)
        shapes = ((x.shape[axis],),)
    _check.check_parameter(who, "scale", scale, x, shapes, meaning, torch.float32)
    _check.check_parameter(who, "zero_point", zero_point, x, (tuple(scale.shape),), "like scale", torch.int32)
    if not -_CODE_LIMIT <= qmin < qmax <= _CODE_LIMIT:
        raise KernelError(
            f"{who}: codes go from qmin={qmin} to qmax={qmax}, expected {-_CODE_LIMIT} <= qmin < qmax <= {_CODE_LIMIT}"
        )
    result: Tensor = _fake_quantize(x, scale, zero_point, qmin, qmax, axis)
    return result
