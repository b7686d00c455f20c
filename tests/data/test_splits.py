"""Validation and reporting images never meet, and calibration draws are repeatable."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from ttaq.data import SPLITS, calibration_indices, cifar_split, imagenet_split
from ttaq.errors import InputError


def test_cifar_split() -> None:
    assert cifar_split("report").tolist() == list(range(8000))
    assert cifar_split("validate").tolist() == list(range(8000, 10000))
    assert cifar_split("all").tolist() == list(range(10000))


def test_imagenet_split_follows_names_not_folders() -> None:
    names = [f"ILSVRC2012_val_{index:08d}.JPEG" for index in range(26)]
    files = [f"n{(7 * index) % 5}/{name}" for index, name in enumerate(names)]
    chosen = imagenet_split(reversed(files), "validate")
    assert [path.name for path in chosen] == [names[index] for index in (0, 1, 2, 13, 14, 15)]
    assert str(chosen[1]) == str(Path("n2") / names[1])
    report = imagenet_split(files, "report")
    assert not set(report) & set(chosen)
    assert sorted(path.name for path in [*report, *chosen]) == names
    assert [path.name for path in imagenet_split(files, "all")] == names


def test_calibration_indices() -> None:
    drawn = calibration_indices(1000, 64, seed=5)
    assert drawn.dtype is torch.int64
    assert len(set(drawn.tolist())) == 64
    assert 0 <= drawn.min() <= drawn.max() < 1000
    assert torch.equal(calibration_indices(1000, 64, seed=5), drawn)
    assert torch.equal(calibration_indices(1000, 32, seed=5), drawn[:32])
    assert not torch.equal(calibration_indices(1000, 64, seed=6), drawn)
    assert sorted(calibration_indices(7, 7, seed=0).tolist()) == list(range(7))


def test_calibration_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    calibration_indices(10, 3, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cifar_split("test"), "cifar_split: split is 'test', expected validate, report, all"),
        (lambda: imagenet_split([], "val"), "imagenet_split: split is 'val'"),
        (lambda: imagenet_split(["a/x.png", "b/x.png"], "all"), "have the same name"),
        (lambda: calibration_indices(10, 11, 0), "count is 11, expected 1 to 10"),
        (lambda: calibration_indices(10, 0, 0), "count is 0, expected 1 to 10"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.skipif("TTAQ_DATA" not in os.environ, reason="TTAQ_DATA is not set: it names the folder with real images")
def test_sizes_on_the_real_files() -> None:
    files = list((Path(os.environ["TTAQ_DATA"]) / "imagenet" / "val").glob("*/*.JPEG"))
    assert [len(imagenet_split(files, split)) for split in SPLITS] == [300, 1000, 1300]
