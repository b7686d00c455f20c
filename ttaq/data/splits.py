"""Which images serve for choosing and which for reporting, and which calibrate.

Choices are made on the validation images; the reporting images are opened once the choice is made. The training images
are no place for choices: the networks know them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ttaq.errors import InputError

__all__ = ["SPLITS", "calibration_indices", "cifar_split", "imagenet_split"]

SPLITS = ("validate", "report", "all")

_CIFAR_TEST = 10_000
_CIFAR_REPORT = 8_000


def cifar_split(split: str) -> Tensor:
    """Indices (int64) into the 10,000 test images of CIFAR: "report" 0 to 7,999, "validate" 8,000 to 9,999, "all".

    The same rule holds for CIFAR-C, whose rows are the test images in their order. Raises InputError for another name.
    """
    _check("cifar_split", split)
    first = _CIFAR_REPORT if split == "validate" else 0
    return torch.arange(first, _CIFAR_REPORT if split == "report" else _CIFAR_TEST)


def imagenet_split(files: Iterable[str | os.PathLike[str]], split: str) -> list[Path]:
    """The files of a split, ordered by file name: of every 13 the first three validate, the other ten report.

    files: image files in any order and folders; names (without folder) must differ, since the order hangs on them.
    Raises InputError for another split and for two files of the same name.
    """
    _check("imagenet_split", split)
    paths = sorted((Path(file) for file in files), key=lambda path: path.name)
    for one, other in pairwise(paths):
        if one.name == other.name:
            raise InputError(f"imagenet_split: {one} and {other} have the same name, expected each image once")
    return [path for index, path in enumerate(paths) if split == "all" or (index % 13 < 3) == (split == "validate")]


def calibration_indices(n: int, count: int, seed: int) -> Tensor:
    """`count` different indices (int64) out of range(n), drawn by a generator of its own: a given seed always draws
    the same.

    With a smaller count the first ones of the larger draw come back. Raises InputError unless 1 <= count <= n.
    """
    if not 1 <= count <= n:
        raise InputError(f"calibration_indices: count is {count}, expected 1 to {n}, the number of images there are")
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count]


def _check(who: str, split: str) -> None:
    if split not in SPLITS:
        raise InputError(f"{who}: split is {split!r}, expected {', '.join(SPLITS)}")
