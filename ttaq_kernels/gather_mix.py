"""The input of a unit: rows of two caches, mixed element by element.

    out[i] = where(kept, x_q[index[i]], x_fp[index[i]])        kept with probability keep_quantized, see `_philox`
    x_q    = quantized, or (quantized - zero_point) * scale of uint8 codes

`quantized` is what the quantized layers before the unit give, `floating` what they would give in float (QDrop). Every
row starts another call of the random numbers, so their order in memory is that of the row.

Bytes per element of 2-byte tensors: 6, with codes 5; out of place. Called by the training loop of reconstruction.
"""

from typing import Any

import torch
from torch import Tensor

from ttaq_kernels import _check
from ttaq_kernels._launch import ceil_div, launch, next_power_of_2, tl, triton
from ttaq_kernels._library import register_op
from ttaq_kernels._matrix import rows_are_dense
from ttaq_kernels._philox import SMALLEST_BLOCK, Drop, check_drop, kept
from ttaq_kernels.errors import KernelError
from ttaq_kernels.reference import gather_mix as reference

# Device functions stay without types: Triton has none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

__all__ = ["gather_mix"]

_WHO = "gather_mix"
_TILE = 2048  # elements of one program


@triton.jit
def _kernel(
    quantized_ptr, floating_ptr, index_ptr, seed_ptr, scale_ptr, zero_point_ptr, out_ptr, per_row, blocks, threshold,
    BITS: tl.constexpr, BLOCK: tl.constexpr, CALL: tl.constexpr,
):  # fmt: skip
    """One block of one row of out; CALL is what the random numbers of a row are padded to."""
    program = tl.program_id(0)
    row, first = (program // blocks).to(tl.int64), (program % blocks).to(tl.int64) * BLOCK
    offs = first + tl.arange(0, BLOCK)
    mask = offs < per_row
    source = tl.load(index_ptr + row) * per_row + offs
    out = tl.load(quantized_ptr + source, mask=mask, other=0).to(tl.float32)
    if scale_ptr is not None:
        out = (out - tl.load(zero_point_ptr).to(tl.float32)) * tl.load(scale_ptr)
    if BITS:
        keep = kept(seed_ptr, row * (tl.cdiv(per_row, CALL) * CALL) + first, threshold, BITS, BLOCK)
        out = tl.where(keep, out, tl.load(floating_ptr + source, mask=mask, other=0.0).to(tl.float32))
    tl.store(out_ptr + row * per_row + offs, out, mask=mask)


def _out(floating: Tensor, index: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    per_row = floating[:1].numel()
    strides = (per_row, *floating.stride()[1:])
    return floating.new_empty_strided((len(index), *floating.shape[1:]), strides, dtype=dtype or floating.dtype)


def _launch(
    quantized: Tensor,
    floating: Tensor,
    index: Tensor,
    keep_quantized: float,
    seed: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    out, drop = _out(floating, index, out_dtype), Drop.of(keep_quantized)
    per_row = floating[:1].numel()
    block = max(SMALLEST_BLOCK, min(_TILE, next_power_of_2(per_row)))
    blocks = ceil_div(per_row, block)
    tensors = (quantized, floating, index.contiguous(), seed, scale, zero_point, out)
    options = {"BITS": drop.bits, "BLOCK": block, "CALL": SMALLEST_BLOCK}
    launch(_WHO, _kernel, len(index) * blocks, *tensors, per_row, blocks, drop.threshold, **options)
    return out


def _fake(quantized: Tensor, floating: Tensor, index: Tensor, *_: Any) -> Tensor:  # noqa: ARG001
    return _out(floating, index)


_gather_mix = register_op(
    "gather_mix(Tensor quantized, Tensor floating, Tensor index, float keep_quantized, Tensor seed, "
    "Tensor? scale, Tensor? zero_point) -> Tensor",
    cpu=reference.gather_mix,
    cuda=_launch,
    fake=_fake,
)


def gather_mix(
    quantized: Tensor,
    floating: Tensor,
    index: Tensor,
    keep_quantized: float,
    seed: Tensor,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> Tensor:
    """A batch of rows of two caches: of each element `quantized` with probability `keep_quantized`, else `floating`.

    Args:
        quantized: [rows, ...], float32, bfloat16 or float16; or uint8 codes, with `scale` and `zero_point`.
        floating: its shape and strides, float32, bfloat16 or float16. Both dense, row after row in memory (contiguous
            and channels_last are).
        index: int64 [N], the rows to take, also repeatedly. On a GPU not checked to be below the number of rows: that
            would wait for the device.
        keep_quantized: probability, rounded to a multiple of 1/256.
        seed: int64, shape () or (1,): what the elements are drawn with, by their place in the batch.
        scale, zero_point: float32 and int32, shape () or (1,): of uint8 codes, x = (code - zero_point) * scale.

    Returns:
        [N, ...] in the type of `floating` and the layout of its rows. No gradients.

    Raises:
        KernelError: a type, shape, layout, device or probability that does not fit.

    Source: QDrop (arXiv 2203.05740).
    """
    _check.check_input(_WHO, "floating", floating)
    types = _check.FLOAT_TYPES if scale is None else (torch.uint8,)
    _check.check_input(_WHO, "quantized", quantized, types)
    if floating.ndim == 0 or quantized.shape != floating.shape or quantized.device != floating.device:
        raise KernelError(
            f"{_WHO}: quantized is {tuple(quantized.shape)} on {quantized.device} and floating {tuple(floating.shape)} "
            f"on {floating.device}, expected rows of the same shape on the same device"
        )
    if not (rows_are_dense(floating) and quantized.stride() == floating.stride()):
        raise KernelError(
            f"{_WHO}: quantized has strides {quantized.stride()} and floating {floating.stride()}, expected the same, "
            "dense and row after row; make both contiguous or both channels_last"
        )
    check_drop(_WHO, keep_quantized, seed, floating)
    _check.check_input(_WHO, "index", index, (torch.int64,))
    if index.ndim != 1 or index.device != floating.device:
        raise KernelError(
            f"{_WHO}: index has shape {tuple(index.shape)} on {index.device}, expected [N] on {floating.device}"
        )
    if (scale is None) != (zero_point is None):
        raise KernelError(f"{_WHO}: got one of scale and zero_point, expected both or neither")
    if scale is not None and zero_point is not None:
        shapes: tuple[tuple[int, ...], ...] = ((), (1,))
        _check.check_parameter(_WHO, "scale", scale, floating, shapes, "for one scale", torch.float32)
        _check.check_parameter(_WHO, "zero_point", zero_point, floating, shapes, "for one zero point", torch.int32)
    mixed: Tensor = _gather_mix(quantized, floating, index, keep_quantized, seed, scale, zero_point)
    return mixed
