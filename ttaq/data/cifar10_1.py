"""Images and labels in two NumPy files, such as CIFAR-10.1 (Recht et al., 1806.00451)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ttaq.data.images import Images
from ttaq.errors import DataError

__all__ = ["read_cifar10_1"]


def read_cifar10_1(images: str | os.PathLike[str], labels: str | os.PathLike[str], *, num_classes: int = 10) -> Images:
    """images: a `.npy` file, uint8 (N, 32, 32, 3), such as `cifar10.1_v6_data.npy`. labels: one with N integers from 0
    to num_classes - 1, such as `cifar10.1_v6_labels.npy`.

    Raises DataError for files that are missing, damaged, of another type or shape, or do not belong together.
    """
    who = "read_cifar10_1"
    pixels, classes = _load(who, Path(images)), _load(who, Path(labels))
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (32, 32, 3) or not len(pixels):
        raise DataError(f"{who}: {images} is {pixels.dtype} {pixels.shape}, expected uint8 (N, 32, 32, 3)")
    if classes.dtype.kind not in "iu" or classes.shape != pixels.shape[:1]:
        raise DataError(
            f"{who}: {labels} is {classes.dtype} {classes.shape}, expected {len(pixels)} integers, one for each image "
            f"of {images}; are these the two files of one version of the set?"
        )
    classes = classes.astype(np.int64)
    if classes.min() < 0 or classes.max() >= num_classes:
        raise DataError(
            f"{who}: {labels} has labels from {classes.min()} to {classes.max()}, expected 0 to {num_classes - 1}"
        )
    return Images(torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))), torch.from_numpy(classes))


def _load(who: str, path: Path) -> NDArray[np.generic]:
    try:
        with open(path, "rb") as file:
            # np.load would also take an archive of arrays.
            array: NDArray[np.generic] = np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"{who}: there is no file {path}") from error
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{who}: {path} is cut short or not a .npy file ({error}); download it again") from error
    return array
