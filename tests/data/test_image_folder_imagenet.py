"""The layouts of ImageNet-C, ImageNet-Sketch and CIFAR-10.1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ttaq.data import open_imagenet_c, open_imagenet_sketch, read_cifar10_1
from ttaq.errors import DataError, InputError

WNIDS = ["n02", "n01", "n03"]


def put(path: Path, size: tuple[int, int] = (224, 224), level: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, level).save(path)


@pytest.fixture
def imagenet_c(tmp_path: Path) -> Path:
    root = tmp_path / "ImageNet-C"
    for severity in (1, 5):
        for wnid, level in (("n01", 10), ("n02", 20)):
            put(root / "fog" / str(severity) / wnid / "ILSVRC2012_val_1.JPEG", level=level + severity)
    return root


@pytest.mark.parametrize("where", ["set", "parent", "argument"])
def test_imagenet_c(imagenet_c: Path, where: str) -> None:
    home = imagenet_c if where == "set" else imagenet_c.parent
    file = home / ("order.txt" if where == "argument" else "wnids.txt")
    file.write_text("\n".join(WNIDS))
    for root in (imagenet_c, imagenet_c.parent):
        folder = open_imagenet_c(root, "fog", 5, classes=file if where == "argument" else None)
        images = folder.read()
        assert images.images.shape == (2, 3, 224, 224)
        assert images.images[:, 0, 0, 0].tolist() == [25, 15]
        assert images.labels.tolist() == [0, 1]


def test_imagenet_c_takes_images_as_they_are(imagenet_c: Path) -> None:
    put(imagenet_c / "fog" / "1" / "n02" / "large.JPEG", (256, 256))
    folder = open_imagenet_c(imagenet_c, "fog", 1, classes=WNIDS)
    with pytest.raises(DataError, match=r"large.JPEG is 256x256, expected 224x224"):
        folder.read()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda root: open_imagenet_c(root, "fog", 5), DataError, "has 2 of 1,000 classes, and no wnids.txt tells"),
        (lambda root: open_imagenet_c(root, "fog", 0), InputError, "severity is 0, expected 1 to 5"),
        (lambda root: open_imagenet_c(root, "fog", 2), DataError, "there is no folder .*fog/2, expected .* has fog"),
        (lambda root: open_imagenet_c(root, "snow", 5), DataError, "there is no folder .*snow/5, expected .* has fog"),
        (lambda root: open_imagenet_c(root / "absent", "fog"), DataError, "there is no folder .*absent"),
        (
            lambda root: open_imagenet_c(root, "fog", classes=["n01"]),
            DataError,
            "folder n02 of .* not among the 1 classes",
        ),
        (lambda root: open_imagenet_sketch(root / "fog" / "5"), DataError, "open_imagenet_sketch: .* has 2 of 1,000"),
    ],
)
def test_errors(imagenet_c: Path, make: Callable[[Path], object], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make(imagenet_c)


def test_a_thousand_folders_need_no_index(tmp_path: Path) -> None:
    for place in range(1000):
        (tmp_path / "fog" / "5" / f"n{place:04}").mkdir(parents=True)
    put(tmp_path / "fog" / "5" / "n0007" / "x.JPEG")
    assert open_imagenet_c(tmp_path, "fog").labels.tolist() == [7]


def test_imagenet_sketch(tmp_path: Path) -> None:
    sketch = tmp_path / "ImageNet-Sketch" / "sketch"
    put(sketch / "n01" / "sketch_0.JPEG", (700, 500), 200)
    put(sketch / "n02" / "sketch_0.JPEG", (100, 130), 100)
    (sketch.parent / "wnids.txt").write_text("\n".join(WNIDS))
    for root in (tmp_path, sketch.parent, sketch):
        images = open_imagenet_sketch(root).read()
        assert images.images.shape == (2, 3, 224, 224)
        assert images.images[:, 0, 0, 0].tolist() == [100, 200]
        assert images.labels.tolist() == [0, 1]


def write_pair(folder: Path, images: np.ndarray, labels: np.ndarray) -> tuple[Path, Path]:
    np.save(folder / "data.npy", images)
    np.save(folder / "labels.npy", labels)
    return folder / "data.npy", folder / "labels.npy"


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_cifar10_1(tmp_path: Path, dtype: type) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    images = read_cifar10_1(*write_pair(tmp_path, pixels, np.array([9, 0, 3, 3, 1], dtype)))
    assert images.labels.tolist() == [9, 0, 3, 3, 1]
    assert images.labels.dtype == torch.int64
    assert images.images.is_contiguous()
    assert torch.equal(images.images.permute(0, 2, 3, 1), torch.from_numpy(pixels))


PIXELS = np.zeros((3, 32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (PIXELS, np.zeros(4, np.int64), r"labels.npy is int64 \(4,\), expected 3 integers, one for each image"),
        (PIXELS, np.zeros((3, 1), np.int64), r"labels.npy is int64 \(3, 1\), expected 3 integers"),
        (PIXELS, np.zeros(3), "labels.npy is float64"),
        (PIXELS, np.array([0, 10, 1]), "labels from 0 to 10, expected 0 to 9"),
        (PIXELS, np.array([0, -1, 1]), "labels from -1 to 1, expected 0 to 9"),
        (PIXELS.astype(np.float32), np.zeros(3, np.int64), "data.npy is float32"),
        (PIXELS.transpose(0, 3, 1, 2), np.zeros(3, np.int64), r"\(3, 3, 32, 32\), expected uint8 \(N, 32, 32, 3\)"),
        (PIXELS[:0], np.zeros(0, np.int64), r"\(0, 32, 32, 3\), expected uint8"),
    ],
)
def test_arrays_that_do_not_belong_together(tmp_path: Path, images, labels, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_cifar10_1(*write_pair(tmp_path, images, labels))


def test_damaged_array_files(tmp_path: Path) -> None:
    data, labels = write_pair(tmp_path, PIXELS, np.zeros(3, np.int64))
    with pytest.raises(DataError, match=r"there is no file .*absent"):
        read_cifar10_1(tmp_path / "absent.npy", labels)
    np.savez(tmp_path / "archive.npy.npz", PIXELS)
    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([{}, 1], dtype=object), allow_pickle=True)
    cut = tmp_path / "cut.npy"
    cut.write_bytes(data.read_bytes()[:-1])
    for path in (tmp_path / "archive.npy.npz", objects, cut, tmp_path):
        with pytest.raises(DataError, match=r"is cut short or not a \.npy file"):
            read_cifar10_1(path, labels)
