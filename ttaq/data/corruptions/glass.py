"""Glass blur: neighbouring pixels change places, one after the other. The order matters, and is kept here."""

from __future__ import annotations

import torch
from torch import Tensor

from ttaq.data.corruptions.draw import Draw
from ttaq.data.corruptions.levels import truncate_to_level
from ttaq.data.corruptions.parameters import Parameters
from ttaq.data.corruptions.smooth import gaussian_smooth

__all__ = ["glass_blur", "scatter_pixels"]


def scatter_pixels(images: Tensor, offsets: Tensor, delta: int) -> Tensor:
    """One pass over images (N, C, H, W): each pixel in turn is overwritten by its neighbour at `offsets` (N, 2, H, W).

    Rows H - delta down to delta + 1 are visited from the last to the first, and in each row the columns W - delta down
    to delta + 1 in the same way; pixel (i, j) takes the present value of (i + offsets[0], j + offsets[1]), entries of
    -delta .. delta - 1. Exactly the sequential result, without the loop: a pixel whose neighbour was visited before it
    holds what that neighbour took, so each visited pixel points along a chain that ends at the first neighbour still
    untouched; the ends of all chains are found by doubling, in about log2(longest chain) steps.
    """
    channels, height, width = images.shape[1:]
    place = torch.arange(height * width, device=images.device).view(height, width)
    rows, columns = place // width, place % width
    inside = (rows > delta) & (rows <= height - delta) & (columns > delta) & (columns <= width - delta)
    source = torch.where(inside, place + offsets[:, 0] * width + offsets[:, 1], place)
    source, visited = source.flatten(1), inside.flatten()
    # Later in memory means visited earlier: the scan runs backwards.
    chained = visited & (source > place.flatten()) & visited[source]
    link = torch.where(chained, source, place.flatten())
    while True:
        further = link.gather(1, link)
        if torch.equal(further, link):
            break
        link = further
    origin = source.gather(1, link)
    return images.flatten(2).gather(2, origin[:, None].expand(-1, channels, -1)).view_as(images)


def glass_blur(images: Tensor, parameters: Parameters, draw: Draw) -> Tensor:
    """Gaussian blur, truncation to levels, `passes` passes of local scattering over the image, Gaussian blur again.

    (sigma, delta, passes) at 32 px: (0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2).
    At 224 px: (0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2).
    A pixel's neighbour is drawn uniformly from -delta .. delta - 1 in each direction. The original means to exchange
    the two pixels, but its NumPy assignment exchanges views of one array, so that the visited pixel is overwritten and
    its neighbour stays; the stored sets were made that way, and so are these (`scatter_pixels`).
    Differs from the original: in nothing but the stream of random numbers.
    """
    sigma, delta, passes = parameters[0], int(parameters[1]), int(parameters[2])
    height, width = images.shape[-2:]
    scattered = truncate_to_level(gaussian_smooth(images, sigma))
    for _ in range(passes):
        offsets = draw.integers(-delta, delta, len(images), 2, height, width)
        scattered = scatter_pixels(scattered, offsets, delta)
    return gaussian_smooth(scattered, sigma)
