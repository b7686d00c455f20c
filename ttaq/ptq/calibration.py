"""Calibration images: from what a user has at hand to one checked tensor."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ttaq.errors import InputError

__all__ = ["MOST_IMAGES", "gather_images"]

MOST_IMAGES = 1024  # read from a loader, which may be as long as a data set


def gather_images(calibration: Tensor | Iterable[object], who: str) -> Tensor:
    """The images [N, C, H, W] of a tensor, or the first 1,024 of an iterable of batches, on the CPU. A batch is a
    tensor or a tuple that starts with one (labels are ignored).

    Raises `InputError` (in the name of `who`) for fewer than 2 images, NaN, Inf, and other types and shapes.
    """
    if isinstance(calibration, Tensor):
        images = _check(calibration, who, "calibration")
    elif isinstance(calibration, Iterable) and not isinstance(calibration, str | bytes | dict):
        batches: list[Tensor] = []
        count = 0
        for index, batch in enumerate(calibration):
            first = batch[0] if isinstance(batch, tuple | list) and batch else batch
            batches.append(_check(first, who, f"calibration batch {index}").cpu())
            if batches[-1].shape[1:] != batches[0].shape[1:]:
                raise InputError(
                    f"{who}: calibration batch {index} has shape {tuple(batches[-1].shape)}, expected "
                    f"[N, {', '.join(map(str, batches[0].shape[1:]))}] like the first; bring the images to one size"
                )
            count += len(batches[-1])
            if count >= MOST_IMAGES:
                break
        images = torch.cat(batches)[:MOST_IMAGES] if batches else torch.empty(0)
    else:
        raise InputError(
            f"{who}: calibration is a {type(calibration).__name__}, expected a tensor of images or an iterable of "
            f"batches; put a data set into a torch.utils.data.DataLoader"
        )
    if len(images) < 2:
        raise InputError(
            f"{who}: calibration has {len(images)} image{'' if len(images) == 1 else 's'}, expected at least 2; "
            f"256 to 1,024 give good scales"
        )
    return images


def _check(images: object, who: str, what: str) -> Tensor:
    expected = "expected float images [N, C, H, W]"
    if not isinstance(images, Tensor):
        raise InputError(f"{who}: {what} is a {type(images).__name__}, {expected}, or a tuple that starts with them")
    if images.ndim != 4:
        raise InputError(
            f"{who}: {what} has shape {tuple(images.shape)}, {expected}; "
            f"add the missing dimension, or put a data set of single images into a DataLoader"
        )
    if not images.is_floating_point():
        raise InputError(
            f"{who}: {what} has dtype {images.dtype}, {expected}; convert it, such as images.float() / 255"
        )
    if not bool(images.isfinite().all()):
        raise InputError(f"{who}: {what} has NaN or Inf values, expected finite ones; remove those images")
    return images.detach()
