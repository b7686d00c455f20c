"""JPEG compression and decompression of a batch, without the entropy coding that loses nothing."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ttaq.data.corruptions.draw import Draw
from ttaq.data.corruptions.parameters import Parameters

__all__ = ["jpeg_compression", "quantization_table"]

# ITU-T T.81, Annex K.1, tables K.1 and K.2, row by row.
LUMINANCE = (
    *(16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29),
    *(51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121),
    *(120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    *(17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99),
    *(99,) * 36,
)


def quantization_table(base: tuple[int, ...], quality: int) -> list[int]:
    """libjpeg's scaling of a table of 64 to a quality of 1 to 100: `(base s + 50) // 100` clipped to 1..255,
    `s = 5000 // quality` under 50, else `200 - 2 quality`."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return [min(max((entry * scale + 50) // 100, 1), 255) for entry in base]


@lru_cache(maxsize=1)
def transform_matrix() -> Tensor:
    """fp32 (64, 64) on the CPU: the orthonormal two-dimensional DCT-II of an 8 x 8 block written as a row of 64."""
    index = torch.arange(8, dtype=torch.float64)
    cosines = torch.cos((2 * index[None, :] + 1) * index[:, None] * math.pi / 16) / 2
    cosines[0] /= math.sqrt(2)
    return torch.kron(cosines, cosines).float()


def through_blocks(planes: Tensor, table: list[int]) -> Tensor:
    """fp32 planes (N, H, W) of levels, sides multiples of 8: DCT of each 8 x 8 block, divided by the table, rounded,
    multiplied, transformed back, rounded, clipped to 0..255."""
    _, height, width = planes.shape
    matrix = transform_matrix().to(planes.device)
    steps = torch.tensor(table, dtype=torch.float32, device=planes.device)
    blocks = rearrange(planes, "n (row i) (col j) -> (n row col) (i j)", i=8, j=8) - 128
    eighths = (torch.matmul(blocks, matrix.T) * 8 + 0.5).floor()
    kept = eighths.sign() * ((eighths.abs() + 4 * steps) / (8 * steps)).floor() * steps
    back = (torch.matmul(kept, matrix) + 128.5).floor().clamp_(0, 255)
    return rearrange(back, "(n row col) (i j) -> n (row i) (col j)", row=height // 8, col=width // 8, i=8)


def compress(levels: Tensor, quality: int) -> Tensor:
    """Levels 0..255 (N, 3, H, W) fp32 through JPEG at this quality with 4:2:0 chroma, the steps of libjpeg-turbo.

    JFIF YCbCr, rounded; chroma averaged over 2 x 2 pixels (the half rounded up in every other column); the blocks;
    chroma enlarged with weights 9, 3, 3, 1 / 16; back to RGB, rounded and clipped. Sides are filled up to multiples of
    16 with the last row and column.
    """
    height, width = levels.shape[-2:]
    padded = F.pad(levels, (0, -width % 16, 0, -height % 16), mode="replicate")
    red, green, blue = padded.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    to_blue = 0.5 * blue - 0.168735892 * red - 0.331264108 * green + 128
    to_red = 0.5 * red - 0.418687589 * green - 0.081312411 * blue + 128
    luma = through_blocks((luma + 0.5).floor(), quantization_table(LUMINANCE, quality))[:, :height, :width]
    chroma = (torch.cat((to_blue, to_red)) + 0.4999).floor()
    columns = torch.arange(chroma.shape[-1] // 2, device=levels.device)
    chroma = (F.avg_pool2d(chroma, 2) + torch.where(columns % 2 == 0, 0.25, 0.5)).floor()
    chroma = through_blocks(chroma, quantization_table(CHROMINANCE, quality))
    chroma = chroma[:, : (height + 1) // 2, : (width + 1) // 2]
    chroma = F.interpolate(chroma[:, None], scale_factor=2, mode="bilinear", align_corners=False)[:, 0]
    columns = torch.arange(width, device=levels.device)
    chroma = (chroma[:, :height, :width] + torch.where(columns % 2 == 0, 8 / 16, 7 / 16)).floor() - 128
    to_blue, to_red = chroma.chunk(2)
    green = luma - 0.344136286 * to_blue - 0.714136286 * to_red
    decoded = torch.stack((luma + 1.402 * to_red, green, luma + 1.772 * to_blue), 1)
    return (decoded + 0.5).floor().clamp_(0, 255)


def jpeg_compression(images: Tensor, parameters: Parameters, draw: Draw) -> Tensor:  # noqa: ARG001
    """Written as JPEG and read again (see `compress`).

    quality at 32 px: 80, 65, 58, 50, 40. At 224 px: 25, 18, 15, 10, 7. Draws nothing.
    Source: arXiv 1903.12261, hendrycks/robustness; the format is ITU-T T.81, the tables' scaling libjpeg's.
    Differs from the original: PIL's libjpeg-turbo uses a 13-bit integer cosine transform, this one fp32; against PIL
    the result has a PSNR of 53 dB or more. Images off the levels k/255 are rounded to them first.
    """
    (quality,) = parameters
    return compress((images * 255).round(), int(quality)) / 255
