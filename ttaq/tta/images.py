"""What counts as a batch of images: checked before an adapter changes anything."""

from __future__ import annotations

import torch
from torch import Tensor

from ttaq.errors import InputError

__all__ = ["check_images", "check_source_images"]


def check_images(who: str, x: object, *, device: torch.device | None, finite: bool) -> Tensor:
    """Return `x` if it is a batch [B, C, H, W] of floats on `device`, not empty; else `InputError` naming `who`.

    `finite` refuses NaN and Inf as well, which on a GPU waits for the device once; nothing else here does.
    """
    if not isinstance(x, Tensor):
        raise InputError(f"{who}: got {type(x).__name__}, expected a tensor of images [B, C, H, W]")
    if x.ndim != 4:
        todo = "add the batch dimension: x[None]" if x.ndim == 3 else "pass one batch of images"
        raise InputError(f"{who}: images have shape {tuple(x.shape)}, expected [B, C, H, W]; {todo}")
    if not x.is_floating_point():
        raise InputError(
            f"{who}: images are {x.dtype}, expected floating point; turn bytes into [0, 1]: x.float() / 255"
        )
    if x.numel() == 0:
        raise InputError(f"{who}: images have shape {tuple(x.shape)}, expected at least one image; skip empty batches")
    if device is not None and x.device != device:
        raise InputError(
            f"{who}: images are on {x.device}, expected {device}, where the model is; use x.to('{device}')"
        )
    if finite and not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).sum())
        raise InputError(f"{who}: {bad} of {x.numel()} values are NaN or Inf, expected finite images; drop the batch")
    return x


def check_source_images(who: str, images: Tensor | None, without: str) -> Tensor:
    """Return `images` if they are at least 2, [N, C, H, W]; else `InputError` naming `who`, and the method that works
    `without` any."""
    if images is None or images.ndim != 4 or len(images) < 2:
        got = "None" if images is None else f"shape {tuple(images.shape)}"
        raise InputError(
            f"{who}: source_images is {got}, expected at least 2 images [N, C, H, W] of the data that the model was "
            f"trained on; without any use {without!r}"
        )
    if not images.is_floating_point() or not bool(images.isfinite().all()):
        got = f"{images.dtype}" if not images.is_floating_point() else "not finite"
        raise InputError(f"{who}: source_images are {got}, expected finite floating point in [0, 1]: x.float() / 255")
    return images
