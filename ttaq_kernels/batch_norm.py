"""Batch norm whose statistics are a mixture of the source's and the batch's.

    mean = (1 - alpha) source_mean + alpha batch_mean
    var  = (1 - alpha) source_var  + alpha batch_var        biased: over M = N * S elements, S positions per image
    y    = (x - mean) (rstd weight) + bias                  rstd = 1 / sqrt(var + eps)

Gradients, through the batch's share of the statistics:

    dbias   = sum dy
    dweight = rstd sum dy (x - mean)
    dx      = rstd weight (dy - alpha dbias / M - (x - batch_mean) rstd alpha dweight / M)

Statistics and arithmetic are fp32, sums deterministic (see `moments`). Bytes per element of a 2-byte tensor: forward 6
(x twice, y), at alpha 0 only 4; backward 10 (x and dy twice, dx), 4 if `x` needs no gradient or, at alpha 0, only `x`
needs one. Called by `ttaq.nn.AdaptiveBatchNorm2d`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ttaq_kernels import _check
from ttaq_kernels._channels import Tiles, check_channels, evenly_spaced, laid_out_like, offsets, tile
from ttaq_kernels._launch import launch, tl, triton
from ttaq_kernels._library import register_op
from ttaq_kernels.errors import KernelError
from ttaq_kernels.moments import launch_moments
from ttaq_kernels.reference import batch_norm as reference

# Device functions stay without types: Triton has none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

__all__ = ["batch_norm"]

_WHO = "batch_norm"
_WARPS = 8


@triton.jit
def _forward_kernel(
    x_ptr,
    moments_ptr,
    source_mean_ptr,
    source_var_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    statistics_ptr,
    keep,
    alpha,
    eps,
    sizes,
    strides,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """y = (x - mean) (rstd weight) + bias; statistics[:, c] = mean, rstd, batch_mean; keep = 1 - alpha"""
    channels, positions, columns = sizes[0], sizes[1], sizes[2]
    program = tl.program_id(0)
    image, offs_c, offs_s = tile(program // columns, program % columns, positions, BLOCK_C, BLOCK_S)
    mask_c = offs_c < channels
    mask = mask_c & (offs_s < positions)
    batch_mean = tl.zeros((BLOCK_C, 1), tl.float32)
    var = tl.zeros((BLOCK_C, 1), tl.float32)
    if moments_ptr is not None:
        batch_mean = tl.load(moments_ptr + offs_c, mask=mask_c, other=0.0)
        var = tl.load(moments_ptr + channels + offs_c, mask=mask_c, other=0.0)
    mean = batch_mean
    if source_mean_ptr is not None:
        mean = keep * tl.load(source_mean_ptr + offs_c, mask=mask_c, other=0.0) + alpha * batch_mean
        var = keep * tl.load(source_var_ptr + offs_c, mask=mask_c, other=0.0) + alpha * var
    rstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    if program < columns:
        tl.store(statistics_ptr + offs_c, mean, mask=mask_c)
        tl.store(statistics_ptr + channels + offs_c, rstd, mask=mask_c)
        tl.store(statistics_ptr + 2 * channels + offs_c, batch_mean, mask=mask_c)
    factor = rstd
    if weight_ptr is not None:
        factor = rstd * tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0)
    x = tl.load(x_ptr + offsets(image, offs_c, offs_s, strides[0]), mask=mask, other=0.0).to(tl.float32)
    y = (x - mean) * factor
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0)
    tl.store(y_ptr + offsets(image, offs_c, offs_s, strides[1]), y, mask=mask)


@triton.jit
def _sums_kernel(
    x_ptr,
    grad_ptr,
    statistics_ptr,
    parts_ptr,
    sizes,
    split,
    strides,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """parts[:, part, c] = rstd sum dy (x - mean), sum dy over the chunks of one part"""
    channels, positions, columns = sizes[0], sizes[1], sizes[2]
    chunks, per_part, parts = split[0], split[1], split[2]
    program = tl.program_id(0)
    column, part = program % columns, program // columns
    offs_c = column.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    mean = tl.load(statistics_ptr + offs_c, mask=mask_c, other=0.0)[:, None]
    total = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    dot = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    for chunk in range(part * per_part, tl.minimum((part + 1) * per_part, chunks)):
        image, rows, offs_s = tile(chunk, column, positions, BLOCK_C, BLOCK_S)
        mask = (rows < channels) & (offs_s < positions)
        x = tl.load(x_ptr + offsets(image, rows, offs_s, strides[0]), mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offsets(image, rows, offs_s, strides[1]), mask=mask, other=0.0).to(tl.float32)
        total += grad
        dot += grad * (x - mean)
    rstd = tl.load(statistics_ptr + channels + offs_c, mask=mask_c, other=0.0)
    out_ptr = parts_ptr + part.to(tl.int64) * channels + offs_c
    tl.store(out_ptr, rstd * tl.sum(dot, axis=1), mask=mask_c)
    tl.store(out_ptr + parts * channels, tl.sum(total, axis=1), mask=mask_c)


@triton.jit
def _input_gradient_kernel(
    x_ptr,
    grad_ptr,
    weight_ptr,
    statistics_ptr,
    sums_ptr,
    dx_ptr,
    share,
    sizes,
    strides,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dx = rstd weight (dy - share dbias - (x - batch_mean) share rstd dweight), share = alpha / M"""
    channels, positions, columns = sizes[0], sizes[1], sizes[2]
    program = tl.program_id(0)
    image, offs_c, offs_s = tile(program // columns, program % columns, positions, BLOCK_C, BLOCK_S)
    mask_c = offs_c < channels
    mask = mask_c & (offs_s < positions)
    rstd = tl.load(statistics_ptr + channels + offs_c, mask=mask_c, other=0.0)
    dx = tl.load(grad_ptr + offsets(image, offs_c, offs_s, strides[1]), mask=mask, other=0.0).to(tl.float32)
    if sums_ptr is not None:
        batch_mean = tl.load(statistics_ptr + 2 * channels + offs_c, mask=mask_c, other=0.0)
        slope = share * rstd * tl.load(sums_ptr + offs_c, mask=mask_c, other=0.0)
        constant = share * tl.load(sums_ptr + channels + offs_c, mask=mask_c, other=0.0)
        x = tl.load(x_ptr + offsets(image, offs_c, offs_s, strides[0]), mask=mask, other=0.0).to(tl.float32)
        dx = (dx - constant) - (x - batch_mean) * slope
    factor = rstd
    if weight_ptr is not None:
        factor = rstd * tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0)
    tl.store(dx_ptr + offsets(image, offs_c, offs_s, strides[2]), dx * factor, mask=mask)


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _launch_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    source_mean: Tensor | None,
    source_var: Tensor | None,
    alpha: float,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, dtype=out_dtype)
    if x.numel() == 0:
        return y, x.new_zeros(3, x.shape[1], dtype=torch.float32)
    statistics = x.new_empty(3, x.shape[1], dtype=torch.float32)
    x = x if evenly_spaced(x) else x.contiguous()
    out = y if evenly_spaced(y) else torch.empty_like(x, dtype=y.dtype)
    moments = launch_moments(x, _WHO) if alpha > 0 else None
    source = (_dense(source_mean), _dense(source_var)) if alpha < 1 else (None, None)
    tiles = Tiles.of(x, out)
    tensors = (x, moments, *source, _dense(weight), _dense(bias), out, statistics)
    arguments = (*tensors, 1.0 - alpha, alpha, eps, tiles.sizes, tiles.strides)
    launch(_WHO, _forward_kernel, tiles.columns * tiles.chunks, *arguments, **tiles.blocks, num_warps=_WARPS)
    return y if out is y else y.copy_(out), statistics


def _launch_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    alpha: float,
    need_x: bool,
    need_affine: bool,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x, dtype=out_dtype) if need_x else x.new_empty(0)
    x = x if evenly_spaced(x) else x.contiguous()
    out = dx if evenly_spaced(dx) or not need_x else torch.empty_like(x, dtype=dx.dtype)
    grad = laid_out_like(grad, x)
    sums = None
    if need_affine or alpha > 0:
        tiles = Tiles.of(x, grad)
        chunks, per_part, parts = tiles.reducing()
        partial = x.new_empty(2, parts, tiles.channels, dtype=torch.float32)
        split = (chunks, per_part, parts)
        tensors: tuple[Tensor | None, ...] = (x, grad, statistics, partial)
        sizes: tuple[object, ...] = (tiles.sizes, split, tiles.strides)
        launch(_WHO, _sums_kernel, tiles.columns * parts, *tensors, *sizes, **tiles.blocks, num_warps=_WARPS)
        sums = partial.sum(1)
    if need_x:
        tiles = Tiles.of(x, grad, out)
        share = alpha * tiles.channels / max(x.numel(), 1)
        tensors = (x, grad, _dense(weight), statistics, sums if alpha > 0 else None, out)
        sizes = (share, tiles.sizes, tiles.strides)
        programs = tiles.columns * tiles.chunks
        launch(_WHO, _input_gradient_kernel, programs, *tensors, *sizes, **tiles.blocks, num_warps=_WARPS)
    if out is not dx:
        dx.copy_(out)
    return dx, sums if need_affine and sums is not None else statistics.new_empty(0)


def _fake_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(3, x.shape[1], dtype=torch.float32)


def _fake_backward(
    _grad: Tensor, x: Tensor, _weight: Tensor, statistics: Tensor, _alpha: float, need_x: bool, need_affine: bool
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    return dx, statistics.new_empty((2, x.shape[1]) if need_affine else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.alpha = inputs[5]


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    dx, affine = _batch_norm_backward(grad, *ctx.saved_tensors, ctx.alpha, need_x, need_weight or need_bias)
    dweight, dbias = affine[0] if need_weight else None, affine[1] if need_bias else None
    return dx if need_x else None, dweight, dbias, None, None, None, None


_batch_norm_backward = register_op(
    "batch_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor statistics, float alpha, bool need_x,"
    " bool need_affine) -> (Tensor, Tensor)",
    cpu=reference.batch_norm_backward,
    cuda=_launch_backward,
    fake=_fake_backward,
)
_batch_norm = register_op(
    "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? source_mean, Tensor? source_var, float alpha,"
    " float eps) -> (Tensor, Tensor)",
    cpu=reference.batch_norm_forward,
    cuda=_launch_forward,
    fake=_fake_forward,
    setup_context=_save,
    backward=_backward,
)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    source_mean: Tensor | None,
    source_var: Tensor | None,
    alpha: float = 1.0,
    eps: float = 1e-5,
) -> Tensor:
    """Batch norm with a mixture of source and batch statistics.

        mean = (1 - alpha) source_mean + alpha batch_mean,  var = (1 - alpha) source_var + alpha batch_var  (biased)
        y = (x - mean) / sqrt(var + eps) * weight + bias

    Args:
        x: float32, bfloat16 or float16, [N, C, *], any memory layout. A channel of one element has variance 0.
        weight, bias: float32 [C]; None for 1 and 0.
        source_mean, source_var: float32 [C], taken as constants; may be None at alpha 1.
        alpha: the batch's share, from 0 (its moments are not computed) to 1 (the source is not used).
        eps: added to the variance, > 0.

    Returns:
        A tensor with the shape, type and memory layout of `x` (a tensor with gaps gives a dense one).

    Gradients: of `x`, also through the batch's share of the statistics, of `weight` and of `bias`; none of the source.

    Exactness: arithmetic in float32, results rounded once; repeatable bit for bit.

    Raises:
        KernelError: a type, shape or device that does not fit, `alpha` outside [0, 1], `eps` not above 0.

    Source: alpha = 1 is test-time batch norm, alpha = B / (B + N) the prior of Schneider et al. (arXiv 2006.16971).
    """
    _check.check_input(_WHO, "x", x)
    check_channels(_WHO, x)
    if not 0 <= alpha <= 1:
        raise KernelError(f"{_WHO}: alpha is {alpha}, expected 0 (source statistics) to 1 (those of the batch)")
    if not 0 < eps < math.inf:
        raise KernelError(f"{_WHO}: eps is {eps}, expected a positive number such as 1e-5")
    if (source_mean is None) != (source_var is None):
        missing = "source_mean" if source_mean is None else "source_var"
        raise KernelError(f"{_WHO}: {missing} is None, expected source_mean and source_var together, or neither")
    if source_mean is None and alpha < 1:
        raise KernelError(f"{_WHO}: alpha is {alpha}, expected 1 without source_mean and source_var; give both of them")
    vectors = {"weight": weight, "bias": bias, "source_mean": source_mean, "source_var": source_var}
    for name, vector in vectors.items():
        if vector is not None:
            _check.check_parameter(_WHO, name, vector, x, [(x.shape[1],)], "= (x.shape[1],)", torch.float32)
    y: Tensor = _batch_norm(x, weight, bias, source_mean, source_var, float(alpha), float(eps))[0]
    return y
