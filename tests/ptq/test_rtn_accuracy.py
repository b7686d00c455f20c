"""Round to nearest on a real net: what is measured must stay measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ttaq.data.cifar import read_cifar10
from ttaq.io import load_weights
from ttaq.ptq import quantize


@pytest.fixture(scope="module")
def task(data_folder: Path) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """ResNet-20, calibration images, and the validation images 8,000 to 8,499 with labels."""
    model = load_weights("cifar_resnet20", data_folder / "models" / "cifar10_resnet20.safetensors")
    train, test = read_cifar10(data_folder, split="train"), read_cifar10(data_folder, split="test")
    validation = slice(8000, 8500)
    return model, train.images[:128].float() / 255, test.images[validation].float() / 255, test.labels[validation]


def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        predictions = torch.cat([model(batch).argmax(1) for batch in x.split(250)])
    return 100 * (predictions == labels).float().mean().item()


def test_eight_bits_cost_nothing_and_four_little(task: tuple) -> None:
    model, calibration, x, labels = task
    source = accuracy(model, x, labels)
    assert source > 88
    assert accuracy(quantize(model, calibration, "W8A8"), x, labels) > source - 0.7
    assert accuracy(quantize(model, calibration, "W4A4"), x, labels) > source - 4
