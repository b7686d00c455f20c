"""A drawing of frost for those who have no textures: star crystals with side branches, grown into one another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ttaq.data.corruptions.draw import Draw

__all__ = ["ice_crystals"]

PITCH = 40.0  # Mean distance of crystal centres, in pixels of a full-size texture.
BRANCH = 9.0  # Distance of side branches along an arm, likewise.
# Over random crops of the five published textures: mean colour, deviation inside a crop; SPREAD gives their means'.
TINT = (0.55, 0.63, 0.68)
DEVIATION = 0.095
SPREAD = 0.26


def ice_crystals(count: int, height: int, width: int, stride: int, draw: Draw) -> Tensor:
    """fp32 (count, 3, height, width) in [0, 1]: one drawing per image, seen at 1/stride of its size.

    Centres lie uniformly at random, about one per 40 x 40 pixels, each with a random direction and brightness. A pixel
    belongs to its nearest centre. In that centre's frame of six arms 60 degrees apart it has a distance u along the
    nearest arm and v across it: arms are bright where v is small, side branches where `u - v / tan 60` is near a
    multiple of 9 pixels, both fading outwards; seams between two crystals are dark. On top: fine grain. The mean
    colour, its spread from image to image and the contrast are those of the published textures; the shapes are not.
    """
    device = draw.device
    tall, wide = height * stride, width * stride
    centres = math.ceil((tall + 2 * PITCH) * (wide + 2 * PITCH) / PITCH**2)
    centre_y = draw.uniform(-PITCH, tall + PITCH, count, centres, 1, 1)
    centre_x = draw.uniform(-PITCH, wide + PITCH, count, centres, 1, 1)
    turn = draw.uniform(0, math.pi / 3, count, centres)
    shine = draw.uniform(-0.2, 0.2, count, centres)
    y = torch.arange(height, device=device)[:, None] * stride + stride // 2
    x = torch.arange(width, device=device)[None, :] * stride + stride // 2
    nearest = torch.full((count, height, width), math.inf, device=device)
    second, owner = nearest, torch.zeros_like(nearest, dtype=torch.int64)
    for k in range(centres):  # One by one: all distances of a batch at once would take gigabytes.
        squared = (y - centre_y[:, k]) ** 2 + (x - centre_x[:, k]) ** 2
        second = torch.minimum(second, torch.maximum(nearest, squared))
        owner = torch.where(squared < nearest, k, owner)
        nearest = torch.minimum(nearest, squared)
    distance, second, owner = nearest.sqrt(), second.sqrt(), owner.flatten(1)

    def of_owner(values: Tensor) -> Tensor:
        return values.view(count, centres).gather(1, owner).view(count, height, width)

    angle = torch.atan2(y - of_owner(centre_y), x - of_owner(centre_x)) - of_owner(turn)
    folded = torch.remainder(angle, math.pi / 3) - math.pi / 6
    along, across = distance * folded.cos(), distance * folded.sin().abs()
    arm = torch.exp(-((across / 2.5) ** 2))
    phase = (along - across / math.tan(math.pi / 3)) / BRANCH
    branch = torch.exp(-((torch.remainder(phase, 1) - 0.5) ** 2) / 0.03) * torch.exp(-across / (2 * BRANCH))
    seam = torch.exp(-(second - distance) / 3)
    grain = draw.normal(count, height, width)
    ice = torch.maximum(arm, 0.8 * branch) * torch.exp(-distance / PITCH) - 0.6 * seam + of_owner(shine) + 0.15 * grain
    spread = ice.std((1, 2), keepdim=True).clamp_min(1e-6)
    ice = (ice - ice.mean((1, 2), keepdim=True)) / spread
    level = draw.uniform(-SPREAD, SPREAD, count, 1, 1)
    tint = torch.tensor(TINT, device=device).view(1, 3, 1, 1)
    return (tint + (level + DEVIATION * ice)[:, None]).clamp(0, 1)
