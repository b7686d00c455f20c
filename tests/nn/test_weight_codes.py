"""The codes of a weight are computed once, and again whenever the weight or its grid changed."""

from __future__ import annotations

import copy

import pytest
import torch
from integer_oracle import draw, expected, random_grid_input
from torch import nn

from ttaq.nn import QuantConv2d, Quantizer, QuantLinear


@pytest.fixture(autouse=True)
def _own_random_numbers() -> object:
    with torch.random.fork_rng(devices=[]):
        yield


WRITES = {
    "in place": lambda layer: layer.weight.mul_(2.1),
    "load_state_dict": lambda layer: layer.load_state_dict({"weight": layer.weight * 2.1}, strict=False),
    "new parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight * 2.1)),
    "new data": lambda layer: setattr(layer.weight, "data", layer.weight.data * 2.1),
    "optimizer": lambda layer: torch.optim.SGD([layer.weight], 1.1).step(
        lambda: setattr(layer.weight, "grad", -layer.weight.detach().clone())
    ),
    "grid": lambda layer: layer.weight_quantizer.scale.mul_(2.1),
    "new grid": lambda layer: layer.weight_quantizer.set_grid(
        layer.weight_quantizer.scale * 1.3, layer.weight_quantizer.zero_point
    ),
    "calibration": lambda layer: layer.calibrate_weight("minmax"),
    "zero point": lambda layer: layer.weight_quantizer.zero_point.add_(1),
    "double and back": lambda layer: (layer.double(), layer.weight.mul_(2.1), layer.float()),
    "limit": lambda layer: setattr(layer, "input_limit", 2**20),
}


@pytest.mark.parametrize("write", WRITES)
def test_codes_follow_the_weight(write: str) -> None:
    draw(6)
    layer = QuantLinear(20, 4, bias=False, weight_quantizer=Quantizer(3, axis=0))
    layer.calibrate_weight()
    x, codes, scale = random_grid_input((2, 20), 8, 0.1)
    before = layer(x, scale)
    codes_before = layer.weight_codes(1)
    assert layer.weight_codes(1) is codes_before, "an unchanged weight is not quantized again"
    grid = layer.weight_quantizer.scale, layer.weight_quantizer.zero_point
    with torch.no_grad():
        WRITES[write](layer)
        if write == "load_state_dict":
            assert layer.weight_quantizer.scale is None
            layer.weight_quantizer.set_grid(*grid)
    assert layer.weight_codes(1) is not codes_before
    if write != "limit":
        assert not torch.equal(layer(x, scale), before)
    assert torch.equal(layer(x, scale), expected(layer, codes, scale))


def test_copies_are_independent() -> None:
    draw(7)
    layer = QuantLinear(20, 4)
    layer.calibrate_weight()
    x, codes, scale = random_grid_input((2, 20), 8, 0.1)
    y = layer(x, scale)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.mul_(0.5)
    assert torch.equal(layer(x, scale), y)
    assert torch.equal(twin(x, scale), expected(twin, codes, scale))


def test_first_run_in_inference_mode_then_training() -> None:
    draw(8)
    layer = QuantConv2d(3, 4, 3)
    layer.calibrate_weight()
    x, codes, scale = random_grid_input((2, 3, 6, 6), 4, 0.1)
    with torch.inference_mode():
        y = layer(x, scale)
    x.requires_grad_()
    layer(x, scale).sum().backward()
    assert x.grad is not None
    assert torch.equal(y, expected(layer, codes, scale))
