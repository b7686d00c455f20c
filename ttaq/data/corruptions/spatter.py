"""Spatter: drops of water, or mud, on the lens. Source: arXiv 1903.12261, hendrycks/robustness."""

from __future__ import annotations

import torch
from torch import Tensor

from ttaq.data.corruptions.draw import Draw
from ttaq.data.corruptions.edges import canny_edges, distance_to, equalize_histogram, filter_3x3
from ttaq.data.corruptions.parameters import Parameters
from ttaq.data.corruptions.smooth import gaussian_smooth

__all__ = ["spatter", "water_layer"]

WATER = (175 / 255, 238 / 255, 238 / 255)
MUD = (63 / 255, 42 / 255, 20 / 255)
MEAN_3X3 = ((1 / 9,) * 3,) * 3
EMBOSS = ((-2.0, -1.0, 0.0), (-1.0, 1.0, 1.0), (0.0, 1.0, 2.0))


def water_layer(liquid: Tensor) -> Tensor:
    """The strength of the water film, 0 to 1, per pixel, from a liquid depth (N, H, W) that is 0 outside the drops.

    Canny edges (50, 150) of the depth's levels; distance to them, at most 20; 3 x 3 mean, truncated; equalized;
    embossed from the upper left; 3 x 3 mean, rounded; times the depth's level; divided by the greatest value.
    A plane that comes out empty (the original divides 0 by 0 there) stays without water.
    """
    depth = (liquid.clamp(0, 1) * 255).floor()
    film = distance_to(canny_edges(depth, 50, 150), 20)
    film = equalize_histogram((filter_3x3(film, MEAN_3X3) + 1e-4).floor())
    film = filter_3x3(film, EMBOSS).clamp(0, 255)
    film = filter_3x3(film, MEAN_3X3).round() * depth
    return film / film.amax((1, 2), keepdim=True).clamp_min(1)


def spatter(images: Tensor, parameters: Parameters, draw: Draw) -> Tensor:
    """Water (`x + strength film colour`) at severities 1 to 3, mud (`(1 - m) x + m colour`) at 4 and 5.

    The liquid is Gaussian noise, one channel, of the given mean and deviation, blurred by `blur` pixels and set to 0
    where under `threshold`. Water (kind 0): see `water_layer`, pale turquoise, `amount` is the strength. Mud (kind 1):
    m is the mask of liquid over the threshold, blurred by `amount` pixels and set to 0 where under 0.8; brown.

    (mean, deviation, blur, threshold, amount, kind) at 32 px: (0.62, 0.1, 0.7, 0.7, 0.5, 0),
    (0.65, 0.1, 0.8, 0.7, 0.5, 0), (0.65, 0.3, 1, 0.69, 0.5, 0), (0.65, 0.1, 0.7, 0.69, 0.6, 1),
    (0.65, 0.1, 0.5, 0.68, 0.6, 1). At 224 px: (0.65, 0.3, 4, 0.69, 0.6, 0), (0.65, 0.3, 3, 0.68, 0.6, 0),
    (0.65, 0.3, 2, 0.68, 0.5, 0), (0.65, 0.3, 1, 0.65, 1.5, 1), (0.67, 0.4, 1, 0.65, 1.5, 1).
    Differs from the original: a depth over 1 is clipped, where the original's cast wraps round to 0 (past 4 deviations
    of the blurred noise); an image without liquid gets no water, where the original divides by 0.
    """
    mean, deviation, blur, threshold, amount, kind = parameters
    count, _, height, width = images.shape
    liquid = gaussian_smooth(draw.normal(count, height, width).mul_(deviation).add_(mean), blur)
    liquid = torch.where(liquid < threshold, 0.0, liquid)
    if kind == 0:
        colour = torch.tensor(WATER, device=images.device).view(1, 3, 1, 1)
        return images + amount * water_layer(liquid)[:, None] * colour
    mask = gaussian_smooth((liquid > threshold).float(), amount)
    mask = torch.where(mask < 0.8, 0.0, mask)[:, None]
    return (1 - mask) * images + mask * torch.tensor(MUD, device=images.device).view(1, 3, 1, 1)
