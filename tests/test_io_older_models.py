"""Files from before products of activations were quantized and grids were twin: they load as what they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ttaq.io import load_model
from ttaq.io.container import write
from ttaq.models import build
from ttaq.nn import QuantizedModel, activation_quantizers, convert, quantized_layers

NEWER = ("quantize_matmul", "twin_softmax", "twin_gelu")
NETS = {
    "deit_tiny": ({"num_classes": 5, "image_size": 16, "patch_size": 8}, 16),
    "cifar_resnet8": ({"num_classes": 5, "width": 4}, 16),
}


def quantized(name: str, scheme: str) -> QuantizedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = convert(build(name, **NETS[name][0]), scheme).eval()
    for index, grid in enumerate(activation_quantizers(model).values()):
        grid.set_grid(torch.tensor([0.04 + 0.01 * index]), torch.tensor([3], dtype=torch.int32))
    for layer in quantized_layers(model).values():
        layer.calibrate_weight("minmax")
    return model


@pytest.mark.parametrize(
    ("name", "shown"),
    [("deit_tiny", "W4A4,float_matmul,uniform_softmax,uniform_gelu"), ("cifar_resnet8", "W4A4")],
)
def test_older_files_load(tmp_path: Path, name: str, shown: str) -> None:
    model = quantized(name, "W4A4,float_matmul,uniform_softmax,uniform_gelu")
    scheme = {key: value for key, value in model.scheme.to_dict().items() if key not in NEWER}
    fields = {"architecture": name, "kwargs": NETS[name][0], "scheme": scheme, "method": "rtn", "extra": {}}
    write("save_model", tmp_path / "model", "model", fields, model.state_dict())
    loaded = load_model(tmp_path / "model").model
    x = torch.rand(2, 3, NETS[name][1], NETS[name][1], generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded(x), model(x))
    assert str(loaded.scheme) == shown
