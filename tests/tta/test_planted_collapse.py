"""Planted collapses on real images: guarded, TENT ends within 2 points of `norm`; of each kind but that of images that
are not finite, which every update leaves out, one is shown to do harm without a guard."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ttaq.data.corruptions import VALIDATION_CORRUPTIONS
from ttaq.eval import Domains, Stream
from ttaq.io import load_weights
from ttaq.tta import Adapter, Guarded, build


@pytest.fixture(scope="module")
def model(data_folder: Path) -> torch.nn.Module:
    return load_weights("cifar_resnet20", data_folder / "models" / "cifar10_resnet20.safetensors")


@functools.cache
def batches(data_folder: Path, delta: float | None = None) -> list[tuple[Tensor, Tensor]]:
    stream = Stream(
        "cifar10", VALIDATION_CORRUPTIONS[:2], images=400, split="validate", batch_size=50, seed=3, delta=delta
    )
    domains = Domains(stream, data_folder, None)
    return [(x, y) for index in range(2) for x, y, _ in domains.batches(index)]


@functools.cache
def error_of_norm(data_folder: Path, model: torch.nn.Module, delta: float | None = None) -> float:
    return error(build("norm", model), batches(data_folder, delta))


def error(
    adapter: Adapter | Guarded, stream: list[tuple[Tensor, Tensor]], burst: Tensor | None = None, batches: int = 3
) -> float:
    """In per cent; a burst is so many batches after a third of the stream that nobody scores."""
    wrong = 0
    for number, (x, labels) in enumerate(stream):
        if burst is not None and number == len(stream) // 3:
            for _ in range(batches):
                adapter(burst)
        wrong += int((adapter(x).argmax(1) != labels).sum())
    return 100 * wrong / sum(len(labels) for _, labels in stream)


@pytest.mark.parametrize("times", [10, 30, 300])
def test_a_learning_rate_that_is_too_large(data_folder: Path, model: torch.nn.Module, times: int) -> None:
    stream = batches(data_folder)
    norm = error_of_norm(data_folder, model)
    guarded = Guarded(build("tent", model, lr=1e-3 * times))
    assert error(guarded, stream) < norm + 2
    assert guarded.alarms
    if times == 300:  # what it is that was planted
        assert error(build("tent", model, lr=1e-3 * times), stream) > norm + 10


@pytest.mark.parametrize("lr", [1e-3, 3e-2])
def test_a_stream_sorted_by_class(data_folder: Path, model: torch.nn.Module, lr: float) -> None:
    stream = batches(data_folder, delta=0)
    norm = error_of_norm(data_folder, model, 0)
    assert error(Guarded(build("tent", model, lr=lr)), stream) < norm + 2
    if lr > 1e-3:  # At 1e-3 there is nothing to prevent: batch statistics are as wrong as they can be.
        assert error(build("tent", model, lr=lr), stream) > norm + 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_burst_of_images_that_are_not_finite(data_folder: Path, model: torch.nn.Module, value: float) -> None:
    burst = torch.full((50, 3, 32, 32), value)
    guarded = Guarded(build("tent", model, lr=3e-3, check_finite=False))
    assert error(guarded, batches(data_folder), burst) < error_of_norm(data_folder, model) + 2
    assert [alarm.reason for alarm in guarded.alarms] == ["nonfinite"] * 3


@pytest.mark.parametrize("kind", ["black", "stuck"])
def test_a_camera_that_sends_one_image(data_folder: Path, model: torch.nn.Module, kind: str) -> None:
    stream = batches(data_folder)
    last = stream[len(stream) // 3 - 1][0][-1:]
    burst = (torch.zeros_like(last) if kind == "black" else last).repeat(50, 1, 1, 1)
    norm = error_of_norm(data_folder, model)
    guarded = Guarded(build("tent", model, lr=3e-3))
    assert error(guarded, stream, burst, 20) < norm + 2
    assert {alarm.reason for alarm in guarded.alarms} == {"classes"}
    if kind == "stuck":
        assert error(build("tent", model, lr=3e-3), stream, burst, 20) > norm + 2


def test_a_normal_stream_raises_no_alarm(data_folder: Path, model: torch.nn.Module) -> None:
    stream = batches(data_folder)
    for name in ("tent", "roid"):
        plain, guarded = build(name, model), Guarded(build(name, model))
        assert error(guarded, stream) == error(plain, stream)
        assert guarded.alarms == []
