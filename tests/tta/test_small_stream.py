"""A small stream of real images through a real network: what the methods scored when they were last looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ttaq.data import read_cifar10, to_float
from ttaq.io import load_weights
from ttaq.tta import build


@pytest.mark.parametrize(
    ("method", "options", "wrong", "entropy"),
    [
        ("source", {}, 156, 0.3557),
        ("norm", {}, 99, 0.3873),
        ("tent", {"lr": 0.02}, 102, 0.3732),
        ("tent", {"lr": 0.2, "optimizer": "sgd"}, 99, 0.3755),
    ],
)
def test_noisy_cifar10(data_folder: Path, method: str, options: dict[str, object], wrong: int, entropy: float) -> None:
    model = load_weights("cifar_resnet20", data_folder / "models" / "cifar10_resnet20.safetensors")
    clean = read_cifar10(data_folder)
    images, labels = to_float(clean.images[8000:8200]), clean.labels[8000:8200]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    images = (images + 0.1 * noise).clamp(0, 1)
    adapter = build(method, model, **options)
    logits = torch.cat([adapter(batch) for batch in images.split(50)])
    log_p = logits.log_softmax(1)
    got = int((logits.argmax(1) != labels).sum()), -float((log_p.exp() * log_p).sum(1).mean())
    # Of 200; other machines sum in another order.
    assert got == (pytest.approx(wrong, abs=4), pytest.approx(entropy, abs=0.002))
