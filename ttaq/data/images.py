"""Labelled images as ttaq keeps them, and the one place where bytes become numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ttaq.errors import InputError

__all__ = ["Images", "to_float"]


class Images(NamedTuple):
    """images: uint8 (N, 3, H, W), contiguous. labels: int64 (N)."""

    images: Tensor
    labels: Tensor

    def take(self, indices: Tensor) -> Images:
        """The images at these places (int64), in that order."""
        return Images(self.images[indices], self.labels[indices])


def to_float(images: Tensor) -> Tensor:
    """`x / 255` of uint8 images of any shape: fp32 in [0, 1], each value the fp32 number nearest to k / 255 on every
    device.

    Raises InputError for anything but uint8.
    """
    if images.dtype is not torch.uint8:
        raise InputError(f"to_float: got {images.dtype}, expected torch.uint8 images with values 0 to 255")
    # A divisor on the device: with a Python number CUDA multiplies by the rounded reciprocal, which misses some values.
    return images.float() / torch.tensor(255.0, device=images.device)
