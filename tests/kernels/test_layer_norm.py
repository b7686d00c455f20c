"""layer_norm and layer_norm_codes as users call them: values, codes, gradients, errors, torch.compile."""

from typing import Any

import group_cases as cases
import pytest
import torch
from kernel_layouts import LAYOUTS, layouts_of, same_bits
from torch import Tensor
from torch.nn import functional

from ttaq_kernels import KernelError, fake_quantize, layer_norm, layer_norm_codes

EPS = 1e-6
A4, A8 = (0, 15), (0, 255)


def tensor_of(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return 0.5 + 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grid(codes: tuple[int, int], device: torch.device | str = "cpu") -> dict[str, Any]:
    """About -1.5 to 2.5, so that both ends clip."""
    scale = torch.tensor([4 / (codes[1] - codes[0])], device=device)
    zero_point = torch.tensor([codes[0] + (3 * (codes[1] - codes[0])) // 8], dtype=torch.int32, device=device)
    return {"scale": scale, "zero_point": zero_point, "qmin": codes[0], "qmax": codes[1]}


def formula(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, index: Tensor | None, after: dict[str, Any]
) -> Tensor:
    """In float64, differentiable; the rounding is detached."""
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    v = (x - mean) / (var + EPS).sqrt()
    if weight is None:
        weight = torch.ones(1 if bias is None else len(bias), x.shape[-1], dtype=x.dtype)
    v = cases.group_affine(v, weight, bias, index, axis=-1)
    if not after:
        return v
    scale, zero_point, qmin, qmax = after.values()
    code = v / scale.double()
    u = code.detach().round() + zero_point
    code = torch.where(
        (u >= qmin) & (u <= qmax), code + (u - zero_point - code).detach(), u.clamp(qmin, qmax) - zero_point
    )
    return code * scale.double()


def test_worked_by_hand(op_device: torch.device) -> None:
    """1 and 3 normalise to -1 and 1, for either group with another weight and bias; on the grid 0, 1, 2 codes clip."""
    x = torch.tensor([[1.0, 3.0], [3.0, 1.0]], device=op_device)
    weight = torch.tensor([[1.0, 1.0], [2.0, 4.0]], device=op_device, requires_grad=True)
    bias = torch.tensor([[0.0, 0.0], [0.0, 1.0]], device=op_device, requires_grad=True)
    assert layer_norm(x, weight, bias, 1e-12).tolist() == [[-1, 1], [2, -3]]
    assert layer_norm(x, None, None, 1e-12).tolist() == [[-1, 1], [1, -1]]
    index = torch.tensor([1, 0], dtype=torch.int32, device=op_device)
    assert layer_norm(x, weight, bias, 1e-12, groups=index).tolist() == [[-2, 5], [1, -1]]
    after = {
        "scale": torch.ones(1, device=op_device),
        "zero_point": torch.tensor([1], dtype=torch.int32, device=op_device),
    }
    y = layer_norm(x, weight, bias, 1e-12, **after, qmin=0, qmax=2)
    assert y.tolist() == [[-1, 1], [1, -1]]
    y.sum().backward()
    assert weight.grad.tolist() == [[-1, 1], [0, 0]]
    assert bias.grad.tolist() == [[1, 1], [0, 0]]
    codes, _ = layer_norm_codes(x, weight, bias, *after.values(), 0, 2, 1e-12)
    assert codes.tolist() == [[0, 2], [2, 0]]


def test_equal_to_torch() -> None:
    x, (weight, bias) = tensor_of((5, 4, 20)), cases.parameters_of(1, 20)
    expected = functional.layer_norm(x.double(), (20,), weight[0].double(), bias[0].double(), EPS)
    torch.testing.assert_close(layer_norm(x, weight[0], bias[0], EPS).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("codes", [None, A4, A8, (-8, 7)])
@pytest.mark.parametrize("by_index", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shape", [(6, 10), (4, 5, 33), (2, 3, 2, 4)])
def test_values_and_gradients_equal_float64(
    shape: tuple[int, ...], groups: int, by_index: bool, codes: tuple[int, int] | None, op_device: torch.device
) -> None:
    after = {} if codes is None else grid(codes, op_device)
    x, parameters = tensor_of(shape), cases.parameters_of(groups, shape[-1])
    index = cases.index_of(len(x), groups) if by_index else None
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    given = [t.to(op_device, copy=True).requires_grad_() for t in (x, *parameters)]
    y = layer_norm(*given, EPS, groups=None if index is None else index.to(op_device), **after)
    y.backward(grad.to(op_device))
    wide = [t.double().requires_grad_() for t in (x, *parameters)]
    expected = formula(*wide, index, {} if codes is None else grid(codes))
    expected.backward(grad.double())
    torch.testing.assert_close(y.detach().cpu().double(), expected.detach(), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(given, wide, strict=True):
        torch.testing.assert_close(ours.grad.cpu().double(), theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("present", [(False, False), (True, False), (False, True)])
def test_without_weight_or_bias(present: tuple[bool, bool], op_device: torch.device) -> None:
    x, parameters = tensor_of((4, 3, 6)), cases.parameters_of(2, 6)
    chosen = [t if there else None for t, there in zip(parameters, present, strict=True)]
    given = [None if t is None else t.to(op_device, copy=True).requires_grad_() for t in (x, *chosen)]
    y = layer_norm(*given, EPS, **grid(A4, op_device))
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    y.backward(grad.to(op_device))
    wide = [None if t is None else t.double().requires_grad_() for t in (x, *chosen)]
    expected = formula(*wide, None, grid(A4))
    expected.backward(grad.double())
    torch.testing.assert_close(y.detach().cpu().double(), expected.detach(), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(given, wide, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours.grad.cpu().double(), theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_requires_a_gradient_gets_one(needed: tuple[bool, ...], op_device: torch.device) -> None:
    inputs = [t.to(op_device) for t in (tensor_of((4, 3, 5)), *cases.parameters_of(2, 5))]
    given = [t.clone().requires_grad_(need) for t, need in zip(inputs, needed, strict=True)]
    every = [t.clone().requires_grad_() for t in inputs]
    layer_norm(*given).square().sum().backward()
    layer_norm(*every).square().sum().backward()
    for ours, theirs, need in zip(given, every, needed, strict=True):
        assert torch.equal(ours.grad, theirs.grad) if need else ours.grad is None


@pytest.mark.parametrize("layout", layouts_of(4))
@pytest.mark.parametrize("codes", [A4, A8, (-8, 7), (-128, 127)])
def test_codes(codes: tuple[int, int], layout: str, op_device: torch.device) -> None:
    """(code - zero_point) * scale are the values, bit for bit, those are fake_quantize of the norm, gradients agree."""
    x = LAYOUTS[layout](tensor_of((4, 3, 2, 5)).to(op_device)).detach().requires_grad_()
    weight, bias = (t.to(op_device).requires_grad_() for t in cases.parameters_of(2, 5))
    after = grid(codes, op_device)
    y = layer_norm(x, weight, bias, EPS, **after)
    assert y.stride() == torch.empty_like(x).stride()
    assert same_bits(y, fake_quantize(layer_norm(x, weight, bias, EPS), *after.values()))
    stored, carrier = layer_norm_codes(x, weight, bias, *after.values(), EPS)
    assert stored.dtype == torch.int8
    assert stored.stride() == y.stride()
    code = stored.int() + (128 if codes[1] == 255 else 0)
    assert same_bits((code - after["zero_point"]) * after["scale"], y)
    assert carrier.shape == x.shape
    assert not carrier.any()
    grad, inputs = tensor_of(x.shape, 3).to(op_device), (x, weight, bias)
    for got, want in zip(torch.autograd.grad(carrier, inputs, grad), torch.autograd.grad(y, inputs, grad), strict=True):
        assert same_bits(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_rounded_once(dtype: torch.dtype, op_device: torch.device) -> None:
    narrow = tensor_of((4, 3, 8)).to(op_device, dtype).requires_grad_()
    wide = narrow.detach().float().requires_grad_()
    given = [t.to(op_device) for t in cases.parameters_of(2, 8)]
    y, exact = (layer_norm(x, *given, **grid(A4, op_device)) for x in (narrow, wide))
    assert same_bits(y, exact.to(dtype))
    grad = tensor_of(y.shape, 3).to(op_device, dtype)
    ours, theirs = torch.autograd.grad(y, narrow, grad)[0], torch.autograd.grad(exact, wide, grad.float())[0]
    assert same_bits(ours, theirs.to(dtype))


@pytest.mark.parametrize("shape", [(0, 3), (0, 2, 3), (2, 0, 3), (1, 1)])
def test_smallest_shapes(shape: tuple[int, ...], op_device: torch.device) -> None:
    x = torch.ones(shape, device=op_device, requires_grad=True)
    for count, index in ((1, None), (2, torch.zeros(shape[0], dtype=torch.int32, device=op_device))):
        weight, bias = (t.to(op_device).requires_grad_() for t in cases.parameters_of(count, shape[-1]))
        y = layer_norm(x, weight, bias, groups=index)
        y.sum().backward()
        assert y.shape == x.shape
        assert same_bits(y.detach(), bias[0].detach().expand(shape).contiguous())
        assert bias.grad[0].tolist() == [float(x.numel() // shape[-1])] * shape[-1]
        assert bias.grad[1:].eq(0).all()


def test_what_is_not_finite(op_device: torch.device) -> None:
    """A row with NaN or Inf is NaN, or the smallest value of the grid; the other rows are not touched."""
    x = tensor_of((3, 4)).to(op_device)
    x[0, 1], x[1, 2] = float("nan"), float("inf")
    alone = layer_norm(x[2:], None, None)
    y = layer_norm(x, None, None)
    assert y[:2].isnan().all()
    assert same_bits(y[2:], alone)
    after = grid(A4, op_device)
    y = layer_norm(x, None, None, **after)
    assert y[:2].eq(-after["zero_point"] * after["scale"]).all()


X, W = torch.zeros(4, 3, 5), torch.zeros(2, 5)
G = grid(A4)
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"x": 1.0}, "x is a float, expected a torch.Tensor"),
    ({"x": torch.zeros(5)}, "x has shape (5,), expected [N, ..., C] with 1 <= C <= 8192"),
    ({"x": torch.zeros(2, 0)}, "x has shape (2, 0), expected [N, ..., C] with 1 <= C <= 8192"),
    ({"x": torch.zeros(1, 8193)}, "x has shape (1, 8193), expected [N, ..., C] with 1 <= C <= 8192"),
    (
        {"x": torch.empty((1 << 30) + 1, 1, device="meta")},
        "x has 1073741825 rows, expected at most 1073741824; split the batch",
    ),
    ({"weight": torch.zeros(3)}, "weight has shape (1, 3), expected (1, 5) = (groups, channels)"),
    ({"bias": torch.zeros(3, 5)}, "bias has shape (3, 5), expected (2, 5) = (groups, channels)"),
    ({"bias": W.half()}, "bias has dtype float16, expected float32"),
    ({"groups": torch.zeros(4)}, "groups has dtype float32, expected int32"),
    ({"groups": torch.zeros(3).int()}, "groups has shape (3,), expected (4,) = (x.shape[0],)"),
    ({"x": torch.zeros(3, 5)}, "x has 3 samples, expected a multiple of 2, the groups of weight and bias"),
    ({"eps": 0.0}, "eps is 0.0, expected a positive number such as 1e-6"),
    ({"scale": torch.ones(5)}, "scale has shape (5,), expected () or (1,) for one scale per tensor"),
    ({"zero_point": torch.zeros((), dtype=torch.int32)}, "zero_point has shape (), expected (1,) like scale"),
    ({"scale": torch.ones(1, requires_grad=True)}, "scale requires a gradient, expected a constant; pass scale.det"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS, ids=[message[:50] for _, message in ERRORS])
def test_errors(change: dict[str, Any], message: str) -> None:
    for function in (layer_norm, layer_norm_codes):
        with pytest.raises(KernelError) as caught:
            function(**{"x": X, "weight": W, "bias": W, **G, **change})
        assert str(caught.value).startswith(f"{function.__name__}: {message}")


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        (layer_norm, {"scale": None}, "scale is None, expected scale and zero_point together, or neither"),
        (layer_norm, {"zero_point": None}, "zero_point is None, expected scale and zero_point together"),
        (layer_norm, {"qmin": 3, "qmax": 3}, "codes go from qmin=3 to qmax=3, expected -65536 <= qmin < qmax <= 65536"),
        (layer_norm_codes, {"scale": None}, "scale is a NoneType, expected a torch.Tensor"),
        (layer_norm_codes, {"qmin": -1, "qmax": 200}, "codes go from qmin=-1 to qmax=200, expected 0 <= qmin"),
    ],
)
def test_errors_of_the_grid(function: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError) as caught:
        function(**{"x": X, "weight": W, "bias": W, **G, **change})
    assert str(caught.value).startswith(f"{function.__name__}: {message}")


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced"])
def test_opcheck(layout: str, op_device: torch.device) -> None:
    ops = torch.ops.ttaq_kernels
    x = LAYOUTS[layout](tensor_of((4, 3, 5))).to(op_device)
    weight, bias = (t.to(op_device) for t in cases.parameters_of(2, 5))
    index, after = cases.index_of(4, 2).to(op_device), tuple(grid(A4, op_device).values())
    inputs = tuple(t.detach().requires_grad_() for t in (x, weight, bias))
    for codes in (False, True):
        torch.library.opcheck(ops.layer_norm.default, (*inputs, index, *after, codes, EPS))
    torch.library.opcheck(ops.layer_norm.default, (x, None, None, None, None, None, 0, 255, False, EPS))
    statistics = ops.layer_norm(x, weight, bias, index, *after, False, EPS)[0]
    arguments = (torch.ones_like(x), x, weight, bias, statistics, index, *after, 2)
    torch.library.opcheck(ops.layer_norm_backward.default, (*arguments, True, True))
    torch.library.opcheck(ops.layer_norm_backward.default, (*arguments, True, False))


def _layer(x: Tensor, weight: Tensor, bias: Tensor, after: dict[str, Any]) -> Tensor:
    codes, carrier = layer_norm_codes(x * 2, weight, bias, *after.values())
    y = (codes - after["zero_point"]) * after["scale"] + carrier
    return layer_norm(y, weight, bias)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool, op_device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 4) if dynamic else (2,):
        results = []
        for function in (_layer, compiled):
            inputs = [t.to(op_device).requires_grad_() for t in (tensor_of((batch, 5, 3)), *cases.parameters_of(2, 3))]
            y = function(*inputs, grid(A4, op_device))
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), inputs)))
        torch.testing.assert_close(*results, rtol=0, atol=0)
