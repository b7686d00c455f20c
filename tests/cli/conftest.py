"""Files that the command tests work on."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file

from ttaq.eval import calibration_images
from ttaq.io import save_model
from ttaq.models import build
from ttaq.ptq import quantize

KWARGS = {"num_classes": 10, "width": 4}


def small_model(num_classes: int = 10) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build("cifar_resnet8", **(KWARGS | {"num_classes": num_classes})).eval()


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small model as `plain.safetensors` (weights only), `float.safetensors`, `q.safetensors` (W4A4),
    `net.pth` and `newer.safetensors` (of a later format), and `seven.safetensors` with seven classes."""
    folder = tmp_path_factory.mktemp("models")
    model = small_model()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "plain.safetensors")
    save_model(folder / "float.safetensors", model, architecture="cifar_resnet8", kwargs=KWARGS)
    quantized = quantize(model, calibration_images("digits", None, 16, 0), "W4A4")
    save_model(folder / "q.safetensors", quantized, architecture="cifar_resnet8", kwargs=KWARGS, method="rtn")
    with patch("ttaq.io.container.FORMAT_VERSION", 99):
        save_model(folder / "newer.safetensors", model, architecture="cifar_resnet8", kwargs=KWARGS)
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}, folder / "net.pth"
    )
    save_model(
        folder / "seven.safetensors", small_model(7), architecture="cifar_resnet8", kwargs={**KWARGS, "num_classes": 7}
    )
    return folder
