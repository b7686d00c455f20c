"""Data sets by name: which images belong to a split, how files are prepared, and what is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ttaq.errors import DataError, InputError
from ttaq.eval import Domains, Stream
from ttaq.eval.datasets import calibration_images, choose_preprocessing, open_pool

Image = pytest.importorskip("PIL.Image", reason="reading image files needs Pillow")


def write(path: Path, size: tuple[int, int] = (227, 227), level: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), level, dtype=np.uint8)).save(path)


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """26 validation images of two classes, whose names interleave the classes, and 4 to calibrate with."""
    for number in range(26):
        write(tmp_path / "imagenet" / "val" / f"n{number % 2}" / f"val_{number:03}.png", level=number)
    for number in range(4):
        write(tmp_path / "imagenet" / "train" / f"n{number % 2}" / f"train_{number}.png", (256, 256), 100 + number)
    (tmp_path / "imagenet" / "wnids.txt").write_text("n1\nn0\nn2\n")
    return tmp_path


def levels(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 0].tolist()


def test_imagenet_is_split_by_file_name(imagenet: Path) -> None:
    everything = open_pool("imagenet", imagenet, "all", "crop")
    assert levels(everything.fetch(torch.arange(26))) == list(range(26))
    assert everything.labels.tolist() == [1, 0] * 13
    assert everything.num_classes == 3
    validate, report = (open_pool("imagenet", imagenet, split, "crop") for split in ("validate", "report"))
    assert levels(validate.fetch(torch.arange(6))) == [0, 1, 2, 13, 14, 15]
    assert levels(report.take(torch.tensor([0, 10])).fetch(torch.tensor([1]))) == [16]
    assert validate.fetch(torch.tensor([5, 0])).shape == (2, 3, 224, 224)


def test_a_stream_of_image_files(imagenet: Path) -> None:
    stream = Stream("imagenet", corruptions=("clean", "contrast"), images=9, batch_size=4)
    domains = Domains(stream, imagenet)
    assert (domains.num_classes, domains.batches_per_domain) == (3, 3)
    images, labels, _ = (torch.cat(parts) for parts in zip(*domains.batches(0), strict=True))
    assert (images.shape, images.min() >= 0, images.max() <= 1) == ((9, 3, 224, 224), True, True)
    assert sorted((255 * images[:, 0, 0, 0]).round().int().tolist()) == [3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert torch.equal(labels, domains.labels[domains.plan(0).images])


def test_calibration_images_come_from_train(imagenet: Path) -> None:
    images = calibration_images("imagenet", imagenet, 4, seed=0)
    assert images.shape == (4, 3, 224, 224)
    assert sorted((255 * images[:, 0, 0, 0]).round().int().tolist()) == [100, 101, 102, 103]
    with pytest.raises(InputError, match="count is 5, expected 1 to 4"):
        calibration_images("imagenet", imagenet, 5, seed=0)


def test_stored_imagenet_c_is_not_cropped(imagenet: Path) -> None:
    for number in range(26):
        folder = imagenet / "ImageNet-C" / "fog" / "3" / f"n{number % 2}"
        write(folder / f"val_{number:03}.JPEG", (224, 224), 8 * number)
    (imagenet / "ImageNet-C" / "wnids.txt").write_text("n1\nn0\nn2\n")
    stream = Stream("imagenet", corruptions=("fog",), severity=3, split="validate", source="stored", batch_size=6)
    images, labels, _ = next(Domains(stream, imagenet).batches(0))
    order = images[:, 0, 0, 0].argsort()
    assert (255 * images[order, 0, 0, 0]).round().int().tolist() == [8 * n for n in (0, 1, 2, 13, 14, 15)]
    assert labels[order].tolist() == [1, 0, 1, 0, 1, 0]
    # One file of one corruption is missing: its labels no longer fit those of the others.
    for number in range(26):
        if number != 1:
            folder = imagenet / "ImageNet-C" / "snow" / "3" / f"n{number % 2}"
            write(folder / f"val_{number:03}.JPEG", (224, 224), number)
    with pytest.raises(DataError, match="stored images of snow@3 are not those of the other corruptions"):
        Domains(Stream("imagenet", corruptions=("fog", "snow"), severity=3, source="stored"), imagenet)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(224, 224)] * 3, "none"),
        ([(227, 227)] * 3, "crop"),
        ([(256, 300)] * 3, "crop"),
        ([(500, 375)] * 3, "resize256crop224"),
        ([(227, 227), (256, 256)], "resize256crop224"),
        ([(100, 100)], "resize256crop224"),
    ],
)
def test_preprocessing_is_read_off_the_sizes(tmp_path: Path, sizes: list[tuple[int, int]], expected: str) -> None:
    for number, size in enumerate(sizes):
        write(tmp_path / "a" / f"{number}.png", size)
    assert choose_preprocessing("folder", tmp_path) == expected
    assert open_pool("folder", tmp_path, "all", expected).fetch(torch.tensor([0])).shape == (1, 3, 224, 224)


def test_any_folder_is_split_without_regard_to_its_order(tmp_path: Path) -> None:
    for number in range(130):
        write(tmp_path / "val" / "ab"[number // 65] / f"{number % 65}.png", (24, 24), number)
    pools = {split: open_pool("folder", tmp_path, split, "resize256crop224") for split in ("all", "validate", "report")}
    assert [len(pool.labels) for pool in pools.values()] == [130, 30, 100]
    for pool in pools.values():
        assert 0.3 < float(pool.labels[: len(pool.labels) // 2].float().mean()) < 0.7
    (tmp_path / "val").rename(tmp_path / "elsewhere")
    again = open_pool("folder", tmp_path / "elsewhere", "validate", "resize256crop224")
    assert torch.equal(again.labels, pools["validate"].labels)


def test_cifar10_1(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (26, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "cifar10.1_v6_data.npy", pixels)
    np.save(tmp_path / "cifar10.1_v6_labels.npy", np.arange(26) % 10)
    domains = Domains(Stream("cifar10_1", corruptions=("clean",), split="report"), tmp_path)
    images, labels, _ = next(domains.batches(0))
    assert len(labels) == 20
    place = domains.plan(0).images[0]
    kept = [n for n in range(26) if n % 13 >= 3]
    assert torch.equal(images[0], torch.from_numpy(pixels[kept[place]]).permute(2, 0, 1) / 255)
    with pytest.raises(InputError, match="'cifar10_1' has no training images"):
        calibration_images("cifar10_1", tmp_path, 2, 0)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="imagenet needs a folder"):
        open_pool("imagenet", None, "all", "crop")
    with pytest.raises(DataError, match=r"no \*_data.npy"):
        open_pool("cifar10_1", tmp_path, "all", "none")
    with pytest.raises(DataError, match="is empty; expected one folder per class"):
        open_pool("folder", tmp_path, "all", "crop")
    with pytest.raises(InputError, match="unknown data set 'mnist'"):
        open_pool("mnist", tmp_path, "all", "crop")
    with pytest.raises(InputError, match="split is 'test'"):
        open_pool("digits", None, "test", "none")
    write(tmp_path / "a" / "0.png", (100, 227))
    (tmp_path / "a" / "1.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"cannot read .*1\.png"):
        choose_preprocessing("folder", tmp_path)
    pool = open_pool("folder", tmp_path, "all", "crop")
    with pytest.raises(DataError, match=r"1\.png|smaller than the crop"):
        pool.fetch(torch.arange(2))
