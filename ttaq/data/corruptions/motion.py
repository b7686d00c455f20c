"""Smearing along a line, with a direction of its own for each image of a batch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["smear"]


def smear(planes: Tensor, radius: int, sigma: float, angles: Tensor) -> Tensor:
    """`y[p] = sum_i w_i x[p + o_i]` for planes (N, C, H, W) and angles (N) in degrees.

    The 2 radius + 1 weights are one-sided, `w_i` in proportion to `exp(-i^2 / 2 sigma^2)`, i = 0, 1, ..., with sum 1;
    so the image is dragged, not only softened. Tap i reads `o_i = ceil(i cos a - 1/2)` columns to the right and
    `ceil(i sin a - 1/2)` rows down; beyond the border stands the nearest pixel.
    Source: the motion blur of ImageMagick 6 (`MagickMotionBlurImage`), which the original calls through Wand.
    """
    taps = 2 * radius + 1
    weights = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(taps)]
    total = sum(weights)
    reach = taps - 1
    padded = F.pad(planes, (reach, reach, reach, reach), mode="replicate")
    height, width = planes.shape[-2:]
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # A view: every placement of an H x W window.
    radians = torch.deg2rad(angles.double())
    step_x, step_y = torch.cos(radians), torch.sin(radians)
    each = torch.arange(len(planes), device=planes.device)
    smeared = planes * (weights[0] / total)
    for i in range(1, taps):
        column = torch.ceil(i * step_x - 0.5).long() + reach
        row = torch.ceil(i * step_y - 0.5).long() + reach
        smeared += windows[each, :, row, column].mul_(weights[i] / total)
    return smeared
