"""Every loader, and every data set of a stream, against every kind of folder and file that is no use: one DataError
that names it; and against unusual images that are of use. What is said in detail is tested beside each loader."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ttaq.data import (
    ImageFolder,
    open_image_folder,
    open_imagenet_c,
    open_imagenet_sketch,
    read_cifar10,
    read_cifar10_1,
    read_cifar100,
    read_cifar_c,
)
from ttaq.errors import DataError
from ttaq.eval import Domains, Stream
from ttaq.eval.datasets import DATASETS

Opened = ImageFolder | Domains
COLOUR = (200, 20, 90)


def stream(dataset: str, source: str = "generated", **flags: Any) -> Callable[[Path], Domains]:
    """Opens a stream of the images as they lie in the folder, clean or stored."""
    corruption = "clean" if source == "generated" else "fog"
    about = Stream(dataset, corruptions=(corruption,), split="all", source=source, **flags)
    return lambda root: Domains(about, root)


FILES: dict[str, tuple[tuple[str, ...], Callable[[Path], Any]]] = {
    "read_cifar10": (("test_batch.bin",), read_cifar10),
    "read_cifar10 train": (("data_batch_1.bin",), lambda root: read_cifar10(root, "train")),
    "read_cifar100": (("test.bin",), read_cifar100),
    "read_cifar_c": (("fog.npy", "labels.npy"), lambda root: read_cifar_c(root, "fog")),
    "read_cifar10_1": (
        ("data.npy", "labels.npy"),
        lambda root: read_cifar10_1(root / "data.npy", root / "labels.npy"),
    ),
    "stream cifar10": (("test_batch.bin",), stream("cifar10")),
    "stream cifar100": (("test.bin",), stream("cifar100")),
    "stream cifar10 stored": (("fog.npy", "labels.npy"), stream("cifar10", "stored")),
    "stream cifar100 stored": (("fog.npy", "labels.npy"), stream("cifar100", "stored")),
    "stream cifar10_1": (("v6_data.npy", "v6_labels.npy"), stream("cifar10_1")),
}
FOLDERS: dict[str, tuple[str, Callable[[Path], Opened]]] = {
    "open_image_folder none": ("ant", lambda root: open_image_folder(root, "none")),
    "open_image_folder crop": ("ant", lambda root: open_image_folder(root, "crop")),
    "open_image_folder resize": ("ant", lambda root: open_image_folder(root, "resize256crop224")),
    "open_imagenet_c": ("fog/5/ant", lambda root: open_imagenet_c(root, "fog")),
    "open_imagenet_sketch": ("sketch/ant", lambda root: open_imagenet_sketch(root)),
    "stream folder none": ("val/ant", stream("folder", preprocessing="none")),
    "stream folder crop": ("val/ant", stream("folder", preprocessing="crop")),
    "stream folder resize": ("val/ant", stream("folder", preprocessing="resize256crop224")),
    "stream imagenet": ("imagenet/val/ant", stream("imagenet")),
    "stream imagenet stored": ("ImageNet-C/fog/5/ant", stream("imagenet", "stored")),
    "stream imagenet_sketch": ("sketch/ant", stream("imagenet_sketch")),
}
LOADERS = FILES | FOLDERS
every_loader = pytest.mark.parametrize("open_it", [row[1] for row in LOADERS.values()], ids=LOADERS)
every_folder = pytest.mark.parametrize(("home", "open_it"), FOLDERS.values(), ids=FOLDERS)


def read(opened: Opened) -> tuple[torch.Tensor, torch.Tensor]:
    """All images, uint8, and their labels."""
    if isinstance(opened, ImageFolder):
        images = opened.read()
        return images.images, images.labels
    (batch,) = opened.batches(0)
    return (batch[0] * 255).round().to(torch.uint8), batch[1]


@every_loader
@pytest.mark.parametrize("kind", ["missing", "empty", "a file"])
def test_folders(open_it: Callable[[Path], Any], kind: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    if kind == "empty":
        root.mkdir()
    if kind == "a file":
        root.write_text("no folder")
    with pytest.raises(DataError, match="root"):
        open_it(root)


@pytest.mark.parametrize(("files", "open_it"), FILES.values(), ids=FILES)
@pytest.mark.parametrize("kind", ["folder", "empty", "text", "cut"])
def test_files_of_arrays(files: tuple[str, ...], open_it: Callable[[Path], Any], kind: str, tmp_path: Path) -> None:
    """Each file that the loader reads in turn, the others whole."""
    for bad in files:
        root = tmp_path / f"bad-{bad}"
        root.mkdir()
        for name in files:
            if name.endswith(".bin"):
                (root / name).write_bytes(bytes(2 * ((2 if name == "test.bin" else 1) + 3072)))
            else:
                np.save(root / name, np.zeros(5 if name.endswith("labels.npy") else (5, 32, 32, 3), np.uint8))
        open_it(root)
        content = (root / bad).read_bytes()
        (root / bad).unlink()
        if kind == "folder":
            (root / bad).mkdir()
        else:
            (root / bad).write_bytes({"empty": b"", "text": b"no array", "cut": content[:-2]}[kind])
        with pytest.raises(DataError, match=f"bad-{bad}"):
            open_it(root)


def put(root: Path, home: str, image: Image.Image | bytes, name: str = "image.png", classes: str = "ant") -> Path:
    """One file in the folder `home` of its class, and the file that tells the order of the classes."""
    index = root / ("imagenet" if home.startswith("imagenet") else "") / "wnids.txt"
    path = root / home / name
    path.parent.mkdir(parents=True)
    index.write_text(f"{classes}\n")
    if isinstance(image, bytes):
        path.write_bytes(image)
    else:
        image.save(path)
    return path


def photograph() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8))


@every_folder
@pytest.mark.parametrize("kind", ["text", "nothing", "cut", "dangling link", "no permission", "1x1", "1x300"])
def test_images_of_no_use(home: str, open_it: Callable[[Path], Opened], kind: str, tmp_path: Path) -> None:
    if kind == "no permission" and os.geteuid() == 0:
        pytest.skip("root may read every file")
    path = put(tmp_path, home, photograph())
    if kind in ("text", "nothing", "cut"):
        path.write_bytes({"text": b"no image", "nothing": b"", "cut": path.read_bytes()[:5000]}[kind])
    elif kind == "dangling link":
        path.unlink()
        path.symlink_to(tmp_path / "nowhere.png")
    elif kind == "no permission":
        path.chmod(0)
    else:
        Image.new("RGB", (1, int(kind.removeprefix("1x")))).save(path)
    opened = open_it(tmp_path)
    with pytest.raises(DataError, match=r"decode_image: .*ant/image\.png"):
        read(opened)


@every_folder
def test_class_folders_without_images(home: str, open_it: Callable[[Path], Opened], tmp_path: Path) -> None:
    put(tmp_path, home, b"no image", "notes.txt")
    with pytest.raises(DataError, match="hold no image"):
        open_it(tmp_path)


@every_folder
@pytest.mark.parametrize(
    ("classes", "says"),
    [("bee", r"ant .*is not among the 1 classes of .*wnids\.txt"), ("ant\nant", r"wnids\.txt"), ("", r"wnids\.txt")],
)
def test_names_of_other_classes(
    home: str, open_it: Callable[[Path], Opened], classes: str, says: str, tmp_path: Path
) -> None:
    put(tmp_path, home, photograph(), classes=classes)
    with pytest.raises(DataError, match=says):
        open_it(tmp_path)


def plain(mode: str, colour: Any) -> Image.Image:
    return Image.new(mode, (224, 224), colour)


@every_folder
@pytest.mark.parametrize(
    ("image", "name", "expected"),
    [
        (plain("L", 77), "grey.png", (77, 77, 77)),
        (plain("1", 1), "bilevel.png", (255, 255, 255)),
        (plain("CMYK", (0, 255, 255, 0)), "cmyk.jpg", (255, 0, 0)),
        (plain("RGBA", (*COLOUR, 9)), "alpha.png", COLOUR),
        (plain("LA", (77, 9)), "grey-alpha.png", (77, 77, 77)),
        (Image.fromarray(np.full((224, 224), 77 * 257, np.uint16)), "sixteen.png", (77, 77, 77)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusual_images_become_rgb(
    home: str,
    open_it: Callable[[Path], Opened],
    image: Image.Image,
    name: str,
    expected: Any,
    tmp_path: Path,
) -> None:
    put(tmp_path, home, image, name)
    images, labels = read(open_it(tmp_path))
    assert images.shape == (1, 3, 224, 224)
    assert images.dtype is torch.uint8
    assert labels.tolist() == [0]
    difference = (images[0].int() - torch.tensor(expected).view(3, 1, 1)).abs().max()
    assert difference <= (1 if name.endswith(".jpg") else 0)


WRONG_LABELS = ([0, 1, 2, 3], [100, 100, 100, 100, 100], [[0, 1, 2, 3, 4]], [0.0, 1.0, 2.0, 3.0, 4.0], [])


@pytest.mark.parametrize("labels", WRONG_LABELS, ids=str)
@pytest.mark.parametrize(
    ("files", "open_it"),
    [row for row in FILES.values() if len(row[0]) == 2],
    ids=[name for name, row in FILES.items() if len(row[0]) == 2],
)
def test_labels_that_do_not_belong(
    files: tuple[str, str], open_it: Callable[[Path], Any], labels: list[Any], tmp_path: Path
) -> None:
    """One too few, of another data set, in two dimensions, no whole numbers, none."""
    np.save(tmp_path / files[0], np.zeros((5, 32, 32, 3), np.uint8))
    np.save(tmp_path / files[1], np.array(labels))
    with pytest.raises(DataError, match=r"labels\.npy"):
        open_it(tmp_path)


@pytest.mark.parametrize("loader", ["read_cifar10", "read_cifar10 train", "read_cifar100", "stream cifar10"])
def test_labels_beyond_the_classes(loader: str, tmp_path: Path) -> None:
    """Images that are not of the set: their first bytes are no labels of it."""
    (name,), open_it = FILES[loader]
    (tmp_path / name).write_bytes(b"\xff" * ((2 if name == "test.bin" else 1) + 3072))
    with pytest.raises(DataError, match=rf"{name} has label 255"):
        open_it(tmp_path)


def test_every_data_set_of_files_is_a_row() -> None:
    streams = {name.split()[1] for name in LOADERS if name.startswith("stream")}
    assert streams == {*DATASETS} - {"digits"}
    assert {f"stream {name} stored" for name, row in DATASETS.items() if row.stored} <= {*LOADERS}
