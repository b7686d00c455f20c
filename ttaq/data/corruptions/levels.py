"""The 256 levels k/255 of a stored image: the two ways by which numbers in [0, 1] come to lie on them."""

from __future__ import annotations

import torch
from torch import Tensor

from ttaq.data.images import to_float

__all__ = ["nearest_level", "truncate_to_level"]

# In levels. A value that fp32 rounding left just under its level would otherwise fall to the one below.
TOLERANCE = 1e-3


def truncate_to_level(images: Tensor) -> Tensor:
    """`floor(255 x) / 255` of x clipped to [0, 1], fp32: what casting to uint8 does, and so what the stored sets hold.

    A value less than 1/1000 of a level under a level counts as that level. In the original the rounding errors of fp64
    let some of those fall to the next: most at saturate 3, by one level in 15 % of the values.
    """
    levels = images.clamp(0, 1).mul_(255).add_(TOLERANCE).floor_()
    return to_float(levels.to(torch.uint8))


def nearest_level(images: Tensor) -> Tensor:
    """`floor(255 x + 1/2) / 255` of x clipped to [0, 1], fp32: what image libraries do when they store a result."""
    levels = images.clamp(0, 1).mul_(255).add_(0.5).floor_()
    return to_float(levels.to(torch.uint8))
