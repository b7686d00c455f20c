"""Reading CIFAR's binary version and the corrupted sets, whole and broken."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from ttaq.data import Images, read_cifar10, read_cifar100, read_cifar_c, to_float
from ttaq.errors import DataError, InputError


def write_binary(path: Path, labels: list[list[int]], seed: int = 0) -> np.ndarray:
    """A file of len(labels) images with these label bytes; returns its pixels (N, 3, 32, 32)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 3 * 32 * 32), dtype=np.uint8)
    np.concatenate([np.array(labels, dtype=np.uint8), pixels], axis=1).tofile(path)
    return pixels.reshape(-1, 3, 32, 32)


def write_corrupted(folder: Path, name: str = "fog", per_severity: int = 4, labels: object = None) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(1).integers(0, 256, (5 * per_severity, 32, 32, 3), dtype=np.uint8)
    np.save(folder / f"{name}.npy", images)
    np.save(folder / "labels.npy", np.arange(5 * per_severity) % per_severity if labels is None else labels)
    return images


def check(read: Images, pixels: np.ndarray, labels: list[int]) -> None:
    assert read.images.dtype is torch.uint8
    assert read.images.is_contiguous()
    assert read.labels.dtype is torch.int64
    assert torch.equal(read.images, torch.from_numpy(pixels))
    assert read.labels.tolist() == labels


@pytest.mark.parametrize("child", ["", "cifar-10-batches-bin"])
def test_cifar10(tmp_path: Path, child: str) -> None:
    folder = tmp_path / child
    folder.mkdir(exist_ok=True)
    test = write_binary(folder / "test_batch.bin", [[3], [9], [0]])
    check(read_cifar10(tmp_path), test, [3, 9, 0])
    second, first = (write_binary(folder / f"data_batch_{part}.bin", [[part]] * 2, seed=part) for part in (4, 2))
    check(read_cifar10(tmp_path, "train"), np.concatenate([first, second]), [2, 2, 4, 4])


def test_cifar100_returns_fine_labels(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-binary").mkdir()
    test = write_binary(tmp_path / "cifar-100-binary" / "test.bin", [[19, 99], [0, 42]])
    train = write_binary(tmp_path / "cifar-100-binary" / "train.bin", [[7, 8]])
    check(read_cifar100(tmp_path), test, [99, 42])
    check(read_cifar100(tmp_path / "cifar-100-binary", "train"), train, [8])


def test_take() -> None:
    images = Images(torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1), torch.arange(4))
    taken = images.take(torch.tensor([3, 1]))
    assert taken.images.flatten().tolist() == taken.labels.tolist() == [3, 1]


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:count])


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            lambda f: cut(f / "test_batch.bin", 3073 + 100),
            DataError,
            r"test_batch.bin has 3,173 bytes.*images of 3,073",
        ),
        (lambda f: cut(f / "test_batch.bin", 0), DataError, "has 0 bytes"),
        (lambda f: (f / "test_batch.bin").unlink(), DataError, r"no test_batch.bin in .*binary version"),
        (
            lambda f: write_binary(f / "test_batch.bin", [[1], [10]]),
            DataError,
            r"image 1 of .* has label 10, expected 0 to 9",
        ),
    ],
)
def test_broken_cifar10(tmp_path: Path, spoil, error: type[Exception], message: str) -> None:
    write_binary(tmp_path / "test_batch.bin", [[0], [1]])
    spoil(tmp_path)
    with pytest.raises(error, match=message):
        read_cifar10(tmp_path)


@pytest.mark.parametrize(
    ("labels", "message"), [([20, 5], "label 20, expected 0 to 19"), ([3, 100], "label 100, expected 0 to 99")]
)
def test_broken_cifar100(tmp_path: Path, labels: list[int], message: str) -> None:
    write_binary(tmp_path / "test.bin", [labels])
    with pytest.raises(DataError, match=message):
        read_cifar100(tmp_path)


def test_missing_folder_and_unknown_split(tmp_path: Path) -> None:
    for read in (read_cifar10, read_cifar100, lambda folder: read_cifar_c(folder, "fog")):
        with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
            read(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no data_batch_1.bin in"):
        read_cifar10(tmp_path, "train")
    with pytest.raises(InputError, match="split is 'val', expected 'test' or 'train'"):
        read_cifar10(tmp_path, "val")


@pytest.mark.parametrize(("classes", "child"), [(10, ""), (10, "CIFAR-10-C"), (100, "CIFAR-100-C")])
def test_cifar_c(tmp_path: Path, classes: int, child: str) -> None:
    images = write_corrupted(tmp_path / child).transpose(0, 3, 1, 2)
    for severity in range(1, 6):
        rows = slice(4 * (severity - 1), 4 * severity)
        check(read_cifar_c(tmp_path, "fog", severity, num_classes=classes), images[rows], [0, 1, 2, 3])
    check(read_cifar_c(tmp_path, "fog", 2, 3, num_classes=classes), images[4:7], [0, 1, 2])


def test_cifar_c_with_labels_of_one_severity(tmp_path: Path) -> None:
    images = write_corrupted(tmp_path, labels=np.array([5, 6, 7, 8], dtype=np.uint8)).transpose(0, 3, 1, 2)
    check(read_cifar_c(tmp_path, "fog", 5, 2), images[16:18], [5, 6])


def test_cifar_c_reads_only_what_is_asked_for(tmp_path: Path) -> None:
    np.save(tmp_path / "labels.npy", np.zeros(5000, dtype=np.uint8))
    np.save(tmp_path / "fog.npy", np.zeros((5000, 32, 32, 3), dtype=np.uint8))
    tracemalloc.start()
    read_cifar_c(tmp_path, "fog", 5, 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6, f"{peak / 1e6:.1f} MB for 10 images out of 15.4 MB"


@pytest.mark.parametrize(
    ("spoil", "arguments", "error", "message"),
    [
        (None, ("snow", 5), DataError, "no snow.npy in .*, only fog; expected the layout of CIFAR-10-C"),
        (lambda f: (f / "fog.npy").unlink(), ("fog", 5), DataError, "only no corruption at all"),
        (lambda f: (f / "labels.npy").unlink(), ("fog", 5), DataError, "there is no .*labels.npy"),
        (None, ("fog", 0), InputError, "severity is 0, expected 1 to 5"),
        (None, ("fog", 6), InputError, "severity is 6, expected 1 to 5"),
        (None, ("fog", 5, 5), InputError, "n is 5, but fog.npy in .* has 1 to 4 images per severity"),
        (None, ("fog", 5, 0), InputError, "n is 0"),
        (lambda f: cut(f / "fog.npy", 5000), ("fog", 5), DataError, "fog.npy is cut short or not a .npy file"),
        (lambda f: cut(f / "fog.npy", 0), ("fog", 5), DataError, "fog.npy is cut short or not a .npy file"),
        (lambda f: (f / "fog.npy").write_text("hello"), ("fog", 5), DataError, "cut short or not a .npy file"),
        (lambda f: np.save(f / "fog.npy", np.zeros((20, 32, 32, 3), np.float32)), ("fog", 5), DataError, "is float32"),
        (
            lambda f: np.save(f / "fog.npy", np.zeros((20, 3, 32, 32), np.uint8)),
            ("fog", 5),
            DataError,
            "expected uint8",
        ),
        (
            lambda f: np.save(f / "fog.npy", np.zeros((21, 32, 32, 3), np.uint8)),
            ("fog", 5),
            DataError,
            r"\(21, 32, 32, 3\)",
        ),
        (lambda f: np.save(f / "fog.npy", np.zeros((0, 32, 32, 3), np.uint8)), ("fog", 5), DataError, "expected uint8"),
        (lambda f: np.save(f / "fog.npy", np.uint8(3)), ("fog", 5), DataError, "expected uint8"),
        (
            lambda f: np.save(f / "labels.npy", np.arange(7)),
            ("fog", 5),
            DataError,
            r"expected integers \(20,\) or \(4,\)",
        ),
        (lambda f: np.save(f / "labels.npy", np.zeros(20)), ("fog", 5), DataError, "labels.npy is float64"),
        (lambda f: np.save(f / "labels.npy", np.full(20, 10)), ("fog", 5), DataError, "label 10, expected 0 to 9"),
        (lambda f: np.save(f / "labels.npy", np.full(20, -1)), ("fog", 5), DataError, "label -1, expected 0 to 9"),
    ],
)
def test_broken_cifar_c(tmp_path: Path, spoil, arguments: tuple, error: type[Exception], message: str) -> None:
    write_corrupted(tmp_path)
    if spoil is not None:
        spoil(tmp_path)
    with pytest.raises(error, match=message):
        read_cifar_c(tmp_path, *arguments)


def test_a_pickled_array_is_refused(tmp_path: Path) -> None:
    write_corrupted(tmp_path)
    np.save(tmp_path / "fog.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(DataError, match=r"not a .npy file"):
        read_cifar_c(tmp_path, "fog")


def test_to_float_is_the_nearest_number() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    expected = torch.from_numpy((np.arange(256, dtype=np.float64) / 255).astype(np.float32))
    assert torch.equal(to_float(values), expected)
    with pytest.raises(InputError, match=r"got torch.float32, expected torch.uint8"):
        to_float(expected)


@pytest.mark.skipif("TTAQ_DATA" not in os.environ, reason="TTAQ_DATA is not set: it names the folder with real images")
def test_real_cifar10() -> None:
    data = Path(os.environ["TTAQ_DATA"])
    test = read_cifar10(data)
    assert test.images.shape == (10_000, 3, 32, 32)
    assert test.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert torch.bincount(test.labels).tolist() == [1000] * 10
    assert read_cifar10(data / "cifar-10-batches-bin", "train").labels[:5].tolist() == [6, 9, 9, 4, 1]
