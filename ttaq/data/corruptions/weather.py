"""Snow and fog. Source of both: arXiv 1903.12261, hendrycks/robustness."""

from __future__ import annotations

import torch
from torch import Tensor

from ttaq.data.corruptions.blur import enlarge_centre
from ttaq.data.corruptions.draw import Draw
from ttaq.data.corruptions.levels import truncate_to_level
from ttaq.data.corruptions.motion import smear
from ttaq.data.corruptions.parameters import Parameters

__all__ = ["fog", "grey", "plasma", "snow"]


def grey(images: Tensor) -> Tensor:
    """Luma `0.299 R + 0.587 G + 0.114 B` of images (N, 3, H, W): (N, 1, H, W)."""
    return 0.299 * images[:, 0:1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:3]


def snow(images: Tensor, parameters: Parameters, draw: Draw) -> Tensor:
    """A whitened image `x' = keep x + (1 - keep) max(x, 1.5 grey(x) + 0.5)` plus flakes falling twice.

    The flakes: Gaussian noise, one channel, of the given mean and deviation; its middle enlarged by `zoom`; set to 0
    where under `threshold`; truncated to levels; smeared with (radius, sigma) in a direction uniform in -135 to -45
    degrees and truncated again. That layer and the same layer turned by 180 degrees are added.

    (mean, deviation, zoom, threshold, radius, sigma, keep) at 32 px: (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
    (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9), (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
    (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8). At 224 px: (0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
    (0.55, 0.3, 4, 0.9, 12, 8, 0.7), (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55).
    Differs from the original: ImageMagick's filter is written in torch instead of called through Wand.
    """
    mean, deviation, zoom, threshold, radius, sigma, keep = parameters
    count, _, height, width = images.shape
    flakes = enlarge_centre(draw.normal(count, 1, height, width).mul_(deviation).add_(mean), zoom)
    flakes = truncate_to_level(torch.where(flakes < threshold, 0.0, flakes))
    flakes = truncate_to_level(smear(flakes, int(radius), sigma, draw.uniform(-135, -45, count)))
    whitened = keep * images + (1 - keep) * torch.maximum(images, 1.5 * grey(images) + 0.5)
    return whitened + flakes + flakes.flip(2, 3)


def plasma(count: int, side: int, decay: float, draw: Draw) -> Tensor:
    """(count, side, side) clouds in [0, 1] by the diamond-square recursion on a torus; `side` is a power of two.

    From one corner of height 0 down to single pixels, the grid step halves: the middle of every square takes the mean
    of its four corners, then the middle of every edge the mean of its four neighbours, each plus a number uniform in
    -a .. a; a starts at 100^2 and is divided by decay^2 at each halving. At the end the range of each map becomes 0..1.
    """
    maps = torch.zeros(count, side, side, device=draw.device)
    step, wibble = side, 100.0
    while step >= 2:
        half = step // 2
        cells = side // step

        def jolt(wibble: float = wibble, cells: int = cells) -> Tensor:
            return draw.uniform(-(wibble**2), wibble**2, count, cells, cells)

        corner = maps[:, ::step, ::step]
        pair = corner + corner.roll(-1, 1)
        centre = (pair + pair.roll(-1, 2)) / 4 + jolt()
        top = (corner + corner.roll(-1, 2) + centre + centre.roll(1, 1)) / 4 + jolt()
        left = (pair + centre + centre.roll(1, 2)) / 4 + jolt()
        maps[:, half::step, half::step] = centre
        maps[:, ::step, half::step] = top
        maps[:, half::step, ::step] = left
        step, wibble = half, wibble / decay
    maps -= maps.amin((1, 2), keepdim=True)
    return maps / maps.amax((1, 2), keepdim=True)


def fog(images: Tensor, parameters: Parameters, draw: Draw) -> Tensor:
    """`(x + thickness plasma) m / (m + thickness)`, m the image's brightest value: clouds over a dimmed image.

    The clouds (see `plasma`) have the smallest power of two over both sides as their side; the image sees the corner.
    (thickness, decay) at 32 px: (0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75).
    At 224 px: (1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4).
    Differs from the original: in nothing but the stream of random numbers (and fp32 clouds instead of fp64).
    """
    thickness, decay = parameters
    count, _, height, width = images.shape
    side = 1 << (max(height, width) - 1).bit_length()
    clouds = plasma(count, side, decay, draw)[:, None, :height, :width]
    brightest = images.amax((1, 2, 3), keepdim=True)
    return (images + thickness * clouds) * (brightest / (brightest + thickness))
