"""One entrance to all corruptions: checks, the published parameters, and the levels of the stored sets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ttaq.data.corruptions import blur, digital, noise, weather
from ttaq.data.corruptions.draw import Draw
from ttaq.data.corruptions.elastic import elastic_transform
from ttaq.data.corruptions.frost import frost
from ttaq.data.corruptions.glass import glass_blur
from ttaq.data.corruptions.jpeg import jpeg_compression
from ttaq.data.corruptions.levels import truncate_to_level
from ttaq.data.corruptions.parameters import SEVERITIES, Parameters, parameters_of
from ttaq.data.corruptions.spatter import spatter
from ttaq.data.images import to_float
from ttaq.errors import InputError

__all__ = ["CORRUPTIONS", "VALIDATION_CORRUPTIONS", "corrupt"]

Kind = Callable[[Tensor, Parameters, Draw], Tensor]

TEST_KINDS: dict[str, Kind] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "frost": frost,
    "fog": weather.fog,
    "brightness": digital.brightness,
    "contrast": digital.contrast,
    "elastic_transform": elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": jpeg_compression,
}
VALIDATION_KINDS: dict[str, Kind] = {
    "speckle_noise": noise.speckle_noise,
    "gaussian_blur": blur.gaussian_blur,
    "spatter": spatter,
    "saturate": digital.saturate,
}
KINDS = TEST_KINDS | VALIDATION_KINDS
CORRUPTIONS = tuple(TEST_KINDS)
VALIDATION_CORRUPTIONS = tuple(VALIDATION_KINDS)
# The widest kernel reaches 10 pixels past the border, which mirroring can give from 11 pixels on.
SMALLEST_SIDE = 11
# Pixels worked on at a time, 2,048 images of 32 x 32: the blurs hold several enlarged copies of what they work on.
PIECE = 1 << 21


def checked(images: Tensor, name: str, severity: int, generator: torch.Generator) -> Tensor:
    """The images as fp32 in [0, 1], or an InputError that says what is wrong."""
    if name not in KINDS:
        raise InputError(f"corrupt: got name={name!r}, expected one of {', '.join(KINDS)}")
    if type(severity) is not int or severity not in SEVERITIES:
        raise InputError(f"corrupt: got severity={severity!r}, expected a whole number from 1 to 5")
    if not isinstance(generator, torch.Generator):
        raise InputError(f"corrupt: got generator={generator!r}, expected a torch.Generator with a seed of your choice")
    if not isinstance(images, Tensor):
        raise InputError(f"corrupt: got images of type {type(images).__name__}, expected a tensor (N, 3, H, W)")
    if images.dtype not in (torch.float32, torch.uint8):
        raise InputError(f"corrupt: got images of {images.dtype}, expected float32 in [0, 1] or uint8; convert them")
    if images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"corrupt: got images of shape {tuple(images.shape)}, expected (N, 3, H, W)")
    if min(images.shape[2:]) < SMALLEST_SIDE:
        raise InputError(
            f"corrupt: got images of {images.shape[2]} x {images.shape[3]} pixels, "
            f"expected at least {SMALLEST_SIDE} a side; enlarge them"
        )
    if images.dtype is torch.uint8:
        return to_float(images).contiguous()
    if images.numel():
        low, high = (float(bound) for bound in images.detach().aminmax())
        if not (low >= 0 and high <= 1):
            raise InputError(f"corrupt: got images with values from {low} to {high}, expected all in [0, 1]")
    return images.contiguous()


def corrupt(
    images: Tensor,
    name: str,
    severity: int,
    generator: torch.Generator,
    *,
    frost_textures: Path | None = None,
) -> Tensor:
    """A corrupted copy of images, as ImageNet-C and CIFAR-10-C would hold it.

    images: (N, 3, H, W), fp32 in [0, 1] or uint8, on any device, at least 11 pixels a side; not modified. name: one of
    CORRUPTIONS or VALIDATION_CORRUPTIONS. severity: 1 to 5. generator: source of all random numbers; each image gets
    its own. It may live on another device than the images. frost_textures: a folder with the published textures
    frost1 to frost5 (needs Pillow), used by frost only; see `frost_source`.

    Returns fp32 (N, 3, H, W) in [0, 1] on the images' device, every value k/255. As where the original casts to uint8,
    values are truncated to levels; pixelate and jpeg_compression round to the nearest inside, as their libraries do.
    Which of the two published sets of parameters is used is said by `parameters.table_of`.
    Deterministic: the same images, name, severity and state of the generator give the same bits on the same kind of
    device. Splitting a batch changes the draws. No gradient flows.

    Differs from the stored sets: each corruption's own docstring; and ImageNet-C was stored as JPEG of quality 85 after
    the corruption, which is not repeated here.

    Raises InputError for an unknown name, another severity, and images of another type, shape or range (NaN included);
    DataError for a folder without the textures.
    """
    clean = checked(images, name, severity, generator)
    kind = partial(frost, textures=frost_textures) if name == "frost" else KINDS[name]
    if not len(clean):
        return torch.empty_like(clean)
    numbers = parameters_of(name, severity, clean.shape[2], clean.shape[3])
    draw = Draw(generator, clean.device)
    size = max(1, PIECE // (clean.shape[2] * clean.shape[3]))
    with torch.no_grad(), torch.autocast(clean.device.type, enabled=False):
        return torch.cat([truncate_to_level(kind(piece, numbers, draw)) for piece in torch.split(clean, size)])
