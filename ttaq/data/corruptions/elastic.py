"""Elastic transform: a random affine map, then random local displacements."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ttaq.data.corruptions.draw import Draw
from ttaq.data.corruptions.parameters import Parameters
from ttaq.data.corruptions.smooth import gaussian_smooth

__all__ = ["affine_sources", "elastic_transform", "sample"]


def sample(images: Tensor, x: Tensor, y: Tensor, mirror_pixels: bool) -> Tensor:
    """Bilinear values of images (N, C, H, W) at columns x and rows y (N, H, W), in pixels, 0 being a pixel's centre.

    Beyond the border the image is mirrored, about its outermost pixels if `mirror_pixels`, else about its outer edge.
    """
    height, width = images.shape[-2:]
    if mirror_pixels:
        grid = torch.stack((2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1), -1)
    else:
        grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=mirror_pixels)


def affine_sources(corners: Tensor, moved: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Where the affine map from `corners` to `moved` (N, 3, 2), points (x, y), finds each pixel: x, y (N, H, W)."""
    back = torch.linalg.solve((moved[:, 1:] - moved[:, :1]).double(), (corners[:, 1:] - corners[:, :1]).double())
    rows, columns = torch.meshgrid(
        torch.arange(height, device=moved.device), torch.arange(width, device=moved.device), indexing="ij"
    )
    offsets = torch.stack((columns, rows), -1).double().view(1, -1, 2) - moved[:, :1]
    places = (torch.bmm(offsets, back) + corners[:, :1]).float().view(-1, height, width, 2)
    return places[..., 0], places[..., 1]


def elastic_transform(images: Tensor, parameters: Parameters, draw: Draw) -> Tensor:
    """Three points about the middle are moved by up to `jitter` in x and y, and the image with them (an affine map,
    mirrored about the outermost pixels); then each pixel is fetched from a place displaced by a smooth random field,
    uniform noise in -1..1 blurred by `smoothness` (cut off at 3 deviations) and multiplied by `strength`.

    The points are (c + s, c + s), (c + s, c - s), (c - s, c - s), c the middle and s a third of the side.
    (strength, smoothness, jitter) in shares of the shorter side, at 32 px: (0, 0, 0.08), (0.05, 0.2, 0.07),
    (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03). At 224 px, in shares of 244 pixels (244 was meant to be
    224, as the original remarks): (2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02),
    (0.12, 0.01, 0.02).
    Source: arXiv 1903.12261, hendrycks/robustness (after Simard et al. 2003).
    Differs from the original: OpenCV rounds the affine map's places to 1/32 pixel, this does not.
    """
    count, _, height, width = images.shape
    side = min(height, width)
    strength, smoothness, jitter = (side * share for share in parameters)
    third = side // 3
    shape = torch.tensor([[1, 1], [1, -1], [-1, -1]], dtype=torch.float32, device=images.device)
    middle = torch.tensor([width // 2, height // 2], dtype=torch.float32, device=images.device)
    corners = (middle + third * shape).expand(count, 3, 2)
    moved = corners + draw.uniform(-jitter, jitter, count, 3, 2)
    images = sample(images, *affine_sources(corners, moved, height, width), mirror_pixels=True)
    if strength == 0:
        return images
    fields = draw.uniform(-1, 1, 2, count, height, width)
    dx, dy = gaussian_smooth(fields, smoothness, border="reflect", truncate=3) * strength
    columns = torch.arange(width, device=images.device)
    rows = torch.arange(height, device=images.device)[:, None]
    return sample(images, columns + dx, rows + dy, mirror_pixels=False)
