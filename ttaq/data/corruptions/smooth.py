"""Gaussian smoothing as two matrix products, exact at any width and any border rule."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

__all__ = ["gaussian_smooth"]

Border = Literal["nearest", "reflect"]


@lru_cache(maxsize=64)
def smoothing_matrix(size: int, sigma: float, border: Border, truncate: float) -> Tensor:
    """fp32 (size, size) on the CPU: row i holds the weights with which a line's samples make its smoothed sample i.

    Taps k = -r..r, `r = floor(truncate sigma + 1/2)`, weights in proportion to `exp(-k^2 / 2 sigma^2)`, sum 1. Beyond
    the ends a line goes on with its end sample ("nearest") or mirrored about its edge, `c b a | a b c` ("reflect").
    """
    radius = int(truncate * sigma + 0.5)
    taps = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (taps / sigma) ** 2) if radius else np.ones(1)
    weights /= weights.sum()
    rows = np.arange(size)[:, None]
    places = rows + taps[None, :]
    if border == "nearest":
        places = places.clip(0, size - 1)
    else:
        places = places % (2 * size)
        places = np.where(places < size, places, 2 * size - 1 - places)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.broadcast_to(rows, places.shape), places), np.broadcast_to(weights, places.shape))
    return torch.from_numpy(matrix.astype(np.float32))


def gaussian_smooth(planes: Tensor, sigma: float, border: Border = "nearest", truncate: float = 4.0) -> Tensor:
    """Gaussian blur of fp32 planes (..., H, W) with standard deviation `sigma` in pixels, cut off at truncate sigma.

    The filter of `scipy.ndimage.gaussian_filter`, whose defaults these are but for the border. sigma 0 is the identity.
    """
    height, width = planes.shape[-2:]
    down = smoothing_matrix(height, sigma, border, truncate).to(planes.device)
    across = smoothing_matrix(width, sigma, border, truncate).to(planes.device)
    return torch.matmul(down, torch.matmul(planes, across.T))
