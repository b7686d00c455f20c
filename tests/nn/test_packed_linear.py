"""QuantLinear.pack: the outputs of simulation bit for bit, its gradients, its file, and its errors."""

from __future__ import annotations

import copy

import pytest
import torch
from integer_oracle import draw, expected, random_grid_input
from torch import Tensor, nn

from ttaq.errors import InputError
from ttaq.nn import Quantizer, QuantLinear


@pytest.fixture(autouse=True)
def _own_random_numbers() -> object:
    with torch.random.fork_rng(devices=[]):
        yield


def calibrated(
    bits: int, inputs: int = 70, symmetric: bool = False, axis: int | None = 0, bias: bool = True
) -> QuantLinear:
    layer = QuantLinear(inputs, 9, bias=bias, weight_quantizer=Quantizer(bits, symmetric, axis))
    layer.calibrate_weight()
    return layer


def grid_input(shape: tuple[int, ...], bits: int, scale: float = 0.037) -> tuple[Tensor, Tensor, Tensor]:
    """Values on a grid with a zero point, the scale and the zero point."""
    zero_point = int(torch.randint(0, 2**bits, ()))
    codes = torch.randint(-zero_point, 2**bits - zero_point, shape).float()
    return codes * torch.tensor(scale), torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(4, 70), (0, 70), (70,), (2, 3, 70)])
def test_packed_equals_simulation(bits: int, shape: tuple[int, ...]) -> None:
    rng = draw(bits)
    for symmetric, axis in ((False, 0), (True, 0), (False, None)):
        layer = calibrated(bits, symmetric=symmetric, axis=axis, bias=rng.random() < 0.5)
        packed = copy.deepcopy(layer).pack()
        for input_bits in (2, 4, 8):
            x, scale, zero_point = grid_input(shape, input_bits)
            y = packed(x, scale, zero_point)
            assert torch.equal(y, layer(x, scale))
            assert y.dtype == x.dtype
            if input_bits < 8:
                packed.input_limit = 2**input_bits - 1
                assert torch.equal(packed(x, scale), y)
                packed.input_limit = 255


def test_packed_equals_the_formula_where_sums_are_large() -> None:
    draw(0)
    layer = QuantLinear(1100, 5)
    layer.weight.data.uniform_(0.5, 1)
    layer.calibrate_weight("minmax")
    codes = torch.randint(230, 256, (3, 1100)).float()
    scale = torch.tensor([0.0173])
    want = expected(layer, codes, scale)
    assert torch.equal(layer.pack()(codes * scale, scale, torch.zeros(1, dtype=torch.int32)), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_types(dtype: torch.dtype) -> None:
    draw(1)
    layer = calibrated(4).to(dtype)
    packed = copy.deepcopy(layer).pack()
    x, _, scale = random_grid_input((6, 70), 4, 0.0173)
    packed.input_limit = 15
    y = packed(x.to(dtype), scale)
    assert y.dtype == dtype
    assert torch.equal(y, layer(x.to(dtype), scale))
    torch.testing.assert_close(packed(x.to(dtype)), layer(x.to(dtype)), rtol=2e-2, atol=2e-2)


def test_floating_inputs_meet_the_dequantized_weight() -> None:
    draw(2)
    layer = calibrated(3)
    packed, x = copy.deepcopy(layer).pack(), torch.randn(2, 5, 70)
    torch.testing.assert_close(packed(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen_bias", [False, True])
@pytest.mark.parametrize("with_scale", [False, True])
def test_gradients_are_those_of_simulation(with_scale: bool, frozen_bias: bool) -> None:
    draw(3)
    layer = calibrated(4)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(not frozen_bias)
    packed = copy.deepcopy(layer).pack()
    x, scale, zero_point = grid_input((2, 3, 70), 8)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    grad = torch.randn(2, 3, 9)
    layer(inputs[0], scale if with_scale else None).backward(grad)
    packed(inputs[1], scale if with_scale else None, zero_point).backward(grad)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-5, atol=1e-6)
    assert (packed.bias.grad is None) == frozen_bias
    if not frozen_bias:
        torch.testing.assert_close(packed.bias.grad, layer.bias.grad, rtol=1e-5, atol=1e-5)


def test_norm_parameters_in_front_learn() -> None:
    """LayerNorm -> quantizer -> packed layer: the gradient of the norm is that of simulation."""
    draw(4)
    norm, quantizer, layer = nn.LayerNorm(70), Quantizer(8), calibrated(4)
    x = torch.randn(5, 70)
    quantizer.calibrate(norm(x))
    grads = []
    for linear in (layer, copy.deepcopy(layer).pack()):
        norm.zero_grad()
        linear(
            quantizer(norm(x)), quantizer.scale, *([quantizer.zero_point] * linear.is_packed)
        ).square().sum().backward()
        grads.append([p.grad.clone() for p in norm.parameters()])
    for simulated, packed in zip(*grads, strict=True):
        assert simulated.abs().max() > 0
        torch.testing.assert_close(packed, simulated, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
def test_state_dict_round_trip(bits: int, symmetric: bool) -> None:
    draw(bits)
    layer = calibrated(bits, symmetric=symmetric).pack()
    state = layer.state_dict()
    assert sorted(state) == ["bias", "packed_weight", "weight_quantizer.scale", "weight_quantizer.zero_point"]
    assert state["packed_weight"].dtype == torch.uint8
    assert state["packed_weight"].shape == (9, -(-70 * bits // 8))
    fresh = nn.Sequential(QuantLinear(70, 9, weight_quantizer=Quantizer(bits, symmetric, 0)))
    fresh.load_state_dict({f"0.{name}": tensor.clone() for name, tensor in state.items()})
    assert fresh[0].is_packed
    assert [name for name, _ in fresh.named_parameters()] == ["0.bias"]
    x, scale, zero_point = grid_input((4, 70), 8)
    assert torch.equal(fresh[0](x, scale, zero_point), layer(x, scale, zero_point))
    again = fresh[0].state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    fresh[0].load_state_dict(state)  # packed into packed
    assert torch.equal(fresh[0](x, scale, zero_point), layer(x, scale, zero_point))


def test_state_dicts_that_do_not_fit() -> None:
    draw(5)
    packed, plain = calibrated(4).pack(), calibrated(4)
    with pytest.raises(RuntimeError, match=r"size mismatch for packed_weight: the file has .9, 35.*8 bits has .9, 70"):
        QuantLinear(70, 9).load_state_dict(packed.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key.*"packed_weight".*\n.*Unexpected key.*"weight"'):
        packed.load_state_dict(plain.state_dict())
    state = calibrated(4).pack().state_dict()
    del state["weight_quantizer.scale"]
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_quantizer.scale"):
        calibrated(4).load_state_dict(state)


def test_packing_is_small_and_survives_copies_and_moves() -> None:
    draw(6)
    layer = calibrated(4, inputs=256).pack()
    assert layer.pack() is layer
    assert sum(t.numel() * t.element_size() for t in layer.buffers()) < 9 * (128 + 4 + 4 + 4 + 1 + 1)
    x, scale, zero_point = grid_input((4, 256), 4)
    y = layer(x, scale, zero_point)
    assert torch.equal(copy.deepcopy(layer)(x, scale, zero_point), y)
    assert torch.equal(layer.double().float()(x, scale, zero_point), y)


def test_autocast_changes_nothing() -> None:
    draw(7)
    layer = calibrated(4).pack()
    x, scale, zero_point = grid_input((4, 70), 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.requires_grad_(), scale, zero_point)
        y.sum().backward()
    assert torch.equal(y, layer(x, scale, zero_point))
    assert y.dtype == x.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_fullgraph_compile() -> None:
    draw(8)
    layer = calibrated(4).pack()
    x, scale, zero_point = grid_input((4, 70), 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [f(i, scale, zero_point) for f, i in zip((layer, compiled), inputs, strict=True)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


def test_errors() -> None:
    with pytest.raises(InputError, match=r"QuantLinear.pack: the weight has no grid, .* calibrate_weight\(\) first"):
        QuantLinear(5, 4).pack()
    layer = calibrated(4)
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"QuantLinear.pack: the weight has NaN or infinite values"):
        layer.pack()
    layer = calibrated(4, axis=1)
    with pytest.raises(InputError, match=r"QuantLinear.pack: the grid of the weight has 70 scales, expected 1 or 9"):
        layer.pack()
    layer = calibrated(4).pack()
    with pytest.raises(InputError, match=r"QuantLinear.calibrate_weight: the layer is packed"):
        layer.calibrate_weight()
    with pytest.raises(InputError, match=r"an 8-bit input .* without input_zero_point; pass the zero point"):
        layer(torch.zeros(1, 70), torch.ones(1))
