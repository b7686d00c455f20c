"""The clean images of each data set: those of a test split, and those for calibration."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ttaq.data.cifar import read_cifar10, read_cifar100
from ttaq.data.digits import load_digits
from ttaq.data.images import Images, to_float
from ttaq.data.splits import SPLITS, calibration_indices, cifar_split
from ttaq.errors import DataError, InputError

__all__ = ["Folder", "calibration_images", "clean_test_images", "split_indices"]

Folder = str | os.PathLike[str] | None
"""Where the images lie; None for a set that needs no folder."""

_DIGITS_TEST = 600
_DIGITS_REPORT = 480
_READERS = {"cifar10": read_cifar10, "cifar100": read_cifar100}


def split_indices(dataset: str, split: str) -> Tensor:
    """Indices (int64) of the test images of a split.

    CIFAR: `ttaq.data.splits.cifar_split`. Digits: "report" 0 to 479, "validate" 480 to 599, "all".
    """
    if dataset != "digits":
        return cifar_split(split)
    if split not in SPLITS:
        raise InputError(f"split_indices: split is {split!r}, expected {', '.join(SPLITS)}")
    first = _DIGITS_REPORT if split == "validate" else 0
    return torch.arange(first, _DIGITS_REPORT if split == "report" else _DIGITS_TEST)


def clean_test_images(dataset: str, data: Folder) -> Images:
    """All clean test images in file order. Raises DataError without a usable folder, InputError for an unknown set."""
    return load_digits()[1] if dataset == "digits" else _read(dataset, data, "test")


def calibration_images(dataset: str, data: Folder, count: int, seed: int) -> Tensor:
    """`count` different training images drawn by `seed`, fp32 [count, 3, H, W] in [0, 1], without labels."""
    images = (load_digits()[0] if dataset == "digits" else _read(dataset, data, "train")).images
    return to_float(images[calibration_indices(len(images), count, seed)])


def _read(dataset: str, data: Folder, split: str) -> Images:
    if dataset not in _READERS:
        raise InputError(f"images: unknown data set {dataset!r}, expected digits, {', '.join(_READERS)}")
    if data is None:
        raise DataError(f"images: {dataset} needs a folder; name it with --data or the environment variable TTAQ_DATA")
    return _READERS[dataset](data, split)
