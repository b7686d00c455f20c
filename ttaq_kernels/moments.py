"""Mean and biased variance of each channel, over all selected samples and positions: M = (selected samples) * S.

    mean = sum x / M,  var = sum (x - mean)^2 / M

Deterministic, and the same on every GPU: a fixed number of programs keeps a running mean and M2 (sum of squared
deviations) per lane, and lanes and programs are merged in a fixed order (Chan, Golub, LeVeque 1983). So the variance
keeps its digits however far the mean is from 0, and a layer with few channels still fills a GPU.

Bytes per element of a 2-byte tensor: 2; samples that are not selected are not read. Called by `batch_norm`,
`norm_act_quant` and methods that compare statistics.
"""

from typing import Any

import torch
from torch import Tensor

from ttaq_kernels import _check
from ttaq_kernels._channels import (
    Tiles,
    check_channels,
    check_sample_mask,
    dense_bytes,
    evenly_spaced,
    offsets,
    selected,
    tile,
)
from ttaq_kernels._launch import ceil_div, launch, next_power_of_2, tl, triton
from ttaq_kernels._library import register_op
from ttaq_kernels._math import reciprocal
from ttaq_kernels.reference import moments as reference

# Device functions stay without types: Triton has none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

__all__ = ["batch_norm_moments", "launch_moments", "launch_parts", "merged", "merging"]

_MERGED_CHANNELS = 16
_WARPS = 8
_WARP_TILE = 512  # elements of each warp of a reduction


@triton.jit
def _partial_kernel(
    x_ptr, sample_mask_ptr, parts_ptr, sizes, split, strides,
    ONE_ROW: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """parts[:, part, c] = count, mean and M2 of the chunks of one part"""
    channels, positions, columns, per_sample = sizes[0], sizes[1], sizes[2], sizes[3]
    chunks, per_part, parts = split[0], split[1], split[2]
    program = tl.program_id(0)
    column, part = program % columns, program // columns
    count = tl.zeros((1, BLOCK_S), tl.float32)
    mean = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    m2 = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    for chunk in range(part * per_part, tl.minimum((part + 1) * per_part, chunks)):
        image, rows, offs_s = tile(chunk, column, positions, BLOCK_C, BLOCK_S)
        mask_s = selected(sample_mask_ptr, image, offs_s, positions, per_sample, ONE_ROW)
        offs = offsets(image, rows, offs_s, strides)
        x = tl.load(x_ptr + offs, mask=(rows < channels) & mask_s, other=0.0).to(tl.float32)
        count += mask_s.to(tl.float32)
        delta = tl.where(mask_s, x - mean, 0.0)
        # With the shorter one, ptxas puts two registers of a long row on the stack (sm_80, sm_89).
        share = tl.div_rn(1.0, tl.maximum(count, 1.0)) if ONE_ROW else reciprocal(tl.maximum(count, 1.0))
        step = delta * share
        mean += step
        m2 += delta * (delta - step)
    total = tl.sum(count, axis=1)
    # A part may have no selected sample.
    centre = tl.div_rn(tl.sum(count * mean, axis=1), tl.maximum(total, 1.0))
    gap = mean - centre[:, None]
    m2_sum = tl.sum(m2 + count * gap * gap, axis=1)
    offs_c = column.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    out_ptr = parts_ptr + part.to(tl.int64) * channels + offs_c
    tl.store(out_ptr, total + tl.zeros((BLOCK_C,), tl.float32), mask=mask_c)
    tl.store(out_ptr + parts * channels, centre, mask=mask_c)
    tl.store(out_ptr + 2 * parts * channels, m2_sum, mask=mask_c)


@triton.jit
def merged(parts_ptr, channels, parts, offs_c, BLOCK_P: tl.constexpr):
    """mean, var and count of the channels `offs_c` over all parts"""
    offs_p = tl.arange(0, BLOCK_P)[:, None]
    offs = offs_p * channels + offs_c[None, :]
    mask = (offs_p < parts) & (offs_c < channels)[None, :]
    counts = tl.load(parts_ptr + offs, mask=mask, other=0.0)
    means = tl.load(parts_ptr + parts * channels + offs, mask=mask, other=0.0)
    m2 = tl.load(parts_ptr + 2 * parts * channels + offs, mask=mask, other=0.0)
    count = tl.sum(counts, axis=0)
    # Channels beyond the last have no elements, and there may be no selected sample.
    total = tl.maximum(count, 1.0)
    mean = tl.div_rn(tl.sum(counts * means, axis=0), total)
    gap = means - mean[None, :]
    var = tl.div_rn(tl.sum(m2 + counts * gap * gap, axis=0), total)
    return mean, var, count


@triton.jit
def _merge_kernel(parts_ptr, moments_ptr, channels, parts, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """moments[:, c] = mean, var and count of all parts"""
    offs_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, var, count = merged(parts_ptr, channels, parts, offs_c, BLOCK_P)
    tl.store(moments_ptr + offs_c, mean, mask=offs_c < channels)
    tl.store(moments_ptr + channels + offs_c, var, mask=offs_c < channels)
    tl.store(moments_ptr + 2 * channels + offs_c, count, mask=offs_c < channels)


def merging(channels: int, parts: int) -> tuple[int, dict[str, int]]:
    """Programs and options of a kernel that merges so many parts."""
    blocks = {"BLOCK_P": next_power_of_2(parts), "BLOCK_C": _MERGED_CHANNELS}
    return ceil_div(channels, _MERGED_CHANNELS), {**blocks, "num_warps": _WARPS}


def launch_parts(who: str, x: Tensor, sample_mask: Tensor | None) -> Tensor:
    """[3, parts, C]: count, mean and M2 of each part of an evenly spaced x with elements."""
    tiles = Tiles.of(x)
    chunks, per_part, parts = tiles.reducing()
    partial = x.new_empty(3, parts, tiles.channels, dtype=torch.float32)
    arguments = (x, dense_bytes(sample_mask), partial, tiles.sizes, (chunks, per_part, parts), tiles.strides[0])
    warps = max(1, tiles.block_c * tiles.block_s // _WARP_TILE)
    options = {"ONE_ROW": tiles.images == 1, **tiles.blocks}
    launch(who, _partial_kernel, tiles.columns * parts, *arguments, **options, num_warps=warps)
    return partial


def launch_moments(x: Tensor, sample_mask: Tensor | None) -> Tensor:
    """[3, C]: mean, variance and number of elements, in two launches."""
    channels = x.shape[1]
    if x.numel() == 0:
        return x.new_zeros(3, channels, dtype=torch.float32)
    who = "batch_norm_moments"
    partial = launch_parts(who, x if evenly_spaced(x) else x.contiguous(), sample_mask)
    moments = x.new_empty(3, channels, dtype=torch.float32)
    programs, options = merging(channels, partial.shape[1])
    launch(who, _merge_kernel, programs, partial, moments, channels, partial.shape[1], **options)
    return moments


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, sample_mask = inputs
    ctx.save_for_backward(x, sample_mask, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    """dx = (dmean + 2 (x - mean) dvar) / M where selected; rarely needed, hence in plain PyTorch."""
    x, sample_mask, moments = ctx.saved_tensors
    shape = (1, -1) + (1,) * (x.ndim - 2)
    mean, share = moments[0].view(shape), 1 / moments[2].clamp_min(1).view(shape)
    dx: Tensor = (x - mean) * (2 * share * grad[1].view(shape)) + share * grad[0].view(shape)
    if sample_mask is not None:
        dx = dx.where(sample_mask.view(-1, *[1] * (x.ndim - 1)), 0)
    return dx.to(x.dtype), None


_moments = register_op(
    "batch_norm_moments(Tensor x, Tensor? sample_mask) -> Tensor",
    cpu=reference.batch_norm_moments,
    cuda=launch_moments,
    fake=lambda x, _: x.new_empty(3, x.shape[1], dtype=torch.float32),
    setup_context=_save,
    backward=_backward,
)


def batch_norm_moments(x: Tensor, sample_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of `x` over all its other dimensions.

        mean_c = sum x / M,  var_c = sum (x - mean_c)^2 / M          over the selected samples

    Args:
        x: float32, bfloat16 or float16, [N, C, *], any memory layout.
        sample_mask: [N], which samples are selected: bool, or floating with 0 for those that are not. The others are
            not read, whatever they hold. None selects all.

    Returns:
        mean [C] and var [C], float32. A channel of one element has variance 0, one of none (an empty batch, or no
        sample selected) mean 0 and variance 0.

    Gradients: d mean / dx = 1 / M, d var / dx = 2 (x - mean) / M; 0 for samples that are not selected.

    Exactness: repeatable bit for bit; in float32 the variance is good to 1e-5 of itself where |mean| = 1000 standard
    deviations.

    Raises:
        KernelError: `x` is no floating tensor of two or more dimensions, or `sample_mask` does not fit it.
    """
    who = "batch_norm_moments"
    _check.check_input(who, "x", x)
    check_channels(who, x)
    mean, var, _ = _moments(x, check_sample_mask(who, sample_mask, x))
    return mean, var
