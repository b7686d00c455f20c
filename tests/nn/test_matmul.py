"""QuantMatmul: bit-equal to integer arithmetic, with the gradients of the float product, put there by conversion."""

from __future__ import annotations

import pytest
import torch
from nn_nets import calibrate, images, make
from torch import Tensor, nn

from ttaq.errors import InputError
from ttaq.nn import QuantMatmul, TwinQuantizer, activation_quantizers, convert, integer
from ttaq.nn.matmul import exact_product

SHAPES = [((2, 3, 5, 7), (2, 3, 7, 4)), ((5, 7), (3, 7, 4)), ((0, 5, 7), (7, 4)), ((7,), (2, 7, 4)), ((3, 7), (7,))]
SHAPES += [((7,), (7,))]


def grid_tensor(shape: tuple[int, ...], limit: int, scale: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values on a grid, their integers and their scale."""
    codes = torch.randint(-limit, limit + 1, shape, generator=torch.Generator().manual_seed(seed)).float()
    return codes * torch.tensor(scale), codes, torch.tensor([scale])


@pytest.mark.parametrize("exact", [2**24, 2**13, 2**9], ids=["one sum", "digits", "float64"])
@pytest.mark.parametrize("limits", [(255, 255), (15, 2**13), (2**17, 255), (1, 2)])
@pytest.mark.parametrize("shapes", SHAPES)
def test_is_exact(shapes: tuple, limits: tuple[int, int], exact: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer, "EXACT", exact)
    a, q_a, a_scale = grid_tensor(shapes[0], limits[0], 0.0173, 1)
    b, q_b, b_scale = grid_tensor(shapes[1], limits[1], 0.31, 2)
    expected = torch.matmul(q_a.double(), q_b.double()).float() * (a_scale * b_scale)
    y = QuantMatmul(limits)(a, b, a_scale, b_scale)
    assert y.shape == torch.matmul(a, b).shape
    assert torch.equal(y.reshape(-1), expected.reshape(-1))


@pytest.mark.parametrize("length", [256, 2000, 70_000])
def test_long_sums_of_the_largest_codes_are_exact(length: int) -> None:
    """At 8 bits K = 259 passes 2^24, K = 4,113 passes it for digits."""
    a, b = torch.full((2, length), 255.0), torch.full((length, 3), 255.0)
    a[:, ::3] = 254
    assert torch.equal(exact_product(a, b, (255, 255)), (a.double() @ b.double()).float())
    assert torch.equal(exact_product(b.T, a.T, (255, 255)), (b.T.double() @ a.T.double()).float())


def test_without_scales_it_is_the_float_product() -> None:
    a, b, scale = torch.randn(2, 3, 4), torch.randn(2, 4, 3), torch.ones(1)
    for scales in ((), (None, None), (scale, None), (None, scale)):
        assert torch.equal(QuantMatmul()(a, b, *scales), a @ b)


@pytest.mark.parametrize("shapes", SHAPES)
def test_gradients_are_those_of_the_float_product(shapes: tuple) -> None:
    a, _, a_scale = grid_tensor(shapes[0], 7, 0.1, 1)
    b, _, b_scale = grid_tensor(shapes[1], 7, 0.2, 2)
    ours, float64 = ([x.to(dtype, copy=True).requires_grad_() for x in (a, b)] for dtype in (a.dtype, torch.float64))
    y, expected = QuantMatmul()(*ours, a_scale, b_scale), torch.matmul(*float64)
    grad = torch.randn(y.shape)
    y.backward(grad)
    expected.backward(grad.double())
    for got, want in zip(ours, float64, strict=True):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-5, atol=1e-6)
    if b.ndim > 1:
        only_b = b.clone().requires_grad_()
        QuantMatmul()(a, only_b, a_scale, b_scale).backward(grad)
        assert torch.equal(only_b.grad, ours[1].grad)


# torch.compile itself makes an instance of every autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_other_types_autocast_and_compile() -> None:
    a, q_a, a_scale = grid_tensor((2, 5, 6), 15, 0.0173, 1)
    b, q_b, b_scale = grid_tensor((2, 6, 3), 15, 0.31, 2)
    expected = torch.matmul(q_a, q_b) * (a_scale * b_scale)
    product = QuantMatmul((15, 15))
    assert torch.equal(product(a.bfloat16(), b.bfloat16(), a_scale, b_scale), expected.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(product(a, b, a_scale, b_scale), expected)
    compiled = torch.compile(product, fullgraph=True, backend="eager")
    assert torch.equal(compiled(a, b, a_scale, b_scale), expected)


def test_in_a_model() -> None:
    net, x = make("transformer"), images(3)
    model = convert(net, "W4A5,matmul_1=W8A6")
    assert torch.equal(model(x), net(x))
    assert list(model.state_dict()) == list(net.state_dict())
    rows = {row.name: (row.type, row.weight_bits, row.activation_bits) for row in model.report}
    assert rows["matmul"] == ("QuantMatmul", None, 5)
    assert rows["matmul_1"] == ("QuantMatmul", None, 6)
    grids = activation_quantizers(model)
    assert [grids[f"after_{name}"].bits for name in ("getitem_1", "transpose_1", "softmax", "getitem_3")] == [
        5,
        5,
        6,
        6,
    ]
    assert isinstance(grids["after_softmax"], TwinQuantizer)
    assert model.matmul_1.limits == (2**15, 63)
    calibrate(model, x)
    seen = []

    def check(module: nn.Module, args: tuple) -> None:
        for tensor, scale, limit in zip(args[:2], args[2:], module.limits, strict=True):
            codes = tensor / scale
            torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-2)
            assert codes.abs().max() <= limit
        seen.append(module)

    for module in model.modules():
        if isinstance(module, QuantMatmul):
            module.register_forward_pre_hook(check)
    model(x).square().sum().backward()
    assert len(seen) == 2
    assert model.qkv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("scheme", ["W4A4,float_matmul", "W4A4,matmul*=float", "W4A32"])
def test_staying_float(scheme: str) -> None:
    net, x = make("transformer"), images(3)
    model = convert(net, scheme)
    notes = {row.name: row.note for row in model.report if row.name.startswith("matmul")}
    assert notes == dict.fromkeys(("matmul", "matmul_1"), "stays float: a call, not a layer")
    assert not any(isinstance(module, QuantMatmul) for module in model.modules())
    assert "after_softmax" not in activation_quantizers(model)
    assert torch.equal(model(x), net(x))


def test_an_override_of_products_that_stay_float_matches_nothing() -> None:
    with pytest.raises(InputError, match="override 'matmul' matches no layer"):
        convert(make("transformer"), "W4A4,float_matmul,matmul=W8A8")


class Products(nn.Module):
    """Products of every spelling: named, of a parameter, of a tensor with itself, in a child that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 4, 4)
        self.table = nn.Parameter(torch.ones(4, 4))
        self.matmul = nn.Identity()
        self.child = Gram()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.matmul(self.conv(x).flatten(2))
        x = torch.bmm(mat2=x, input=x.transpose(1, 2) @ self.table)
        return self.fc(self.child(self.child(x))[..., :4].mean(1))


class Gram(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.matmul(x.transpose(1, 2)) / 100


def test_names_and_shared_operands() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Products().eval()
    model, x = convert(net, "W4A4"), images(2)
    assert torch.equal(model(x), net(x))
    names = [(row.name, row.type) for row in model.report if "matmul" in row.name]
    assert names == [
        ("matmul_1", "matmul"),  # of a parameter: its name in the graph
        ("matmul_1", "QuantMatmul"),
        ("child.matmul", "QuantMatmul"),
        ("child.matmul_1", "QuantMatmul"),
    ]
    calibrate(model, x)
    grids = list(activation_quantizers(model))
    assert len(grids) == 5, "both operands of a Gram matrix are one tensor"
    assert not torch.equal(model(x), net(x))
