"""What spatter needs from classical image processing, on batches of levels: edges, distances, histogram equalization.

All planes here are fp32 (N, H, W) and hold whole numbers 0 to 255 unless said otherwise. The filters are those of
OpenCV, where the original takes them from.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["canny_edges", "distance_to", "equalize_histogram", "filter_3x3"]


# Length of a step and the (row, column) moves that have it.
STEPS = (
    (1.0, ((0, 1), (0, -1), (1, 0), (-1, 0))),
    (1.4, ((1, 1), (1, -1), (-1, 1), (-1, -1))),
    (2.1969, ((1, 2), (1, -2), (-1, 2), (-1, -2), (2, 1), (2, -1), (-2, 1), (-2, -1))),
)


def shifted(planes: Tensor, row: int, column: int, mode: str) -> Tensor:
    """`y[i, j] = x[i + row, j + column]`, |row| and |column| up to 1; `mode` says what lies beyond the border."""
    height, width = planes.shape[-2:]
    padded = F.pad(planes[:, None], (1, 1, 1, 1), mode=mode)[:, 0]
    return padded[:, 1 + row : 1 + row + height, 1 + column : 1 + column + width]


def filter_3x3(planes: Tensor, kernel: tuple[tuple[float, ...], ...], mode: str = "reflect") -> Tensor:
    """`y[i, j] = sum kernel[a][b] x[i + a - 1, j + b - 1]`; by default mirrored about the outermost pixels."""
    height, width = planes.shape[-2:]
    padded = F.pad(planes[:, None], (1, 1, 1, 1), mode=mode)[:, 0]
    total = torch.zeros_like(planes)
    for a, line in enumerate(kernel):
        for b, weight in enumerate(line):
            if weight:
                total += weight * padded[:, a : a + height, b : b + width]
    return total


def canny_edges(planes: Tensor, low: float, high: float) -> Tensor:
    """Canny's edges as a bool mask: Sobel gradient (border repeated), |gx| + |gy|, thin, keep by hysteresis.

    A pixel stays if its magnitude is over `low`, greater than the one neighbour along the gradient (the upper or left)
    and at least the other's; the direction is one of four, split at 22.5 and 67.5 degrees. Of those, the 8-connected
    groups with a member over `high` are edges. Source: Canny 1986, in the form of `cv2.Canny` with aperture 3.
    """
    gx = filter_3x3(planes, ((-1, 0, 1), (-2, 0, 2), (-1, 0, 1)), "replicate")
    gy = filter_3x3(planes, ((-1, -2, -1), (0, 0, 0), (1, 2, 1)), "replicate")
    size_x, size_y = gx.abs(), gy.abs()
    magnitude = size_x + size_y
    around = {(row, column): shifted(magnitude, row, column, "constant") for row in (-1, 0, 1) for column in (-1, 0, 1)}
    flat = size_y < math.tan(math.pi / 8) * size_x
    steep = size_y > math.tan(3 * math.pi / 8) * size_x
    falling = (gx < 0) == (gy < 0)  # The gradient points down and right, or up and left.
    across = (magnitude > around[0, -1]) & (magnitude >= around[0, 1])
    down = (magnitude > around[-1, 0]) & (magnitude >= around[1, 0])
    first = (magnitude > around[-1, -1]) & (magnitude > around[1, 1])
    second = (magnitude > around[-1, 1]) & (magnitude > around[1, -1])
    thin = torch.where(flat, across, torch.where(steep, down, torch.where(falling, first, second)))
    weak = thin & (magnitude > low)
    edges = weak & (magnitude > high)
    while True:
        grown = weak & (F.max_pool2d(edges.float()[:, None], 3, stride=1, padding=1)[:, 0] > 0)
        if torch.equal(grown, edges):
            return edges
        edges = grown


def distance_to(mask: Tensor, limit: float) -> Tensor:
    """Distance in pixels from each pixel to the nearest set one of a bool mask (N, H, W), at most `limit`.

    The length of the shortest way in steps to a side (1), a corner (1.4) and a knight's move (2.1969), which is within
    2 % of the Euclidean one. Source: Borgefors 1986, with the lengths of `cv2.distanceTransform`, mask size 5.
    """
    height, width = mask.shape[-2:]
    nearest = torch.where(mask, 0.0, limit)
    while True:
        padded = F.pad(nearest, (2, 2, 2, 2), value=limit)
        closer = nearest
        for length, moves in STEPS:
            ends = [padded[:, 2 + row : 2 + row + height, 2 + column : 2 + column + width] for row, column in moves]
            closer = torch.minimum(closer, reduce(torch.minimum, ends) + length)
        if torch.equal(closer, nearest):
            return nearest
        nearest = closer


def equalize_histogram(planes: Tensor) -> Tensor:
    """Histogram equalization per plane: level v becomes `round(255 (c(v) - c(v0)) / (c(255) - c(v0)))`.

    c counts the pixels up to a level, v0 is the lowest level in use. A plane of one level stays as it is.
    """
    levels = planes.flatten(1).long()
    histogram = torch.zeros(len(planes), 256, dtype=torch.int64, device=planes.device)
    histogram.scatter_add_(1, levels, torch.ones_like(levels))
    counts = histogram.cumsum(1)
    lowest = counts.gather(1, levels.amin(1, keepdim=True))
    spread = counts[:, -1:] - lowest
    table = ((counts - lowest) * (255.0 / spread.clamp_min(1))).round()
    equalized = torch.where(spread > 0, table.gather(1, levels), levels.float())
    return equalized.view_as(planes)
