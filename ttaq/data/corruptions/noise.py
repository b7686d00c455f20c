"""The four noises: independent for every pixel and channel. Source of all: arXiv 1903.12261, hendrycks/robustness."""

from __future__ import annotations

import torch
from torch import Tensor

from ttaq.data.corruptions.draw import Draw
from ttaq.data.corruptions.parameters import Parameters

__all__ = ["gaussian_noise", "impulse_noise", "shot_noise", "speckle_noise"]


def gaussian_noise(images: Tensor, parameters: Parameters, draw: Draw) -> Tensor:
    """`x + sigma z`, z standard normal.

    sigma at 32 px: 0.04, 0.06, 0.08, 0.09, 0.1. At 224 px: 0.08, 0.12, 0.18, 0.26, 0.38.
    Differs from the original: in nothing but the stream of random numbers.
    """
    (sigma,) = parameters
    return images + sigma * draw.normal(*images.shape)


def shot_noise(images: Tensor, parameters: Parameters, draw: Draw) -> Tensor:
    """`Poisson(photons x) / photons`: the counting noise of few photons.

    photons at 32 px: 500, 250, 100, 75, 50. At 224 px: 60, 25, 12, 5, 3.
    Differs from the original: in nothing but the stream of random numbers.
    """
    (photons,) = parameters
    return draw.poisson(photons * images) / photons


def impulse_noise(images: Tensor, parameters: Parameters, draw: Draw) -> Tensor:
    """Salt and pepper: a share of all values (each channel by itself) is set to 0 or to 1, either as often.

    share at 32 px: 0.01, 0.02, 0.03, 0.05, 0.07. At 224 px: 0.03, 0.06, 0.09, 0.17, 0.27.
    Differs from the original: in nothing but the stream of random numbers.
    """
    (share,) = parameters
    chance = draw.uniform(0, 1, *images.shape)
    salted = torch.where(chance < share, 1.0, images)
    return torch.where(chance < share / 2, 0.0, salted)


def speckle_noise(images: Tensor, parameters: Parameters, draw: Draw) -> Tensor:
    """`x + sigma x z`, z standard normal: noise in proportion to the light.

    sigma at 32 px: 0.06, 0.1, 0.12, 0.16, 0.2. At 224 px: 0.15, 0.2, 0.35, 0.45, 0.6.
    Differs from the original: in nothing but the stream of random numbers.
    """
    (sigma,) = parameters
    return images + images * draw.normal(*images.shape).mul_(sigma)
