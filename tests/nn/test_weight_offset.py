"""A number that is added to all weights of an output channel, outside of the grid."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from ttaq.nn import QuantConv2d

LAYERS = {
    "plain": {"padding": 1},
    "groups": {"groups": 2, "stride": 2, "padding": (2, 1), "bias": False},
    "same": {"padding": "same", "dilation": 2},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
}


def layer(name: str, bits: int = 4) -> QuantConv2d:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv = QuantConv2d(4, 6, 3, **LAYERS[name])
        conv.weight_quantizer.bits = bits
        conv.weight_offset = torch.randn(6)
    return conv


def on_grid(scale: float = 0.25) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return (torch.randint(0, 16, (2, 4, 7, 6), generator=draw) * scale).requires_grad_()


def expected(conv: QuantConv2d, x: Tensor, weight: Tensor) -> Tensor:
    moved = weight.double() + conv.weight_offset.double().view(-1, 1, 1, 1)
    return conv._conv_forward(x.double(), moved, None if conv.bias is None else conv.bias.double())


@pytest.mark.parametrize("name", LAYERS)
def test_uncalibrated_and_calibrated_layers_add_it(name: str) -> None:
    conv, x = layer(name), on_grid()
    torch.testing.assert_close(conv(x).double(), expected(conv, x, conv.weight), rtol=1e-5, atol=1e-5)
    conv.calibrate_weight()
    w_hat = conv.weight_quantizer(conv.weight)
    want = expected(conv, x, w_hat)
    for y in (conv(x), conv(x, torch.tensor([0.25]))):
        torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    single = conv(x[0], torch.tensor([0.25]))
    torch.testing.assert_close(single, conv(x, torch.tensor([0.25]))[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_the_moved_weight(name: str) -> None:
    conv, x = layer(name), on_grid()
    conv.calibrate_weight()
    grad = torch.randn(conv(x).shape, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad(conv(x, torch.tensor([0.25])), [x, conv.weight], grad)
    want = torch.autograd.grad(expected(conv, x, conv.weight_quantizer(conv.weight)), [x, conv.weight], grad.double())
    for got, wanted in zip(ours, want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_the_window_is_summed_exactly() -> None:
    """Integers that a float32 convolution of dequantized tensors would round: the sum of 9 * 4 codes times a third."""
    conv = layer("plain")
    conv.calibrate_weight()
    with torch.no_grad():
        conv.bias.zero_()
        conv.weight_offset.fill_(1.0)
        scale = torch.tensor([1 / 3])
        codes = torch.randint(0, 16, (1, 4, 5, 5), generator=torch.Generator().manual_seed(3)).float()
        without = copy.deepcopy(conv)
        without.weight_offset = None
        window = torch.nn.functional.conv2d(codes, torch.ones(1, 4, 3, 3), padding=1)
        assert torch.equal(conv(codes * scale, scale), without(codes * scale, scale) + window * scale)


def test_it_is_saved_loaded_copied_and_moved() -> None:
    conv, other = layer("plain"), QuantConv2d(4, 6, 3, padding=1)
    assert "weight_offset" not in other.state_dict()
    other.load_state_dict(conv.state_dict())
    assert torch.equal(other.weight_offset, conv.weight_offset)
    assert torch.equal(copy.deepcopy(conv).weight_offset, conv.weight_offset)
    plain = QuantConv2d(4, 6, 3, padding=1)
    other.load_state_dict(plain.state_dict())
    assert other.weight_offset is None
    assert conv.double().weight_offset.dtype == torch.float64
