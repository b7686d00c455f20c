"""Tensors seen as [images, channels, positions] with three strides, so that NCHW and channels_last need no copy."""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ttaq_kernels import _check
from ttaq_kernels._launch import ceil_div, next_power_of_2, tl, triton
from ttaq_kernels.errors import KernelError

# Device functions stay without types: Triton has none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

__all__ = [
    "Tiles",
    "check_channels",
    "check_sample_mask",
    "dense_bytes",
    "evenly_spaced",
    "laid_out_like",
    "offsets",
    "selected",
    "tile",
    "tile_of_images",
]

Strides = tuple[int, int, int]

# Tiles where neighbouring channels, or else neighbouring positions, are neighbours in memory: the elements of a tile,
# and how far it reaches along these neighbours. Planes of odd size need an address per element, hence the small tile.
_CHANNELS_INSIDE = (4096, 64)
_POSITIONS_INSIDE = (2048, 256)
# Of an image of the latter, where a program goes over several: images, and elements of each.
_IMAGES = (16, 256)
# Programs of a reduction: enough for the largest GPU, and the same for all GPUs, since the split decides the rounding.
_REDUCING_PROGRAMS = 512


@triton.jit
def tile(chunk, column, positions, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """The image, the channels [BLOCK_C, 1] and the positions [1, BLOCK_S] of a tile."""
    chunks_per_image = tl.cdiv(positions, BLOCK_S)
    # The divisions are 32 bits wide, which are several times quicker; what meets a stride is 64 bits wide.
    offs_c = column.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    offs_s = tl.cast(chunk % chunks_per_image, tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
    return tl.cast(chunk // chunks_per_image, tl.int64), offs_c, offs_s


@triton.jit
def tile_of_images(
    chunk, column, positions, images, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """Images [BLOCK_N, 1, 1], channels [1, BLOCK_C, 1], positions [1, 1, BLOCK_S], which of the tile exist"""
    group, offs_c, offs_s = tile(chunk, column, positions, BLOCK_C, BLOCK_S)
    n = tl.arange(0, BLOCK_N)[:, None, None]
    mask = (n < images - group.to(tl.int32) * BLOCK_N) & (offs_s < positions)[None]
    return group * BLOCK_N + n, offs_c[None], offs_s[None], mask


@triton.jit
def offsets(image, offs_c, offs_s, strides):
    """Where the elements of a tile lie in a tensor with these strides."""
    # Images last: what a program that goes over several adds to the rest is one number.
    return image * strides[0] + (offs_c * strides[1] + offs_s * strides[2])


@triton.jit
def selected(sample_mask_ptr, image, offs_s, positions, per_sample, ONE_ROW: tl.constexpr):
    """Whether each position of a tile exists and belongs to a selected sample; with ONE_ROW one holds all samples."""
    mask_s = offs_s < positions
    if sample_mask_ptr is not None:
        if ONE_ROW:
            mask_s &= tl.load(sample_mask_ptr + offs_s // per_sample, mask=mask_s, other=0) != 0
        else:
            mask_s &= tl.load(sample_mask_ptr + image + tl.zeros((1, 1), tl.int64)) != 0
    return mask_s


def check_channels(who: str, x: Tensor) -> None:
    """`x` has a dimension of channels."""
    if x.ndim < 2:
        raise KernelError(f"{who}: x has shape {tuple(x.shape)}, expected [N, C] or [N, C, ...]; unsqueeze it")


def check_sample_mask(who: str, sample_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """`sample_mask` fits the samples of `x`; it comes back as booleans."""
    if sample_mask is None:
        return None
    dtype = sample_mask.dtype if isinstance(sample_mask, Tensor) and sample_mask.is_floating_point() else torch.bool
    _check.check_parameter(who, "sample_mask", sample_mask, x, [(x.shape[0],)], "= (x.shape[0],)", dtype)
    return sample_mask if dtype is torch.bool else sample_mask != 0


def dense_bytes(sample_mask: Tensor | None) -> Tensor | None:
    """The mask as a kernel reads it, copied only if it has gaps."""
    return None if sample_mask is None else sample_mask.contiguous().view(torch.uint8)


def evenly_spaced(x: Tensor) -> bool:
    """Whether all positions of a channel are one step apart, from the first to the last."""
    spatial = [(size, step) for size, step in zip(x.shape[2:], x.stride()[2:], strict=True) if size != 1]
    return all(outer == size * step for (_, outer), (size, step) in pairwise(spatial))


def laid_out_like(grad: Tensor, x: Tensor) -> Tensor:
    """`grad`, copied where its neighbours in memory are not those of `x`.

    A kernel that follows `x` would read it one element per memory access.
    """
    if evenly_spaced(grad) and (grad.stride(1) == 1) == (x.stride(1) == 1):
        return grad
    copy = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
    return copy if evenly_spaced(copy) else copy.contiguous()


def _strides(x: Tensor) -> Strides:
    """Steps in memory from image to image, channel to channel and position to position."""
    steps = [step for size, step in zip(x.shape[2:], x.stride()[2:], strict=True) if size != 1]
    return x.stride(0), x.stride(1), steps[-1] if steps else 0


class Tiles(NamedTuple):
    """Tensors of one shape, cut into tiles of `block_n` images x `block_c` channels x `block_s` positions.

    Where every tensor allows it, the positions of all images make one long row, `per_sample` of them each. `columns`
    counts the blocks of channels.
    """

    channels: int
    positions: int
    per_sample: int
    columns: int
    images: int
    strides: tuple[Strides, ...]
    block_c: int
    block_s: int
    pairs: bool
    block_n: int = 1

    @classmethod
    def of(cls, *tensors: Tensor, pairs_of: int | None = None) -> "Tiles":
        """Tiles that suit the memory layout of the first tensor; all are evenly spaced.

        With `pairs_of` every program handles two tiles of so many channels, side by side.
        """
        images, channels = tensors[0].shape[:2]
        positions = per_sample = math.prod(tensors[0].shape[2:])
        strides = tuple(_strides(tensor) for tensor in tensors)
        if positions == 1:
            strides = tuple((0, channel, image) for image, channel, _ in strides)
            images, positions = 1, images
        elif images == 1 or all(image == positions * position for image, _, position in strides):
            images, positions = 1, images * positions
        if strides[0][1] == 1:
            elements, width = _CHANNELS_INSIDE
            block_c = min(next_power_of_2(channels), width)
            block_s = min(next_power_of_2(positions), elements // block_c)
        else:
            elements, width = _POSITIONS_INSIDE
            block_s = min(next_power_of_2(positions), width)
            block_c = min(next_power_of_2(channels), elements // block_s)
        columns = ceil_div(channels, block_c)
        if pairs_of is not None:
            columns, block_c = ceil_div(channels, 2 * pairs_of), pairs_of
            block_s = min(next_power_of_2(positions), elements // (2 * pairs_of))
        return cls(channels, positions, per_sample, columns, images, strides, block_c, block_s, pairs_of is not None)

    def over_images(self) -> "Tiles":
        """For element-wise kernels: tiles of several images where threads have one element of a channel of an image.

        Those are planes whose rows are not aligned. A thread would load the statistics for each of its elements.
        """
        most, elements = _IMAGES
        if self.positions % 16 == 0 or self.images == 1:
            return self
        if self.pairs:
            return self._replace(block_n=min(most // 2, next_power_of_2(self.images)))
        block_n = min(most, next_power_of_2(self.images))
        block_c = max(1, min(self.block_c, elements // self.block_s))
        return self._replace(columns=ceil_div(self.channels, block_c), block_c=block_c, block_n=block_n)

    @property
    def chunks(self) -> int:
        """The tiles of each block of channels."""
        return ceil_div(self.images, self.block_n) * ceil_div(self.positions, self.block_s)

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_C": self.block_c, "BLOCK_S": self.block_s}

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """What an element-wise kernel takes; it runs one program per tile."""
        return self.channels, self.positions, self.columns, self.per_sample, self.images

    def reducing(self) -> tuple[int, int, int]:
        """chunks, chunks per part and parts of a reduction, which runs `columns` x parts programs."""
        per_part = max(1, ceil_div(self.chunks * self.columns, _REDUCING_PROGRAMS))
        return self.chunks, per_part, ceil_div(self.chunks, per_part)
