"""Launchers of the kernels in `_batch_norm_kernels`, for `batch_norm` and `norm_act_quant`."""

import math

import torch
from torch import Tensor

from ttaq_kernels import _batch_norm_kernels as kernels
from ttaq_kernels._channels import Tiles, dense_bytes, evenly_spaced, laid_out_like
from ttaq_kernels._launch import launch
from ttaq_kernels.moments import launch_parts, merging
from ttaq_kernels.reference.batch_norm import mixed_statistics
from ttaq_kernels.reference.norm_act_quant import PLAIN, Epilogue, stored_shift
from ttaq_kernels.reference.pack import BLOCK_BYTES, kernel_bytes

__all__ = ["launch_backward", "launch_forward"]

_WARPS = 8


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _launch_statistics(
    who: str,
    x: Tensor,
    source: tuple[Tensor | None, Tensor | None],
    scale: Tensor | None,
    sample_mask: Tensor | None,
    alpha: float,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """[5, C] and 1 / scale; every thread would otherwise take the roots and quotients again."""
    channels = x.shape[1]
    partial = launch_parts(who, x, sample_mask) if alpha > 0 else None
    statistics = x.new_empty(kernels.STATISTICS, channels, dtype=torch.float32)
    parts = 1 if partial is None else partial.shape[1]
    inverse = None if scale is None else torch.empty_like(scale)
    programs, options = merging(channels, parts)
    tensors = (statistics, inverse, partial, *map(_dense, source), scale)
    numbers = (channels, parts, 1.0 - alpha, alpha, eps)
    launch(who, kernels.statistics_kernel, programs, *tensors, *numbers, **options)
    return statistics, inverse


def launch_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    source_mean: Tensor | None,
    source_var: Tensor | None,
    sample_mask: Tensor | None,
    alpha: float,
    eps: float,
    *,
    who: str = "batch_norm",
    after: Epilogue = PLAIN,
    output: str = "values",
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`y`, the statistics [5, C], and for codes the tensor that carries their gradient; for values an empty one."""
    row_bytes = kernel_bytes(x.shape[1], 4)
    if output == "packed":
        y = x.new_empty(x.shape[0] * math.prod(x.shape[2:]), row_bytes, dtype=torch.uint8)
    else:
        y = torch.empty_like(x, dtype=torch.int8 if output == "codes" else out_dtype)
    carrier = x.new_empty(0) if output == "values" else x.new_empty((1,) * x.ndim).expand(x.shape)
    if x.numel() == 0:
        zeros = x.new_zeros(x.shape[1], dtype=torch.float32)
        return y, mixed_statistics(zeros, zeros, 0, source_mean, source_var, alpha, eps), carrier
    x = x if evenly_spaced(x) else x.contiguous()
    # The source also stands in for a batch without a selected sample.
    source = (source_mean, source_var) if alpha < 1 or sample_mask is not None else (None, None)
    statistics, inverse = _launch_statistics(who, x, source, after.scale, sample_mask, alpha, eps)
    out = y if output == "packed" or evenly_spaced(y) else torch.empty_like(x, dtype=y.dtype)
    residual = None if after.residual is None else laid_out_like(after.residual, x)
    laid_out = (x, x if residual is None else residual, x if output == "packed" else out)
    tiles = Tiles.of(*laid_out, pairs_of=BLOCK_BYTES if output == "packed" else None).over_images()
    tensors = (x, residual, _dense(weight), _dense(bias), after.scale, after.zero_point, out, statistics, inverse)
    numbers = (after.qmin, after.qmax, stored_shift(after.qmax), row_bytes)
    arguments = (*tensors, None if output == "values" else carrier, *numbers, tiles.sizes, tiles.strides)
    options = {"ACT": after.act, "OUTPUT": output, "BLOCK_N": tiles.block_n, **tiles.blocks}
    # Half as many for a tile of one image: 32 of its elements then share what a thread knows of a channel.
    warps = _WARPS if tiles.block_n > 1 else _WARPS // 2
    launch(who, kernels.forward_kernel, tiles.columns * tiles.chunks, *arguments, **options, num_warps=warps)
    return y if out is y else y.copy_(out), statistics, carrier


def launch_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    sample_mask: Tensor | None,
    alpha: float,
    need_x: bool,
    need_affine: bool,
    need_residual: bool,
    *,
    who: str = "batch_norm",
    after: Epilogue = PLAIN,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dx`, [2, C]: dweight and dbias, and dresidual; what is not needed comes back empty."""
    nothing = x.new_empty(0)
    dx = torch.empty_like(x, dtype=out_dtype) if need_x else nothing
    dresidual = torch.empty_like(x) if need_residual else nothing
    x = x if evenly_spaced(x) else x.contiguous()
    grad = laid_out_like(grad, x)
    vectors = (_dense(weight), _dense(bias), after.scale, after.zero_point) if after.clips else (None,) * 4
    residual = laid_out_like(after.residual, x) if after.clips and after.residual is not None else None
    passed = None
    if need_residual and after.clips:
        passed = dresidual if evenly_spaced(dresidual) else torch.empty_like(x)
    sums = None
    if need_affine or alpha > 0 or passed is not None:
        tiles = Tiles.of(x, grad, x if residual is None else residual, x if passed is None else passed)
        chunks, per_part, parts = tiles.reducing()
        partial = x.new_empty(2, parts, tiles.channels, dtype=torch.float32)
        tensors: tuple[Tensor | None, ...] = (x, grad, residual, *vectors, statistics, passed, partial)
        sizes: tuple[object, ...] = (after.qmin, after.qmax, tiles.sizes, (chunks, per_part, parts), tiles.strides)
        options = {"ACT": after.act, "CLIPS": after.clips, **tiles.blocks}
        # Two sums and what was clipped take more registers than the threads of 8 warps should have.
        launch(who, kernels.sums_kernel, tiles.columns * parts, *tensors, *sizes, **options, num_warps=2 * _WARPS)
        sums = partial.sum(1)
    if passed is not None:
        # What was clipped is 0 in it already: the pass below reads it instead of dy and the residual.
        grad, after, residual, vectors = passed, PLAIN, None, (None,) * 4
    if need_x:
        out = dx if evenly_spaced(dx) else torch.empty_like(x, dtype=dx.dtype)
        tiles = Tiles.of(x, grad, x if residual is None else residual, out).over_images()
        through = sums if alpha > 0 else None
        tensors = (x, grad, residual, _dense(weight), *vectors[1:], statistics, through, dense_bytes(sample_mask), out)
        sizes = (after.qmin, after.qmax, tiles.sizes, tiles.strides)
        options = {"ACT": after.act, "CLIPS": after.clips, "BLOCK_N": tiles.block_n, **tiles.blocks}
        programs = tiles.columns * tiles.chunks
        launch(who, kernels.input_gradient_kernel, programs, *tensors, *sizes, **options, num_warps=_WARPS)
        if out is not dx:
            dx.copy_(out)
    if need_residual and passed is not dresidual:
        dresidual.copy_(grad)
    return dx, sums if need_affine and sums is not None else statistics.new_empty(0), dresidual
