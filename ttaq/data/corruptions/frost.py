"""Frost: photographs of frosted windows laid over the image, or a drawing of such where there are none."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ttaq.data.corruptions.draw import Draw
from ttaq.data.corruptions.ice import ice_crystals
from ttaq.data.corruptions.parameters import Parameters, table_of
from ttaq.data.images import to_float
from ttaq.errors import DataError, InputError, require

__all__ = ["frost", "frost_source"]

TEXTURES = 5
SUFFIXES = (".png", ".jpg", ".jpeg")


def texture_files(folder: Path) -> tuple[Path, ...]:
    """The files frost1 to frost5 (png, jpg or jpeg) of a folder; DataError says what is missing."""
    if not folder.is_dir():
        raise DataError(f"frost: {folder} is not a folder, expected one with frost1 to frost{TEXTURES} as png or jpg")
    found = []
    for number in range(1, TEXTURES + 1):
        candidates = [folder / f"frost{number}{suffix}" for suffix in SUFFIXES]
        file = next((path for path in candidates if path.is_file()), None)
        if file is None:
            raise DataError(
                f"frost: {folder} has no frost{number}{{{','.join(SUFFIXES)}}}; give all of 1 to {TEXTURES}"
            )
        found.append(file.resolve())
    return tuple(found)


def frost_source(frost_textures: Path | None) -> Literal["textures", "procedural"]:
    """Where `corrupt(..., "frost", ..., frost_textures=...)` takes its frost from; belongs into a run's record.

    "textures": the files in that folder, comparable with published results. "procedural": drawn, not comparable.
    Raises DataError where the folder, or one of its files frost1 to frost5, is missing.
    """
    if frost_textures is None:
        return "procedural"
    texture_files(Path(frost_textures))
    return "textures"


@lru_cache(maxsize=4 * TEXTURES)
def read_texture(path: Path, stride: int) -> Tensor:
    """uint8 (3, H, W) on the CPU: the picture, an alpha channel ignored; with a stride only the middle pixel of each
    stride x stride block (bilinear resizing by 1/5 with pixel centres aligned reads just those)."""
    image = require("PIL.Image", "images", "frost")
    try:
        with image.open(path) as picture:
            pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    except OSError as error:
        raise DataError(f"frost: {path} could not be read as a picture ({error}); replace the file") from error
    return pixels[stride // 2 :: stride, stride // 2 :: stride].permute(2, 0, 1).contiguous()


def texture_crops(count: int, height: int, width: int, stride: int, files: tuple[Path, ...], draw: Draw) -> Tensor:
    """fp32 (count, 3, height, width) in [0, 1]: for each image a texture and a place in it, all drawn uniformly."""
    which = draw.integers(0, len(files), count).tolist()
    down, across = draw.uniform(0, 1, 2, count).tolist()
    crops = torch.empty(count, 3, height, width, dtype=torch.uint8)
    for i, number in enumerate(which):
        texture = read_texture(files[number], stride)
        room = (texture.shape[1] - height, texture.shape[2] - width)
        if min(room) < 0:
            raise InputError(
                f"frost: {files[number]} gives {texture.shape[1]} x {texture.shape[2]} pixels of frost, "
                f"expected at least {height} x {width}; give larger textures or smaller images"
            )
        top, left = int(down[i] * max(room[0], 1)), int(across[i] * max(room[1], 1))
        crops[i] = texture[:, top : top + height, left : left + width]
    return to_float(crops.to(draw.device))


def frost(images: Tensor, parameters: Parameters, draw: Draw, textures: Path | None = None) -> Tensor:
    """`a x + b frost`, frost a random crop of a random texture of five.

    (a, b) at 32 px: (1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45), textures at a fifth of their size.
    At 224 px: (1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75), textures at full size.
    `textures` names a folder with frost1 to frost5 (the repository of the original has six and draws from the first
    five, and so does this). Without a folder the frost is drawn (`ice.ice_crystals`): of like brightness and grain,
    but another corruption than the published one, and not comparable with it.
    Differs from the original: with textures, in nothing but the stream of random numbers.
    """
    share, weight = parameters
    count, _, height, width = images.shape
    stride = 5 if table_of(height, width) == "cifar" else 1
    if textures is None:
        layer = ice_crystals(count, height, width, stride, draw)
    else:
        layer = texture_crops(count, height, width, stride, texture_files(Path(textures)), draw)
    return share * images + weight * layer
