"""The step in front of every model: images in [0, 1] in, standardised images out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ttaq.errors import InputError

__all__ = ["Normalize"]


class Normalize(nn.Module):
    """`y[n, c] = (x[n, c] - mean[c]) / std[c]` for images x (N, C, H, W) in [0, 1].

    mean, std: one number per channel, in the units of the image; std > 0. They belong to the architecture, not to the
    weights: the buffers move with the model but are absent from its state_dict.

    Raises InputError for a different number of means and standard deviations, or a standard deviation that is not
    positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not len(mean):
            raise InputError(
                f"Normalize: got {len(mean)} means and {len(std)} standard deviations, expected one of each per channel"
            )
        if not all(map(math.isfinite, mean)) or not all(0 < value < math.inf for value in std):
            raise InputError(
                f"Normalize: mean is {list(mean)} and std {list(std)}, expected finite and positive numbers"
            )
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std
