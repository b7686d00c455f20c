"""CIFAR-10 and CIFAR-100 in the official binary version (Krizhevsky 2009), and their corrupted test sets (CIFAR-10-C,
CIFAR-100-C; Hendrycks and Dietterich, 1903.12261)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ttaq.data.images import Images
from ttaq.errors import DataError, InputError

__all__ = ["read_cifar10", "read_cifar100", "read_cifar_c"]

_PIXELS = 3 * 32 * 32
_SEVERITIES = 5


def read_cifar10(folder: str | os.PathLike[str], split: str = "test") -> Images:
    """CIFAR-10 from its binary version: per image one byte of label, then 3,072 bytes of red, green and blue 32x32
    planes.

    folder: the one that holds `test_batch.bin` and `data_batch_1.bin` to `data_batch_5.bin`, or its parent.
    split: "test", or "train" for as many of the five training files as are there, in order.
    Raises DataError for missing files, files cut short and labels above 9, InputError for another split.
    """
    files = {"test": ("test_batch.bin",), "train": tuple(f"data_batch_{part}.bin" for part in range(1, 6))}
    return _read_binary("read_cifar10", Path(folder), "cifar-10-batches-bin", files, split, label_limits=(10,))


def read_cifar100(folder: str | os.PathLike[str], split: str = "test") -> Images:
    """CIFAR-100 from its binary version: per image one byte of coarse label (20), one of fine label (100), then 3,072
    of pixels.

    The labels returned are the fine ones. folder: the one that holds `test.bin` and `train.bin`, or its parent; the
    rest as `read_cifar10`.
    """
    files = {"test": ("test.bin",), "train": ("train.bin",)}
    return _read_binary("read_cifar100", Path(folder), "cifar-100-binary", files, split, label_limits=(20, 100))


def read_cifar_c(
    folder: str | os.PathLike[str], corruption: str, severity: int = 5, n: int | None = None, *, num_classes: int = 10
) -> Images:
    """The first n images of one corruption at one severity from CIFAR-10-C or CIFAR-100-C, as stored by their authors.

    folder: the one that holds `{corruption}.npy` (uint8, (5 m, 32, 32, 3), severity s in the rows (s - 1) m to s m; m
    = 10,000 in the published sets) and `labels.npy` (5 m, or m where all severities share them), or its parent. Only
    the rows asked for are read. num_classes: 10 or 100; it bounds the labels and names the child folder. n: None for
    all m. Raises DataError for missing or malformed files, InputError for a severity that is not 1 to 5 or an n beyond
    m.
    """
    name = f"CIFAR-{num_classes}-C"
    place = _child("read_cifar_c", Path(folder), name)
    stored = sorted(path.stem for path in place.glob("*.npy") if path.stem != "labels")
    if corruption not in stored:
        there = ", ".join(stored) if stored else "no corruption at all"
        raise DataError(
            f"read_cifar_c: there is no {corruption}.npy in {place}, only {there}; expected the layout of {name}"
        )
    if not 1 <= severity <= _SEVERITIES:
        raise InputError(f"read_cifar_c: severity is {severity}, expected 1 to {_SEVERITIES}")
    pixels, labels = _open(place / f"{corruption}.npy"), _open(place / "labels.npy")
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (32, 32, 3) or not len(pixels) or len(pixels) % _SEVERITIES:
        raise DataError(
            f"read_cifar_c: {place / corruption}.npy is {pixels.dtype} {pixels.shape}, "
            f"expected uint8 (5 m, 32, 32, 3), that is m images for each of {_SEVERITIES} severities"
        )
    per_severity = len(pixels) // _SEVERITIES
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) not in (len(pixels), per_severity):
        raise DataError(
            f"read_cifar_c: {place / 'labels.npy'} is {labels.dtype} {labels.shape}, expected integers "
            f"({len(pixels)},) or ({per_severity},) for the {len(pixels)} images of {corruption}.npy"
        )
    n = per_severity if n is None else n
    if not 1 <= n <= per_severity:
        raise InputError(
            f"read_cifar_c: n is {n}, but {corruption}.npy in {place} has 1 to {per_severity} images per severity"
        )
    first = (severity - 1) * per_severity
    first_label = first if len(labels) == len(pixels) else 0
    chosen = np.array(labels[first_label : first_label + n], dtype=np.int64)
    _check_labels("read_cifar_c", place / "labels.npy", chosen, num_classes)
    images = np.ascontiguousarray(pixels[first : first + n].transpose(0, 3, 1, 2))
    return Images(torch.from_numpy(images), torch.from_numpy(chosen))


def _read_binary(
    who: str, folder: Path, child: str, files: Mapping[str, tuple[str, ...]], split: str, label_limits: tuple[int, ...]
) -> Images:
    if split not in files:
        raise InputError(f"{who}: split is {split!r}, expected {' or '.join(map(repr, files))}")
    folder = _child(who, folder, child)
    paths = [folder / name for name in files[split] if (folder / name).is_file()]
    if not paths:
        raise DataError(
            f"{who}: there is no {files[split][0]} in {folder}, expected the files of the binary version "
            f"(not the Python or Matlab version) there or in a folder {child}"
        )
    records = np.concatenate([_records(who, path, label_limits) for path in paths])
    head = len(label_limits)
    images = torch.from_numpy(np.ascontiguousarray(records[:, head:])).view(-1, 3, 32, 32)
    return Images(images, torch.from_numpy(records[:, head - 1].astype(np.int64)))


def _records(who: str, path: Path, label_limits: tuple[int, ...]) -> NDArray[np.uint8]:
    size = len(label_limits) + _PIXELS
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{who}: cannot read {path}: {error}") from error
    if not len(content) or len(content) % size:
        raise DataError(
            f"{who}: {path} has {len(content):,} bytes, expected a whole number of images of {size:,} bytes "
            f"({size * 10_000:,} for 10,000 images); the file is cut short or not the binary version: download it again"
        )
    records = content.reshape(-1, size)
    for column, limit in enumerate(label_limits):
        _check_labels(who, path, records[:, column], limit)
    return records


def _check_labels(who: str, path: Path, labels: NDArray[np.integer], limit: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= limit))
    if len(wrong):
        raise DataError(
            f"{who}: image {wrong[0]} of {path} has label {labels[wrong[0]]}, expected 0 to {limit - 1}; "
            f"the files are damaged or of another data set"
        )


def _child(who: str, folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise DataError(
            f"{who}: there is no folder {folder}, expected the one with the files of the data set or its parent"
        )
    return folder / name if (folder / name).is_dir() else folder


def _open(path: Path) -> NDArray[np.generic]:
    try:
        array: NDArray[np.generic] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"read_cifar_c: there is no {path}") from error
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"read_cifar_c: {path} is cut short or not a .npy file ({error}); download it again") from error
    return array
