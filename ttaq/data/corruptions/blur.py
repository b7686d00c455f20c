"""Blurs that only mix neighbouring pixels. Source of all: arXiv 1903.12261, hendrycks/robustness."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ttaq.data.corruptions.draw import Draw
from ttaq.data.corruptions.motion import smear
from ttaq.data.corruptions.parameters import Parameters
from ttaq.data.corruptions.smooth import gaussian_smooth

__all__ = ["defocus_blur", "enlarge_centre", "gaussian_blur", "motion_blur", "zoom_blur"]


def gaussian_blur(images: Tensor, parameters: Parameters, draw: Draw) -> Tensor:  # noqa: ARG001
    """Gaussian blur of standard deviation sigma pixels, cut off at 4 sigma, border pixels repeated.

    sigma at 32 px: 0.4, 0.6, 0.7, 0.8, 1. At 224 px: 1, 2, 3, 4, 6. Draws nothing.
    Differs from the original: not at all (fp32 instead of fp64).
    """
    (sigma,) = parameters
    return gaussian_smooth(images, sigma)


def defocus_kernel(radius: float, softness: float) -> np.ndarray:
    """A disk of `radius` pixels, softened by a Gaussian of standard deviation `softness`: fp64, odd side, sum about 1.

    The pixels of a 17 x 17 square (or as far as the radius reaches, if that is more) whose centres lie in the disk;
    then 3 (above radius 8: 5) Gaussian taps along each axis, the square mirrored about its outermost pixels.
    """
    reach = max(8, math.ceil(radius))
    half = 1 if radius <= 8 else 2
    axis = np.arange(-reach, reach + 1)
    disk = (axis[:, None] ** 2 + axis[None, :] ** 2 <= radius**2).astype(np.float64)
    disk /= disk.sum()
    taps = np.exp(-0.5 * (np.arange(-half, half + 1) / softness) ** 2)
    taps /= taps.sum()
    for _ in range(2):
        padded = np.pad(disk, ((half, half), (0, 0)), mode="reflect")
        disk = sum(taps[i] * padded[i : i + len(axis)] for i in range(len(taps))).T
    return disk


def defocus_blur(images: Tensor, parameters: Parameters, draw: Draw) -> Tensor:  # noqa: ARG001
    """Convolution with a soft disk (see `defocus_kernel`); the image is mirrored about its outermost pixels.

    (radius, softness) at 32 px: (0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1); under radius 1 the disk is
    one pixel, so the first three are softness alone. At 224 px: (3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5).
    Draws nothing.
    Differs from the original: the convolution goes through the Fourier transform (fp32 error under 1e-6).
    """
    radius, softness = parameters
    kernel = torch.from_numpy(defocus_kernel(radius, softness).astype(np.float32)).to(images.device)
    reach = len(kernel) // 2
    height, width = images.shape[-2:]
    padded = F.pad(images, (reach, reach, reach, reach), mode="reflect")
    size = [16 * math.ceil(side / 16) for side in padded.shape[-2:]]
    # The disk is symmetric, so convolution and correlation are the same; wrap-around only meets what is cut off.
    product = torch.fft.rfft2(padded, s=size) * torch.fft.rfft2(kernel, s=size)
    blurred: Tensor = torch.fft.irfft2(product, s=size)
    return blurred[..., 2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width]


def motion_blur(images: Tensor, parameters: Parameters, draw: Draw) -> Tensor:
    """Each image is dragged along a direction of its own, uniform in -45 to 45 degrees (see `motion.smear`).

    (radius, sigma) at 32 px: (6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5).
    At 224 px: (10, 3), (15, 5), (15, 8), (15, 12), (20, 15).
    Differs from the original: ImageMagick's filter is written in torch instead of called through Wand. ImageMagick 6.9
    truncates its result to levels, as happens here at the end.
    """
    radius, sigma = parameters
    angles = draw.uniform(-45, 45, len(images))
    return smear(images, int(radius), sigma, angles)


def enlarge_centre(planes: Tensor, factor: float) -> Tensor:
    """The middle `1/factor` of planes (N, C, H, W), enlarged to H x W: bilinear, corner pixels on corner pixels.

    Per axis: the middle `m = ceil(n / factor)` pixels become `round(m factor)`, of which the middle n are kept.
    """
    sides = planes.shape[-2:]
    crop = [math.ceil(side / factor) for side in sides]
    top, left = ((side - part) // 2 for side, part in zip(sides, crop, strict=True))
    middle = planes[..., top : top + crop[0], left : left + crop[1]]
    size = [round(part * factor) for part in crop]
    large = F.interpolate(middle, size=size, mode="bilinear", align_corners=True)
    top, left = ((part - side) // 2 for side, part in zip(sides, size, strict=True))
    return large[..., top : top + sides[0], left : left + sides[1]]


def zoom_blur(images: Tensor, parameters: Parameters, draw: Draw) -> Tensor:  # noqa: ARG001
    """The mean of the image and of its enlargements by 1, 1 + step, 1 + 2 step, ... (the image itself counts twice).

    (end, step) at 32 px: (1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01).
    At 224 px: (1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03).
    The factors are `numpy.arange(1, end, step)`, whose rounding lets `end` itself in at 1.06 and 1.11. Draws nothing.
    Differs from the original: not at all (`scipy.ndimage.zoom` of order 1 is this interpolation).
    """
    end, step = parameters
    factors = np.arange(1, end, step)
    total = images.clone()
    for factor in factors.tolist():
        total += enlarge_centre(images, factor)
    return total / (len(factors) + 1)
