"""The water film of spatter in NumPy and SciPy: edges, distances, equalization, light, for one image."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

Array = np.ndarray


def canny(levels: Array, low: float, high: float) -> Array:
    gx = ndimage.sobel(levels, axis=1, mode="nearest")
    gy = ndimage.sobel(levels, axis=0, mode="nearest")
    size = np.pad(np.abs(gx) + np.abs(gy), 1)
    height, width = levels.shape

    def neighbour(row: int, column: int) -> Array:
        return size[1 + row : 1 + row + height, 1 + column : 1 + column + width]

    # Angles of 0, 45, 90, 135 degrees, y pointing down; a tie is won by the lower or right pixel except on diagonals.
    angle = np.rint(np.degrees(np.arctan2(gy, gx)) / 45) % 4
    centre = neighbour(0, 0)
    horizontal = (centre > neighbour(0, -1)) & (centre >= neighbour(0, 1))
    vertical = (centre > neighbour(-1, 0)) & (centre >= neighbour(1, 0))
    falling = (centre > neighbour(-1, -1)) & (centre > neighbour(1, 1))
    rising = (centre > neighbour(-1, 1)) & (centre > neighbour(1, -1))
    weak = np.choose(angle.astype(int), [horizontal, falling, vertical, rising]) & (centre > low)
    groups, _ = ndimage.label(weak, np.ones((3, 3)))
    return weak & np.isin(groups, np.unique(groups[weak & (centre > high)]))


def chamfer(mask: Array, limit: float) -> Array:
    """The least, over all set pixels, of the closed form of the 1 / 1.4 / 2.1969 distance, and `limit`."""
    height, width = mask.shape
    reach = int(limit)
    padded = np.pad(mask, reach)
    best = np.full(mask.shape, float(limit))
    for row in range(-reach, reach + 1):
        for column in range(-reach, reach + 1):
            short, long = sorted((abs(row), abs(column)))
            if 2 * short <= long:
                length = 2.1969 * short + (long - 2 * short)
            else:
                length = 2.1969 * (long - short) + 1.4 * (2 * short - long)
            if length < limit:
                there = padded[reach + row : reach + row + height, reach + column : reach + column + width]
                best = np.minimum(best, np.where(there, length, limit))
    return best


def equalized(levels: Array) -> Array:
    counts = np.cumsum(np.bincount(levels.ravel(), minlength=256))
    first = counts[levels.min()]
    if first == counts[-1]:
        return levels
    return np.rint((counts[levels] - first) / (counts[-1] - first) * 255).astype(int)


def film(liquid: Array) -> Array:
    depth = np.floor(liquid.clip(0, 1) * 255)
    distance = chamfer(canny(depth, 50, 150), 20)
    levels = equalized(np.floor(ndimage.uniform_filter(distance, 3, mode="mirror") + 1e-6).astype(int))
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    light = ndimage.correlate(levels, emboss, mode="mirror").clip(0, 255).astype(float)
    water = np.rint(ndimage.uniform_filter(light, 3, mode="mirror")) * depth
    return water / max(water.max(), 1)
