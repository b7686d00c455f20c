"""Changes of light and colour, and coarse pixels. Source of all: arXiv 1903.12261, hendrycks/robustness."""

from __future__ import annotations

import torch
from torch import Tensor

from ttaq.data.corruptions.draw import Draw
from ttaq.data.corruptions.levels import nearest_level
from ttaq.data.corruptions.parameters import Parameters

__all__ = ["brightness", "contrast", "pixelate", "saturate"]


def brightness(images: Tensor, parameters: Parameters, draw: Draw) -> Tensor:  # noqa: ARG001
    """The value V of HSV (the greatest channel) becomes `min(V + amount, 1)`; hue and saturation stay.

    amount at 32 px: 0.05, 0.1, 0.15, 0.2, 0.3. At 224 px: 0.1, 0.2, 0.3, 0.4, 0.5. Draws nothing.
    Differs from the original: not at all; with fixed hue and saturation every channel is in proportion to V, so the
    way to HSV and back is one multiplication (black, which has neither, becomes grey).
    """
    (amount,) = parameters
    value = images.amax(1, keepdim=True)
    raised = (value + amount).clamp_max(1)
    return torch.where(value > 0, images * (raised / value.clamp_min(1e-12)), raised)


def saturate(images: Tensor, parameters: Parameters, draw: Draw) -> Tensor:  # noqa: ARG001
    """The saturation S of HSV becomes `clip(factor S + offset, 0, 1)`; hue and value stay.

    (factor, offset) at 32 px: (0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2).
    At 224 px: (0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2). Draws nothing.
    Each channel is `V (1 - S t)` with t in [0, 1] given by the hue alone. Grey has S = 0 and, as in the original, hue
    0: the two severities with an offset tint it red.
    Differs from the original: not at all.
    """
    factor, offset = parameters
    value = images.amax(1, keepdim=True)
    spread = value - images.amin(1, keepdim=True)
    saturation = (factor * spread / value.clamp_min(1e-12) + offset).clamp(0, 1)
    red = torch.tensor((0.0, 1.0, 1.0), device=images.device).view(1, 3, 1, 1)
    share = torch.where(spread > 0, (value - images) / spread.clamp_min(1e-12), red)
    return value * (1 - saturation * share)


def contrast(images: Tensor, parameters: Parameters, draw: Draw) -> Tensor:  # noqa: ARG001
    """`(x - m) factor + m`, m the mean of each image's channel.

    factor at 32 px: 0.75, 0.5, 0.4, 0.3, 0.15. At 224 px: 0.4, 0.3, 0.2, 0.1, 0.05. Draws nothing.
    Differs from the original: not at all.
    """
    (factor,) = parameters
    mean = images.mean((2, 3), keepdim=True)
    return torch.lerp(mean, images, factor)


def box_matrix(size: int, samples: int) -> Tensor:
    """fp32 (samples, size) on the CPU: row i is the plain mean of the pixels whose centres lie in the i-th of `samples`
    equal stretches of a line of `size` pixels; where stretches are shorter than a pixel, the pixel they lie in."""
    scale = size / samples
    reach = max(scale, 1) / 2
    middle = (torch.arange(samples, dtype=torch.float64)[:, None] + 0.5) * scale
    distance = torch.arange(size, dtype=torch.float64)[None, :] + 0.5 - middle
    inside = ((distance > -reach) & (distance <= reach)).double()
    return (inside / inside.sum(1, keepdim=True)).float()


def box_resize(images: Tensor, height: int, width: int) -> Tensor:
    """Columns first, then rows, rounded to levels after each: `PIL.Image.resize` with the box filter."""
    across = box_matrix(images.shape[-1], width).to(images.device)
    down = box_matrix(images.shape[-2], height).to(images.device)
    return nearest_level(torch.matmul(down, nearest_level(torch.matmul(images, across.T))))


def pixelate(images: Tensor, parameters: Parameters, draw: Draw) -> Tensor:  # noqa: ARG001
    """Shrunk to `int(share n)` pixels a side and enlarged again, both with a box filter.

    share at 32 px: 0.95, 0.9, 0.85, 0.75, 0.65. At 224 px: 0.6, 0.5, 0.4, 0.3, 0.25. Draws nothing.
    Differs from the original: not at all (the box filter of PIL is written as matrices).
    """
    (share,) = parameters
    height, width = images.shape[-2:]
    return box_resize(box_resize(images, int(height * share), int(width * share)), height, width)
