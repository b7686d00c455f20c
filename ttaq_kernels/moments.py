"""Mean and biased variance of each channel, over all images and positions: M = N * S elements.

    mean = sum x / M,  var = sum (x - mean)^2 / M

Deterministic, and the same on every GPU: a fixed number of programs keeps a running mean and M2 (sum of squared
deviations) per lane, and lanes and programs are merged in a fixed order (Chan, Golub, LeVeque 1983). So the variance
keeps its digits however far the mean is from 0, and a layer with few channels still fills a GPU.

Bytes per element of a 2-byte tensor: 2. Called by `batch_norm` and by methods that compare statistics.
"""

from typing import Any

import torch
from torch import Tensor

from ttaq_kernels import _check
from ttaq_kernels._channels import Tiles, check_channels, evenly_spaced, offsets, tile
from ttaq_kernels._launch import ceil_div, launch, next_power_of_2, tl, triton
from ttaq_kernels._library import register_op
from ttaq_kernels.reference import moments as reference

# Device functions stay without types: Triton has none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

__all__ = ["batch_norm_moments", "launch_moments"]

_MERGED_CHANNELS = 16
_WARPS = 8


@triton.jit
def _partial_kernel(x_ptr, parts_ptr, sizes, split, strides, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """parts[:, part, c] = count, mean and M2 of the chunks of one part"""
    channels, positions, columns = sizes[0], sizes[1], sizes[2]
    chunks, per_part, parts = split[0], split[1], split[2]
    program = tl.program_id(0)
    column, part = program % columns, program // columns
    count = tl.zeros((1, BLOCK_S), tl.float32)
    mean = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    m2 = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    for chunk in range(part * per_part, tl.minimum((part + 1) * per_part, chunks)):
        image, rows, offs_s = tile(chunk, column, positions, BLOCK_C, BLOCK_S)
        mask_s = offs_s < positions
        offs = offsets(image, rows, offs_s, strides)
        x = tl.load(x_ptr + offs, mask=(rows < channels) & mask_s, other=0.0).to(tl.float32)
        count += mask_s.to(tl.float32)
        delta = tl.where(mask_s, x - mean, 0.0)
        mean += delta * tl.div_rn(1.0, tl.maximum(count, 1.0))
        m2 += delta * (x - mean)
    total = tl.sum(count, axis=1)
    centre = tl.div_rn(tl.sum(count * mean, axis=1), total)
    gap = mean - centre[:, None]
    m2_sum = tl.sum(m2 + count * gap * gap, axis=1)
    offs_c = column.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    out_ptr = parts_ptr + part.to(tl.int64) * channels + offs_c
    tl.store(out_ptr, total + tl.zeros((BLOCK_C,), tl.float32), mask=mask_c)
    tl.store(out_ptr + parts * channels, centre, mask=mask_c)
    tl.store(out_ptr + 2 * parts * channels, m2_sum, mask=mask_c)


@triton.jit
def _merge_kernel(parts_ptr, moments_ptr, channels, parts, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """moments[:, c] = mean, var of all parts"""
    offs_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_p = tl.arange(0, BLOCK_P)[:, None]
    offs = offs_p * channels + offs_c[None, :]
    mask = (offs_p < parts) & (offs_c < channels)[None, :]
    count = tl.load(parts_ptr + offs, mask=mask, other=0.0)
    means = tl.load(parts_ptr + parts * channels + offs, mask=mask, other=0.0)
    m2 = tl.load(parts_ptr + 2 * parts * channels + offs, mask=mask, other=0.0)
    # Channels beyond the last have no elements.
    total = tl.maximum(tl.sum(count, axis=0), 1.0)
    mean = tl.div_rn(tl.sum(count * means, axis=0), total)
    gap = means - mean[None, :]
    var = tl.div_rn(tl.sum(m2 + count * gap * gap, axis=0), total)
    tl.store(moments_ptr + offs_c, mean, mask=offs_c < channels)
    tl.store(moments_ptr + channels + offs_c, var, mask=offs_c < channels)


def launch_moments(x: Tensor, who: str = "batch_norm_moments") -> Tensor:
    """[2, C]: mean and variance, in two launches."""
    x = x if evenly_spaced(x) else x.contiguous()
    tiles = Tiles.of(x)
    if x.numel() == 0:
        return x.new_zeros(2, tiles.channels, dtype=torch.float32)
    chunks, per_part, parts = tiles.reducing()
    partial = x.new_empty(3, parts, tiles.channels, dtype=torch.float32)
    arguments = (x, partial, tiles.sizes, (chunks, per_part, parts), tiles.strides[0])
    launch(who, _partial_kernel, tiles.columns * parts, *arguments, **tiles.blocks, num_warps=_WARPS)
    moments = x.new_empty(2, tiles.channels, dtype=torch.float32)
    blocks = {"BLOCK_P": next_power_of_2(parts), "BLOCK_C": _MERGED_CHANNELS}
    programs = ceil_div(tiles.channels, _MERGED_CHANNELS)
    launch(who, _merge_kernel, programs, partial, moments, tiles.channels, parts, **blocks, num_warps=_WARPS)
    return moments


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    """dx = (dmean + 2 (x - mean) dvar) / M; rarely needed, hence in plain PyTorch."""
    x, moments = ctx.saved_tensors
    shape = (1, -1) + (1,) * (x.ndim - 2)
    share = x.shape[1] / max(x.numel(), 1)
    slope = (2 * share * grad[1]).view(shape)
    dx: Tensor = (x - moments[0].view(shape)) * slope + (share * grad[0]).view(shape)
    return dx.to(x.dtype)


_moments = register_op(
    "batch_norm_moments(Tensor x) -> Tensor",
    cpu=reference.batch_norm_moments,
    cuda=launch_moments,
    fake=lambda x: x.new_empty(2, x.shape[1], dtype=torch.float32),
    setup_context=_save,
    backward=_backward,
)


def batch_norm_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of `x` over all its other dimensions.

        mean_c = sum x / M,  var_c = sum (x - mean_c)^2 / M

    Args:
        x: float32, bfloat16 or float16, [N, C, *], any memory layout.

    Returns:
        mean [C] and var [C], float32. A channel of one element has variance 0, one of none mean 0 and variance 0.

    Gradients: d mean / dx = 1 / M, d var / dx = 2 (x - mean) / M.

    Exactness: repeatable bit for bit; in float32 the variance is good to 1e-5 of itself where |mean| = 1000 standard
    deviations.

    Raises:
        KernelError: `x` is no floating tensor of two or more dimensions.
    """
    _check.check_input("batch_norm_moments", "x", x)
    check_channels("batch_norm_moments", x)
    mean, var = _moments(x)
    return mean, var
