"""From an image file to a square of bytes: decoding with Pillow, colour, resizing, cropping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttaq.errors import DataError, require

__all__ = ["PREPROCESSINGS", "decode_image"]

PREPROCESSINGS = ("none", "crop", "resize256crop224")


def decode_image(
    path: Path, preprocessing: str, size: int = 224, position: tuple[float, float] | None = None
) -> Tensor:
    """The image as uint8 (3, size, size), red, green, blue.

    preprocessing:
        "none": the stored image must be size x size (ImageNet-C).
        "crop": a square is cut out of the stored image.
        "resize256crop224": the shorter side becomes 8/7 size (256 for 224; bilinear, antialiased, the longer side
            rounded down), then a square is cut out.
    position: where the square lies between top and bottom and between left and right, each in [0, 1); None is the
    centre, rounded towards the top left: row (height - size) // 2. torchvision rounds an odd margin to the even pixel
    instead, so it lies one pixel further where the margin is 3, 7, 11, ...

    Grey, palette and CMYK become RGB as Pillow converts them, 16-bit grey is scaled by 255/65535, alpha is dropped and
    EXIF rotation ignored, as in the usual ImageNet loaders.

    Raises DataError for a file that is missing, damaged, not an image, or of a size that the preprocessing cannot use,
    MissingPackageError without Pillow.
    """
    pillow = require("PIL.Image", "images", "decode_image")
    try:
        with pillow.open(path) as file:
            image = _rgb(file, pillow)
    except Exception as error:  # what a damaged file makes a decoder raise is not a closed list
        raise DataError(f"decode_image: cannot read {path}: {error}; replace the file or remove it") from error
    width, height = image.size
    if preprocessing == "none":
        if (width, height) != (size, size):
            raise DataError(
                f"decode_image: {path} is {width}x{height}, expected {size}x{size}, since preprocessing is 'none'; "
                f"give its size, or choose {' or '.join(map(repr, PREPROCESSINGS[1:]))}"
            )
        return _tensor(image)
    if preprocessing == "crop":
        if min(width, height) < size:
            raise DataError(
                f"decode_image: {path} is {width}x{height}, smaller than the crop of {size}x{size}; "
                f"give a smaller size, or choose 'resize256crop224'"
            )
    else:
        if min(width, height) < 2:
            raise DataError(f"decode_image: {path} is {width}x{height}, expected at least 2x2 to enlarge it")
        image = image.resize(_resized(width, height, size * 8 // 7), pillow.Resampling.BILINEAR)
    width, height = image.size
    vertical, horizontal = (height - size, width - size)
    if position is None:
        top, left = vertical // 2, horizontal // 2
    else:
        top, left = int(position[0] * (vertical + 1)), int(position[1] * (horizontal + 1))
    return _tensor(image.crop((left, top, left + size, top + size)))


def _resized(width: int, height: int, shorter: int) -> tuple[int, int]:
    if width <= height:
        return shorter, height * shorter // width
    return width * shorter // height, shorter


def _rgb(image: Any, pillow: Any) -> Any:
    if image.mode == "F":
        raise ValueError("its pixels are floating point numbers of unknown range")
    if image.mode.startswith("I"):  # Pillow would clip these to 255
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"its grey levels are {levels.min()} to {levels.max()}, expected 0 to 65535")
        image = pillow.fromarray(((levels + 128) // 257).astype(np.uint8))
    if image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about the direct way
    return image.convert("RGB")


def _tensor(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
