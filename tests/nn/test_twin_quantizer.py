"""Twin uniform quantizers: nearest value of two grids, straight-through gradients, search, state."""

from __future__ import annotations

import pytest
import torch
from nn_nets import calibrate, images, make
from torch import Tensor, nn
from torch.nn import functional

from ttaq.errors import InputError
from ttaq.nn import Quantizer, QuantLinear, TwinQuantizer, activation_quantizers, convert

KINDS = ("softmax", "gelu")


def data(kind: str, count: int = 4000, seed: int = 0) -> Tensor:
    x = torch.randn(count // 20, 20, generator=torch.Generator().manual_seed(seed)) * 3
    return x.softmax(1).flatten() if kind == "softmax" else functional.gelu(x.flatten())


def twin(kind: str, bits: int, scale: float, doublings: int) -> TwinQuantizer:
    quantizer = TwinQuantizer(bits, kind)
    ratio = torch.tensor([1 << doublings], dtype=torch.int32)
    quantizer.set_grid(torch.tensor([scale]), torch.zeros(1, dtype=torch.int32), ratio)
    return quantizer


def values(kind: str, bits: int, scale: float, doublings: int) -> Tensor:
    """All values of both grids, from the definition."""
    half, step = 2 ** (bits - 1), scale * 2**doublings
    if kind == "softmax":
        grids = [k * scale for k in range(half)], [k * step for k in range(1, half + 1)]
    else:
        grids = [k * scale for k in range(-half, 1)], [k * step for k in range(half)]
    return torch.tensor(sorted({*grids[0], *grids[1]}), dtype=torch.float64)


def test_by_hand() -> None:
    """3 bits, m = 2: softmax 0, 1, 2, 3 sixteenths, then quarters; GELU -4, ..., 0 tenths, then 0.4, 0.8, 1.2."""
    x = torch.tensor([-1.0, 0.0, 0.04, 0.11, 0.2, 0.24, 0.3, 0.6, 0.9, 2.0])
    expected = torch.tensor([0, 0, 1 / 16, 2 / 16, 3 / 16, 0.25, 0.25, 0.5, 1.0, 1.0])
    assert torch.equal(twin("softmax", 3, 1 / 16, 2)(x), expected)
    x = torch.tensor([-9.0, -0.31, -0.04, 0.0, 0.1, 0.5, 0.7, 5.0])
    expected = torch.tensor([-0.4, -0.3, 0.0, 0.0, 0.0, 0.4, 0.8, 1.2])
    torch.testing.assert_close(twin("gelu", 3, 0.1, 2)(x), expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("doublings", [0, 1, 3, 10])
def test_a_softmax_goes_to_the_nearest_value(bits: int, doublings: int) -> None:
    scale = 2.0 ** (1 - bits - doublings)
    grid = values("softmax", bits, scale, doublings)
    assert len(grid) <= 2**bits
    x = torch.rand(2000, generator=torch.Generator().manual_seed(1)).pow(4)
    y = twin("softmax", bits, scale, doublings)(x)
    distance = (x.double()[:, None] - grid).abs()
    assert torch.equal((x.double() - y.double()).abs(), distance.min(1).values)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("doublings", [0, 3, 10])
def test_a_gelu_goes_to_the_nearest_value_of_its_sign(bits: int, doublings: int) -> None:
    grid = values("gelu", bits, 0.021, doublings)
    x = data("gelu")
    y = twin("gelu", bits, 0.021, doublings)(x).double()
    for side in (x < 0, x >= 0):
        own = grid[grid <= 0] if bool(x[side][0] < 0) else grid[grid >= 0]
        distance = (x[side].double()[:, None] - own).abs().min(1).values
        torch.testing.assert_close((x[side].double() - y[side]).abs(), distance, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_readers_see_integers_of_one_scale(kind: str, bits: int) -> None:
    quantizer, x = TwinQuantizer(bits, kind), data(kind)
    quantizer.calibrate(x)
    y = quantizer(x)
    codes = (y * quantizer.scale.reciprocal()).round()
    assert torch.equal(codes * quantizer.scale, y)
    assert codes.abs().max() <= quantizer.largest_code == 2 ** (bits + 9)
    assert torch.equal(quantizer(y), y)
    assert len(codes.unique()) <= 2**bits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_search_finds_the_smallest_error(kind: str, bits: int) -> None:
    x = data(kind)
    quantizer = TwinQuantizer(bits, kind)
    quantizer.calibrate(x)

    def error(scale: float, doublings: int) -> float:
        return float((twin(kind, bits, scale, doublings)(x) - x).abs().pow(2.4).mean())

    found = float((quantizer(x) - x).abs().pow(2.4).mean())
    if kind == "softmax":
        tried = [(2.0 ** (1 - bits - m), m) for m in range(11)]
        assert (float(quantizer.scale), int(quantizer.ratio).bit_length() - 1) in tried
    else:
        tried = [(0.17 / 2 ** (bits - 1) * share, m) for m in range(11) for share in (1.0, 0.9, 0.7, 0.5, 0.3)]
    assert found <= min(error(*pair) for pair in tried) * (1 if kind == "softmax" else 1.01)
    assert found == pytest.approx(error(float(quantizer.scale), int(quantizer.ratio).bit_length() - 1), rel=1e-4)


def test_minmax_covers_a_gelu() -> None:
    x, quantizer = data("gelu"), TwinQuantizer(4, "gelu")
    quantizer.calibrate(x, search="minmax")
    top = float(quantizer.scale * quantizer.ratio)
    assert -8 * float(quantizer.scale) <= float(x.min())
    assert 7 * top >= float(x.max()) * (1 - 1e-6)
    assert 7 * top < 2.01 * float(x.max())


@pytest.mark.parametrize("x", [torch.zeros(5), torch.full((3,), 2.0), torch.full((3,), -2.0), torch.full((2,), 1e-12)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("search", ["mse", "minmax"])
def test_odd_samples_give_a_finite_grid(x: Tensor, kind: str, search: str) -> None:
    quantizer = TwinQuantizer(4, kind)
    quantizer.calibrate(x, search=search)
    assert quantizer.scale.item() > 0
    assert quantizer(x).isfinite().all()


@pytest.mark.parametrize(("kind", "scale", "doublings"), [("softmax", 2.0**-7, 4), ("gelu", 0.1, 2)])
def test_gradients(kind: str, scale: float, doublings: int) -> None:
    quantizer = twin(kind, 4, scale, doublings)
    x = torch.linspace(-1.2, 4, 1001).requires_grad_()
    y = quantizer(x)
    assert torch.equal(y, quantizer(x.detach())), "asking for a gradient changes nothing"
    y.sum().backward()
    grid = values(kind, 4, scale, doublings)
    step = scale * 2**doublings
    inside = (x >= grid[0] - 0.499 * scale) & (x <= grid[-1] + 0.499 * step)
    outside = (x <= grid[0] - 0.501 * scale) | (x >= grid[-1] + 0.501 * step)
    assert (x.grad[inside] == 1).all()
    assert (x.grad[outside] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_the_scale_is_that_of_the_detach_trick(kind: str) -> None:
    quantizer = TwinQuantizer(3, kind)
    x = data(kind)
    quantizer.calibrate(x)
    scale = quantizer.scale.clone().requires_grad_()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    quantizer.round(x, scale, quantizer.zero_point, quantizer.ratio).backward(grad)
    reference = quantizer.scale.double().requires_grad_()
    y = quantizer(x).double()
    half, ratio = 4, int(quantizer.ratio)
    # Which grid a value went to, from the value itself: what is beyond the fine grid is on the coarse one.
    fine = (y / reference.detach()).round() <= half - 1 if kind == "softmax" else x < 0
    step = torch.where(fine, reference, reference * ratio)
    low, high = ((0, half - 1), (0, half)) if kind == "softmax" else ((-half, 0), (0, half - 1))
    bottom, top = (torch.where(fine, torch.tensor(low[i]), torch.tensor(high[i])).double() for i in (0, 1))
    v = x.double() / step
    q = v + (v.round() - v).detach()
    (q.clamp(bottom, top) * step).backward(grad.double())
    torch.testing.assert_close(scale.grad.double(), reference.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_drop_keeps_the_same_elements_of_both_grids(kind: str) -> None:
    quantizer, x = TwinQuantizer(3, kind), data(kind)
    quantizer.calibrate(x)
    seed = torch.tensor(5)
    y = quantizer.round(x, quantizer.scale, quantizer.zero_point, quantizer.ratio, 0.5, seed)
    rounded = quantizer(x)
    assert bool(((y == x) | (y == rounded)).all())
    assert 0.4 < float((y == rounded).float().mean()) < 0.6
    leaf = x.clone().requires_grad_()
    quantizer.round(leaf, quantizer.scale, quantizer.zero_point, quantizer.ratio, 0.5, seed).sum().backward()
    assert (leaf.grad[y == x] == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_state(kind: str) -> None:
    source, x = TwinQuantizer(4, kind), data(kind)
    assert source(x) is x
    assert list(source.state_dict()) == []
    source.calibrate(x)
    target = TwinQuantizer(4, kind)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x), source(x))
    target.set_grid(source.scale * 2, source.zero_point)
    assert torch.equal(target.ratio, source.ratio), "a new scale keeps the ratio"
    target.set_grid(None, None)
    assert target(x) is x
    assert list(target.state_dict()) == []
    half = {key: value for key, value in source.state_dict().items() if key != "ratio"}
    with pytest.raises(RuntimeError, match=r"Missing key.*ratio"):
        TwinQuantizer(4, kind).load_state_dict(half)
    short = nn.Sequential(source).to(torch.bfloat16)[0]
    assert (short.scale.dtype, short.ratio.dtype) == (torch.float32, torch.int32)


def test_a_softmax_in_bfloat16_carries_its_codes() -> None:
    quantizer, x = TwinQuantizer(8, "softmax"), data("softmax")
    quantizer.calibrate(x)
    y = quantizer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    codes = y.double() / float(quantizer.scale)
    assert torch.equal(codes, codes.round())


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_as_one_graph(kind: str) -> None:
    quantizer, x = TwinQuantizer(4, kind), data(kind)
    quantizer.calibrate(x)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    leaf = x.clone().requires_grad_()
    assert torch.equal(compiled(leaf), quantizer(x))


def test_a_layer_behind_a_twin_grid_is_exact() -> None:
    """Its inputs have up to 18 bits; it sums them as two digits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = QuantLinear(700, 5, bias=False, weight_quantizer=Quantizer(8, axis=0))
    layer.calibrate_weight()
    layer.input_limit = TwinQuantizer(8, "gelu").largest_code
    codes = torch.randint(-128, 128, (9, 700), generator=torch.Generator().manual_seed(1)).float()
    codes = torch.where(codes > 0, codes * 1024, codes)
    scale = torch.tensor([0.0007])
    weight = layer.weight_codes(1)
    assert weight.digits is not None
    expected = (codes.double() @ weight.codes.double().T).float() * (weight.scale * scale)
    assert torch.equal(layer(codes * scale, scale), expected)
    with pytest.raises(InputError, match="pack: the inputs have integers up to 131072"):
        layer.pack()


def test_where_conversion_puts_them() -> None:
    net, x = make("transformer"), images(4)
    grids = activation_quantizers(convert(net, "W4A4"))
    kinds = {name: q.kind for name, q in grids.items() if isinstance(q, TwinQuantizer)}
    assert kinds == {"after_softmax": "softmax", "after_mlp_1": "gelu"}
    assert not any(type(q) is TwinQuantizer for q in activation_quantizers(convert(make("cifar"), "W4A4")).values())
    for flag, kept in (("uniform_softmax", "after_mlp_1"), ("uniform_gelu", "after_softmax")):
        grids = activation_quantizers(convert(net, f"W4A4,{flag}"))
        assert [name for name, q in grids.items() if isinstance(q, TwinQuantizer)] == [kept]
    model = calibrate(convert(net, "W4A4"), x)
    fresh = convert(net, "W4A4")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(x), net(x))


def test_errors() -> None:
    with pytest.raises(InputError, match="kind is 'relu', expected 'softmax' or 'gelu'"):
        TwinQuantizer(4, "relu")
    with pytest.raises(InputError, match="search is 'best'"):
        TwinQuantizer(4, "gelu").calibrate(torch.rand(5), search="best")
