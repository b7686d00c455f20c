"""The data sets by name: the images of a test split, stored corrupted ones, and those for calibration."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ttaq.data.cifar import read_cifar10, read_cifar100, read_cifar_c
from ttaq.data.cifar10_1 import read_cifar10_1
from ttaq.data.digits import load_digits
from ttaq.data.image_folder import ImageFolder, open_image_folder
from ttaq.data.imagenet import open_imagenet_c, open_imagenet_sketch
from ttaq.data.images import Images, to_float
from ttaq.data.splits import SPLITS, calibration_indices, cifar_split, imagenet_split
from ttaq.errors import DataError, InputError, require

__all__ = ["DATASETS", "Dataset", "Folder", "Pool", "calibration_images", "choose_preprocessing", "open_pool"]

Folder = str | os.PathLike[str] | None
"""Where the images lie; None for a set that needs no folder."""


@dataclass(frozen=True)
class Dataset:
    """What is known of a data set by its name.

    files: it consists of image files, which are decoded when they are needed. stored: name of its corrupted version,
    None where there is none. train: it has images to calibrate with.
    """

    files: bool = False
    stored: str | None = None
    train: bool = True


DATASETS = {
    "digits": Dataset(),
    "cifar10": Dataset(stored="CIFAR-10-C"),
    "cifar100": Dataset(stored="CIFAR-100-C"),
    "cifar10_1": Dataset(train=False),
    "imagenet": Dataset(files=True, stored="ImageNet-C"),
    "imagenet_sketch": Dataset(files=True, train=False),
    "folder": Dataset(files=True),
}

_CIFAR = {"cifar10": (read_cifar10, 10), "cifar100": (read_cifar100, 100)}
_DIGITS_TEST = 600
_DIGITS_REPORT = 480
_SIZE = 224


@dataclass(frozen=True, eq=False)
class Pool:
    """Labelled images of one size: `labels` int64 [N], `fetch(indices)` gives those as uint8 [n, 3, H, W]."""

    labels: Tensor
    num_classes: int
    fetch: Callable[[Tensor], Tensor]

    def take(self, indices: Tensor) -> Pool:
        """The images at these places (int64), in that order."""
        return Pool(self.labels[indices], self.num_classes, lambda wanted: self.fetch(indices[wanted]))

    @classmethod
    def of_images(cls, images: Images, num_classes: int) -> Pool:
        """Of images in memory."""
        return cls(images.labels, num_classes, lambda wanted: images.images[wanted])

    @classmethod
    def of_files(cls, folder: ImageFolder) -> Pool:
        """Of image files, decoded at every fetch."""
        return cls(folder.labels, len(folder.classes), lambda wanted: folder.take(wanted).read().images)


def open_pool(
    dataset: str, data: Folder, split: str, preprocessing: str, stored: tuple[str, int] | None = None
) -> Pool:
    """The images of a split in a fixed order.

    Which images belong to it: CIFAR, stored or not: `ttaq.data.splits.cifar_split`. Digits: "report" 0 to 479,
    "validate" 480 to 599. ImageNet, stored or not: `imagenet_split`, ordered by file name. ImageNet-Sketch and other
    folders: in an order drawn once and for all from the paths inside the folder, of every 13 the first three validate;
    CIFAR-10.1 likewise, in file order.

    Args:
        dataset: a key of `DATASETS`.
        data: the folder named by the user, or one that holds it.
        split: "validate", "report" or "all".
        preprocessing: for image files (`ttaq.data.decode.decode_image`); ImageNet-C is taken as it is stored.
        stored: corruption and severity to read from the stored corrupted set; None for the clean images.

    Raises:
        DataError: no usable folder, or images missing.
        InputError: an unknown data set or split.
    """
    if split not in SPLITS:
        raise InputError(f"open_pool: split is {split!r}, expected {', '.join(SPLITS)}")
    if dataset == "digits":
        return Pool.of_images(load_digits()[1], 10).take(_digits_split(split))
    root = _root(dataset, data)
    if dataset in _CIFAR:
        read, classes = _CIFAR[dataset]
        images = read(root, "test") if stored is None else read_cifar_c(root, *stored, num_classes=classes)
        indices = cifar_split(split)
        # A part of the test images is a valid folder: it has the first of those that report.
        return Pool.of_images(images, classes).take(indices[indices < len(images.labels)])
    if dataset == "cifar10_1":
        images = _read_cifar10_1(root)
        return Pool.of_images(images, 10).take(_every_13(torch.arange(len(images.labels)), split))
    if dataset == "imagenet":
        folder = _imagenet(root, "val", preprocessing) if stored is None else open_imagenet_c(root, *stored)
        return Pool.of_files(folder.choose(imagenet_split(folder.files, split)))
    sketch = dataset == "imagenet_sketch"
    folder = open_imagenet_sketch(root) if sketch else open_image_folder(_child(root, "val"), preprocessing)
    keys = [hashlib.sha256("/".join(path.parts[-2:]).encode()).digest() for path in folder.files]
    order = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__))
    return Pool.of_files(folder.take(_every_13(order, split)))


def calibration_images(
    dataset: str, data: Folder, count: int, seed: int, preprocessing: str | None = None, *, at_most: bool = False
) -> Tensor:
    """`count` different training images drawn by `seed`, fp32 [count, 3, H, W] in [0, 1], without labels.

    ImageNet and other folders: from the folder `train`, centre crop; preprocessing None from
    `choose_preprocessing`. at_most: all there are, where these are fewer than `count`.
    Raises DataError without a usable folder, InputError for an unknown data set or one without training images.
    """
    if dataset not in DATASETS or not DATASETS[dataset].train:
        known = ", ".join(name for name, each in DATASETS.items() if each.train)
        raise InputError(f"calibration_images: {dataset!r} has no training images, expected one of: {known}")
    if DATASETS[dataset].files:
        root = _root(dataset, data)
        preprocessing = preprocessing or choose_preprocessing(dataset, data, "train")
        if dataset == "imagenet":
            folder = _imagenet(root, "train", preprocessing)
        else:
            folder = open_image_folder(_child(root, "train"), preprocessing)
        count = min(count, len(folder)) if at_most else count
        return to_float(folder.sample(count, seed).read().images)
    images = load_digits()[0] if dataset == "digits" else _CIFAR[dataset][0](_root(dataset, data), "train")
    count = min(count, len(images.labels)) if at_most else count
    return to_float(images.images[calibration_indices(len(images.labels), count, seed)])


def choose_preprocessing(dataset: str, data: Folder, part: str = "val") -> str:
    """What suits image files as they are stored: "none" for 224x224, "crop" where all have one size with a shorter side
    up to 256 (they were prepared for cropping), else "resize256crop224". Looks at 16 of the files."""
    if not DATASETS[dataset].files:
        return "none"
    if dataset == "imagenet_sketch":
        return "resize256crop224"
    root = _root(dataset, data)
    folder = _imagenet(root, part, "crop") if dataset == "imagenet" else open_image_folder(_child(root, part), "crop")
    pillow = require("PIL.Image", "images", "choose_preprocessing")
    sizes = set()
    for path in folder.files[:: max(1, len(folder) // 16)]:
        try:
            with pillow.open(path) as file:
                sizes.add(file.size)
        except OSError as error:
            raise DataError(
                f"choose_preprocessing: cannot read {path}: {error}; replace the file or remove it"
            ) from None
    shorter = min(map(min, sizes))
    if sizes == {(_SIZE, _SIZE)}:
        return "none"
    return "crop" if len(sizes) == 1 and _SIZE <= shorter <= 256 else "resize256crop224"


def _digits_split(split: str) -> Tensor:
    first = _DIGITS_REPORT if split == "validate" else 0
    return torch.arange(first, _DIGITS_REPORT if split == "report" else _DIGITS_TEST)


def _every_13(order: Tensor, split: str) -> Tensor:
    validates = torch.arange(len(order)) % 13 < 3
    return order if split == "all" else order[validates if split == "validate" else ~validates]


def _root(dataset: str, data: Folder) -> Path:
    if dataset not in DATASETS:
        raise InputError(f"images: unknown data set {dataset!r}, expected one of: {', '.join(DATASETS)}")
    if data is None:
        raise DataError(f"images: {dataset} needs a folder; name it with --data or the environment variable TTAQ_DATA")
    return Path(data)


def _child(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_dir() else folder


def _imagenet(root: Path, part: str, preprocessing: str) -> ImageFolder:
    return open_image_folder(_child(_child(root, "imagenet"), part), preprocessing)


def _read_cifar10_1(root: Path) -> Images:
    place = _child(root, "CIFAR-10.1")
    found = sorted(place.glob("*_data.npy"))
    if not found:
        raise DataError(f"images: there is no *_data.npy in {place}, expected CIFAR-10.1 such as cifar10.1_v6_data.npy")
    return read_cifar10_1(found[-1], found[-1].with_name(found[-1].name.replace("_data.npy", "_labels.npy")))
