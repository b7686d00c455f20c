"""A tensor of the model for all calibration images, kept between units.

Where the tensor lies on a grid its codes are kept, one byte each. What does not fit into the memory budget lies in a
file that is mapped into memory and disappears with the cache.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ttaq.errors import InputError
from ttaq.nn import Quantizer
from ttaq_kernels import gather_mix

__all__ = ["Budget", "Rows", "chunks", "mixed"]

# Images that go through a unit together: the least is enough for statistics of the batch; between them, memory decides.
_CHUNK = 64, 256
_CHUNK_PIXELS = 1 << 20


def chunks(images: Tensor) -> list[slice]:
    """The images of each forward pass: equal parts of about 256, of large images 64."""
    least, most = _CHUNK
    size = min(max(_CHUNK_PIXELS // max(1, math.prod(images.shape[2:])), least), most)
    ends = torch.linspace(0, len(images), max(1, round(len(images) / size)) + 1).round().int().tolist()
    return [slice(begin, end) for begin, end in pairwise(ends)]


class Rows:
    """A tensor with one row per image. quantizer: its grid, if it has one; then `values` are codes, counted from 0."""

    def __init__(self, values: Tensor, quantizer: Quantizer | None, release: Callable[[], None]) -> None:
        self.values, self.release = values, release
        self.scale = self.zero_point = None
        if quantizer is not None and quantizer.scale is not None and quantizer.zero_point is not None:
            self.scale, self.zero_point = quantizer.scale.clone(), quantizer.zero_point - quantizer.qmin

    def write(self, place: slice, x: Tensor) -> None:
        if self.scale is not None and self.zero_point is not None:
            x = (x.float() / self.scale).round_().add_(self.zero_point)
        self.values[place] = x

    def read(self, place: slice, device: torch.device) -> Tensor:
        """The rows in float32, on `device`, as a copy in the same memory layout."""
        values = self.values[place].to(device)
        if self.scale is not None and self.zero_point is not None:
            return (values.float() - self.zero_point) * self.scale
        return values.clone()

    def take(self, index: Tensor) -> Tensor:
        """The rows `index` of `values` on its device, in the same memory layout."""
        values, per_row = self.values, self.values[:1].numel()
        # As they lie in memory: index_select would write another layout.
        rows = values.as_strided((len(values), per_row), (per_row, 1)).index_select(0, index.to(values.device))
        return rows.to(index.device).as_strided((len(index), *values.shape[1:]), (per_row, *values.stride()[1:]))


class Budget:
    """Bytes of memory that caches may take; beyond it they go to files in `folder`, by default the system's."""

    def __init__(self, megabytes: float, folder: str | Path | None = None) -> None:
        if not megabytes >= 0:
            raise InputError(f"quantize: cache_mb is {megabytes!r}, expected 0 or more")
        self.left, self.folder = int(megabytes * 1e6), folder

    def rows(self, like: Tensor, count: int, quantizer: Quantizer | None = None) -> Rows:
        """Room for `count` rows like those of `like`, in its memory layout; on its device if they fit."""
        gridded = quantizer is not None and quantizer.scale is not None
        dtype = torch.uint8 if gridded else like.dtype
        size = like[:1].numel() * count
        taken = size * dtype.itemsize
        if taken <= self.left:
            self.left -= taken
            flat = torch.empty(size, dtype=dtype, device=like.device)
            return Rows(_shaped(flat, like, count), quantizer, lambda: self._back(taken))
        file = tempfile.NamedTemporaryFile(dir=self.folder, prefix="ttaq_cache_")  # noqa: SIM115
        try:
            file.truncate(taken)
            flat = torch.from_file(file.name, shared=True, size=size, dtype=dtype)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"quantize: the inputs of a unit need {taken / 1e6:.0f} MB, which neither cache_mb nor the folder of "
                f"temporary files holds: {error}; use fewer calibration images, or set TMPDIR to a larger disk"
            ) from error
        return Rows(_shaped(flat, like, count), quantizer, file.close)

    def _back(self, taken: int) -> None:
        self.left += taken


def _shaped(flat: Tensor, like: Tensor, count: int) -> Tensor:
    channels_last = like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last)
    if not channels_last:
        return flat.view(count, *like.shape[1:])
    _, channels, height, width = like.shape
    return flat.view(count, height, width, channels).permute(0, 3, 1, 2)


def mixed(quantized: Rows, floating: Rows, index: Tensor, keep_quantized: float, seed: Tensor) -> Tensor:
    """The rows `index` [N] (int64, on the device of `seed`), each element quantized or, as drawn, float."""
    chosen, rest = quantized.values, floating.values
    if chosen.device != seed.device or rest.device != seed.device:
        chosen, rest = quantized.take(index), floating.take(index)
        index = torch.arange(len(index), device=seed.device)
    return gather_mix(chosen, rest, index, keep_quantized, seed, quantized.scale, quantized.zero_point)
