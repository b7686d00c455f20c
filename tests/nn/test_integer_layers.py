"""QuantConv2d and QuantLinear: bit-equal to integer arithmetic, with the gradients of the dequantized layer."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from integer_oracle import draw, expected, random_grid_input, weight_codes
from torch import nn
from torch.nn import functional

from ttaq.nn import QuantConv2d, Quantizer, QuantLinear, integer


@pytest.fixture(autouse=True)
def _own_random_numbers() -> object:
    with torch.random.fork_rng(devices=[]):
        yield


def random_conv(rng: random.Random) -> tuple[QuantConv2d, tuple[int, ...]]:
    groups = rng.choice([1, 1, 2, 4])
    kernel, dilation = (rng.randint(1, 4), rng.randint(1, 3)), (rng.randint(1, 2), rng.randint(1, 2))
    mode = rng.choice(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"])
    padding = rng.choice(["same", "valid", (rng.randint(0, 3), rng.randint(0, 2)), 0])
    stride = 1 if padding == "same" else (rng.randint(1, 3), rng.randint(1, 3))
    channels, outputs = groups * rng.randint(1, 6), groups * rng.randint(1, 5)
    quantizer = Quantizer(rng.randint(2, 8), rng.random() < 0.3, rng.choice([0, 0, None]))
    layer = QuantConv2d(
        channels,
        outputs,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        rng.random() < 0.5,
        mode,
        weight_quantizer=quantizer,
    )
    layer.calibrate_weight()
    return layer, (rng.choice([0, 1, 3]), channels, rng.randint(6, 9), rng.randint(6, 11))


@pytest.mark.parametrize("exact", [2**24, 2**13, 2**9], ids=["one sum", "pieces", "float64"])
@pytest.mark.parametrize("seed", range(25))
def test_convolution_is_exact(seed: int, exact: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer, "EXACT", exact)
    rng = draw(seed)
    layer, shape = random_conv(rng)
    x, codes, scale = random_grid_input(shape, rng.randint(2, 8), 10 ** rng.uniform(-4, 1))
    if rng.random() < 0.3:
        x = x.to(memory_format=torch.channels_last)
    assert torch.equal(layer(x, scale), expected(layer, codes, scale))


@pytest.mark.parametrize("exact", [2**24, 2**13, 2**9], ids=["one sum", "pieces", "float64"])
@pytest.mark.parametrize("shape", [(4, 20), (0, 20), (20,), (2, 3, 20), (2, 0, 20)])
def test_linear_is_exact(shape: tuple[int, ...], exact: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer, "EXACT", exact)
    rng = draw(len(shape))
    for bits in range(2, 9):
        layer = QuantLinear(20, 7, bias=bits % 2 == 0, weight_quantizer=Quantizer(bits, bits == 5, 0))
        layer.calibrate_weight()
        x, codes, scale = random_grid_input(shape, rng.randint(2, 8), 0.037)
        assert torch.equal(layer(x, scale), expected(layer, codes, scale))


def test_large_sums_are_exact() -> None:
    """K = 4608 at 8 bits passes 2^24: the plain float32 product is wrong, the layer is not."""
    draw(0)
    layer = QuantConv2d(512, 4, 3, bias=False)
    layer.weight.data.uniform_(0.5, 1)
    layer.calibrate_weight("minmax")
    x, codes, scale = torch.full((1, 512, 3, 3), 25.3), torch.full((1, 512, 3, 3), 253.0), torch.tensor([0.1])
    x += torch.randint(0, 2, x.shape) * 0.1
    codes = (x / 0.1).round()
    assert 1 < 512 / layer.weight_codes(1).piece <= 16
    assert torch.equal(layer(x, scale), expected(layer, codes, scale))
    naive = torch.conv2d(codes, weight_codes(layer).float())
    assert not torch.equal(naive.double(), torch.conv2d(codes.double(), weight_codes(layer)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_types_carry_the_codes(dtype: torch.dtype) -> None:
    """bf16 holds 8-bit codes with their scale well enough to recover them; the output is rounded once."""
    draw(1)
    layer = QuantConv2d(3, 4, 3).to(dtype)
    layer.calibrate_weight()
    for bits in (2, 4, 8):
        x, codes, scale = random_grid_input((2, 3, 6, 6), bits, 0.0173)
        assert torch.equal(layer(x.to(dtype), scale), expected(layer, codes, scale).to(dtype))


def test_the_gradient_of_the_input_has_its_layout_and_bits_with_a_frozen_weight() -> None:
    draw(4)
    layer = QuantConv2d(6, 8, 3, padding=1)
    layer.calibrate_weight()
    x, _, scale = random_grid_input((4, 6, 9, 9), 4, 0.1)
    x = x.to(memory_format=torch.channels_last)
    gradients = []
    for frozen in (False, True):
        layer.requires_grad_(not frozen)
        moved = x.detach().requires_grad_()
        y = layer(moved, scale)
        wanted = torch.linspace(-1, 1, y.numel()).view_as(y).to(memory_format=torch.channels_last)
        gradients += torch.autograd.grad(y, moved, wanted)
    assert gradients[0].stride() == gradients[1].stride() == x.stride()
    assert torch.equal(*gradients)


def test_uncalibrated_is_the_float_layer() -> None:
    draw(2)
    for layer, x in ((QuantConv2d(3, 4, 3), torch.randn(2, 3, 6, 6)), (QuantLinear(5, 4), torch.randn(2, 5))):
        plain = nn.Conv2d.forward if isinstance(layer, nn.Conv2d) else nn.Linear.forward
        assert torch.equal(layer(x), plain(layer, x))
        assert torch.equal(layer(x, torch.tensor([0.1])), plain(layer, x))


def test_without_input_scale_the_weight_is_dequantized() -> None:
    draw(3)
    conv, linear = QuantConv2d(3, 4, 3, padding=1), QuantLinear(5, 4)
    for layer in (conv, linear):
        layer.calibrate_weight()
    x, rows = torch.randn(2, 3, 6, 6), torch.randn(2, 5)
    assert torch.equal(conv(x), functional.conv2d(x, conv.weight_quantizer(conv.weight), conv.bias, padding=1))
    assert torch.equal(linear(rows), functional.linear(rows, linear.weight_quantizer(linear.weight), linear.bias))
    conv(x).sum().backward()
    assert conv.weight.grad is not None


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_gradients_are_those_of_the_dequantized_layer(seed: int, frozen: bool) -> None:
    rng = draw(seed)
    if seed % 3:
        layer, shape = random_conv(rng)
    else:
        layer, shape = QuantLinear(9, 4, weight_quantizer=Quantizer(3, axis=0)), (3, 2, 9)
        layer.calibrate_weight()
    layer.weight.requires_grad_(not frozen)
    reference = copy.deepcopy(layer)
    x, _, scale = random_grid_input(shape, 4, 0.11)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = layer(inputs[0], scale), reference(inputs[1])
    grad = torch.randn(outputs[0].shape)
    for output in outputs:
        output.backward(grad)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-6)
    for name in ("weight", "bias"):
        got, want = getattr(layer, name), getattr(reference, name)
        if got is not None and got.requires_grad:
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-4)
    assert (layer.weight.grad is None) == frozen


def test_a_frozen_layer_does_not_hold_its_input() -> None:
    layer = QuantConv2d(3, 4, 3, bias=False).requires_grad_(False)
    layer.calibrate_weight()
    x, _, scale = random_grid_input((5, 3, 20, 20), 4, 0.1)
    saved = layer(x.requires_grad_(), scale).grad_fn.saved_tensors
    assert sum(tensor.untyped_storage().nbytes() for tensor in saved) < x.untyped_storage().nbytes() / 10


def test_no_graph_without_anything_to_learn() -> None:
    layer = QuantLinear(5, 4)
    layer.calibrate_weight()
    x, _, scale = random_grid_input((2, 5), 4, 0.1)
    with torch.no_grad():
        assert not layer(x, scale).requires_grad
    assert not layer.requires_grad_(False)(x, scale).requires_grad


def test_autocast_changes_nothing() -> None:
    draw(4)
    for layer, shape in ((QuantConv2d(3, 4, 3), (2, 3, 6, 6)), (QuantLinear(30, 4), (2, 30))):
        layer.calibrate_weight()
        x, codes, scale = random_grid_input(shape, 8, 0.0173)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x.requires_grad_(), scale)
        assert torch.equal(y, expected(layer, codes, scale))
        y.sum().backward()
        assert x.grad.dtype == torch.float32


def test_unbatched_image() -> None:
    draw(5)
    layer = QuantConv2d(3, 4, 3)
    layer.calibrate_weight()
    x, _, scale = random_grid_input((3, 6, 6), 4, 0.1)
    assert torch.equal(layer(x, scale), layer(x[None], scale)[0])


def test_from_float_shares_parameters_and_draws_nothing() -> None:
    state = torch.get_rng_state()
    for layer, kind in (
        (nn.Conv2d(4, 6, (3, 2), groups=2, padding="same"), QuantConv2d),
        (nn.Linear(5, 4), QuantLinear),
    ):
        state = torch.get_rng_state()
        new = kind.from_float(layer.eval())
        assert torch.equal(torch.get_rng_state(), state)
        assert new.weight is layer.weight
        assert new.bias is layer.bias
        assert not new.training
        assert list(new.state_dict()) == ["weight", "bias"]
        assert new.extra_repr() == layer.extra_repr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("channels", [16, 64, 512])
def test_cuda_is_exact_whatever_algorithm_it_picks(channels: int, bits: int) -> None:
    draw(channels + bits)
    layer = QuantConv2d(channels, 64, 3, padding=1, weight_quantizer=Quantizer(bits, axis=0))
    layer.calibrate_weight()
    x, codes, scale = random_grid_input((16, channels, 28, 28), bits, 0.1)
    assert torch.equal(layer.cuda()(x.cuda(), scale.cuda()).cpu(), expected(layer.cpu(), codes, scale))
