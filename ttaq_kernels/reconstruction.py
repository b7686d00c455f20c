"""What a unit's output misses of its target: last activation quantizer, loss and gradients in one pass.

    a     = relu(h + residual)                          either part as asked for
    x_hat = fake_quantize(a), with QDrop                see `fake_quantize`
    loss  = sum (x_hat - target)^2 / M                  M = N * positions: a mean over them of a sum over channels

    dh     = where(h + residual > 0, d x_hat / da  2 (x_hat - target) / M, 0)
    dscale = the sum of d x_hat / dscale times the same

The output of the unit is never written. Bytes per element of a 2-byte tensor: 6 (h, target, dh) and 2 for a residual;
the backward pass of autograd multiplies dh by the gradient of the loss, 4. Sums are deterministic, in two stages.
Called by the training loop of reconstruction.
"""

from typing import Any

import torch
from torch import Tensor

from ttaq_kernels import _check
from ttaq_kernels._grid import check_grid
from ttaq_kernels._launch import tl, triton
from ttaq_kernels._library import register_op
from ttaq_kernels._math import reciprocal, round_within, rounds_within
from ttaq_kernels._matrix import Matrix, dense, tile
from ttaq_kernels._philox import Drop, check_drop, kept
from ttaq_kernels.errors import KernelError
from ttaq_kernels.reference import reconstruction as reference

# Device functions stay without types: Triton has none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

__all__ = ["reconstruction_loss"]

_WHO = "reconstruction_loss"


@triton.jit
def _kernel(
    h_ptr, target_ptr, residual_ptr, scale_ptr, zero_point_ptr, seed_ptr, dh_ptr, partial_ptr,
    channels, rows, cols, col_blocks, qmin, qmax, threshold, share,
    CHANNEL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    BITS: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """dh, and this tile's share of the loss and of dscale; share = 1 / M"""
    offs, mask, _, _ = tile(channels, rows, cols, col_blocks, CHANNEL, BLOCK_ROWS, BLOCK_COLS)
    before = tl.load(h_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        before += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    # Not a maximum, which would hide NaN.
    a = tl.where(before < 0.0, 0.0, before) if RELU else before
    x_hat = a
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
        zero_point = tl.load(zero_point_ptr)
        low, high = qmin - zero_point, qmax - zero_point
        quantized = a
        if BITS:
            # What passes as it is has the gradients of a zero: 1 to a, 0 to scale.
            keep = kept(seed_ptr, tl.program_id(0).to(tl.int64) * BLOCK_COLS, threshold, BITS, BLOCK_COLS)[None, :]
            quantized = tl.where(keep, a, 0.0)
        v = quantized * reciprocal(scale)
        inside = rounds_within(v, low, high)
        code = round_within(v, low, high)
        x_hat = code * scale
        if BITS:
            x_hat = tl.where(keep, x_hat, a)
    e = x_hat - tl.load(target_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    g = (2.0 * e) * share
    program = tl.program_id(0).to(tl.int64)
    tl.store(partial_ptr + program, tl.sum(tl.where(mask, e * e, 0.0)) * share)
    if scale_ptr is not None:
        slope = (code - tl.where(inside, v, 0.0)) * g
        tl.store(partial_ptr + col_blocks + program, tl.sum(tl.where(mask, slope, 0.0)))
        g = tl.where(inside, g, 0.0)
    if RELU:
        g = tl.where(before > 0.0, g, 0.0)
    tl.store(dh_ptr + offs, g, mask=mask)


def _dh_like(h: Tensor) -> Tensor:
    """Where dh goes. 1 / M is next to the smallest numbers of float16, before a scaled loss can lift it: float32."""
    return torch.empty_like(h, dtype=torch.float32 if h.dtype is torch.float16 else h.dtype)


def _launch(
    h: Tensor,
    target: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    relu: bool,
    keep_quantized: float,
    seed: Tensor | None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dh = _dh_like(h) if out_dtype is None else torch.empty_like(h, dtype=out_dtype)
    matrix = Matrix.of(dh, None)
    shape = () if scale is None else scale.shape
    if h.numel() == 0:
        return h.new_full((), torch.nan, dtype=torch.float32), dh, h.new_zeros(shape, dtype=torch.float32)
    share, drop = h.shape[1] / h.numel(), Drop.of(keep_quantized if scale is not None else 1.0)
    partial = h.new_empty(2, matrix.col_blocks(), dtype=torch.float32)
    if scale is None:
        partial[1].zero_()
    tensors = (
        dense(h, dh), dense(target, dh), None if residual is None else dense(residual, dh),
        scale, zero_point, seed, dh, partial,
    )  # fmt: skip
    matrix.launch(_WHO, _kernel, tensors, qmin, qmax, drop.threshold, share, BITS=drop.bits, RELU=relu)
    return partial[0].sum(), dh, partial[1].sum().reshape(shape)


def _fake(h: Tensor, _: Tensor, __: Tensor | None, scale: Tensor | None, *_rest: Any) -> tuple[Tensor, ...]:
    loss = h.new_empty((), dtype=torch.float32)
    return loss, _dh_like(h), torch.empty_like(loss if scale is None else scale)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.dtypes = inputs[0].dtype, inputs[2].dtype if inputs[2] is not None else None
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dh, dscale = ctx.saved_tensors
    dx = grad * dh
    needs = ctx.needs_input_grad
    of_h = dx.to(ctx.dtypes[0]) if needs[0] else None
    of_residual = dx.to(ctx.dtypes[1]) if needs[2] else None
    return of_h, None, of_residual, grad * dscale if needs[3] else None, *(None,) * 6


_reconstruction_loss = register_op(
    f"{_WHO}(Tensor h, Tensor target, Tensor? residual, Tensor? scale, Tensor? zero_point, int qmin, int qmax, "
    "bool relu, float keep_quantized, Tensor? seed) -> (Tensor, Tensor, Tensor)",
    cpu=reference.loss_and_gradients,
    cuda=_launch,
    fake=_fake,
    setup_context=_save,
    backward=_backward,
)


def reconstruction_loss(
    h: Tensor,
    target: Tensor,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    qmin: int = 0,
    qmax: int = 0,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    keep_quantized: float = 1.0,
    seed: Tensor | None = None,
) -> Tensor:
    """How far the quantized output of a unit is from its target: the mean over images and positions of
    sum_c (x_hat - target)^2, with the channels in dimension 1.

    Args:
        h: float32, bfloat16 or float16, [N, C, ...], any layout: the output before `residual`, ReLU and quantizer.
        target: the shape of `h`, any of these types.
        scale, zero_point, qmin, qmax: the grid of `fake_quantize`, one for the tensor. Without `scale` the output is
            not quantized.
        residual: the shape of `h`, any of these types; added to `h` in float32.
        relu: clamp the sum to >= 0.
        keep_quantized, seed: QDrop, as in `fake_quantize`: the same elements are drawn as there.

    Returns:
        float32, shape (); NaN for an empty batch.

    Gradients: of `h`, `residual` and `scale`, computed along with the loss; repeatable bit for bit. None of `target`.

    Exactness: the gradient of `h` in float32 is exact, operation by operation.

    Raises:
        KernelError: a type, shape, device, grid or probability that does not fit.

    Source: QDrop (arXiv 2203.05740).
    """
    _check.check_input(_WHO, "h", h)
    if h.ndim < 2:
        raise KernelError(f"{_WHO}: h has shape {tuple(h.shape)}, expected [N, C] or [N, C, ...]; unsqueeze it")
    for name, tensor in (("target", target), ("residual", residual)):
        if tensor is not None:
            _check.check_input(_WHO, name, tensor)
            if tensor.shape != h.shape or tensor.device != h.device:
                raise KernelError(
                    f"{_WHO}: {name} is {tuple(tensor.shape)} on {tensor.device}, "
                    f"expected {tuple(h.shape)} on {h.device} like h"
                )
    if (scale is None) != (zero_point is None):
        raise KernelError(f"{_WHO}: got one of scale and zero_point, expected both or neither")
    check_drop(_WHO, keep_quantized, seed, h)
    if scale is not None and zero_point is not None:
        check_grid(_WHO, h, scale, zero_point, qmin, qmax, None)
    elif keep_quantized < 1:
        raise KernelError(
            f"{_WHO}: keep_quantized is {keep_quantized} without scale, expected 1; there is no quantizer"
        )
    used = seed if keep_quantized < 1 else None
    loss: Tensor
    loss, _, _ = _reconstruction_loss(h, target, residual, scale, zero_point, qmin, qmax, relu, keep_quantized, used)
    return loss
