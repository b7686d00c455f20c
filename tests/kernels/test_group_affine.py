"""group_affine: values, gradients, errors, torch.compile, and its kernels against the reference."""

import importlib
from typing import Any

import group_cases as cases
import pytest
import torch
from kernel_layouts import LAYOUTS, layouts_of, same_bits
from kernel_tolerances import GROUP_AFFINE_SUMS
from torch import Tensor

from ttaq_kernels import KernelError, group_affine
from ttaq_kernels.reference import group_affine as reference

# The package exports a function of the same name.
module = importlib.import_module("ttaq_kernels.group_affine")
SHAPES = [(4, 3), (6, 5, 7), (6, 3, 4, 5), (2, 70, 3, 3), (4, 130, 9, 9)]
CASES = [
    pytest.param(shape, layout, id=f"{'x'.join(map(str, shape))}-{layout}")
    for shape in SHAPES
    for layout in layouts_of(len(shape))
]


def tensor_of(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_worked_by_hand(op_device: torch.device) -> None:
    """Two groups of two samples and two channels, then the groups of an index."""
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], device=op_device, requires_grad=True)
    weight = torch.tensor([[1.0, 10.0], [2.0, 0.0]], device=op_device, requires_grad=True)
    bias = torch.tensor([[0.5, 0.0], [0.0, -1.0]], device=op_device, requires_grad=True)
    y = group_affine(x, weight, bias)
    assert y.tolist() == [[1.5, 20], [3.5, 40], [10, -1], [14, -1]]
    y.sum().backward()
    assert x.grad.tolist() == [[1, 10], [1, 10], [2, 0], [2, 0]]
    assert weight.grad.tolist() == [[4, 6], [12, 14]]
    assert bias.grad.tolist() == [[2, 2], [2, 2]]
    index = torch.tensor([1, 0, 0, 1], dtype=torch.int32, device=op_device)
    assert group_affine(x, weight, None, index).tolist() == [[2, 0], [3, 40], [5, 60], [14, 0]]


@pytest.mark.parametrize(("shape", "layout"), CASES)
@pytest.mark.parametrize("by_index", [False, True])
@pytest.mark.parametrize("axis", [1, -1])
def test_values_and_gradients_equal_float64(
    axis: int, by_index: bool, shape: tuple[int, ...], layout: str, op_device: torch.device
) -> None:
    x = tensor_of(shape)
    parameters = cases.parameters_of(2, shape[axis])
    index = cases.index_of(len(x), 2) if by_index else None
    grad = tensor_of(shape, 1)
    given = [LAYOUTS[layout](x.to(op_device)).detach().requires_grad_()]
    given += [t.to(op_device).requires_grad_() for t in parameters]
    y = group_affine(*given, None if index is None else index.to(op_device), axis)
    assert y.stride() == torch.empty_like(given[0]).stride()
    y.backward(grad.to(op_device))
    wide = [t.detach().double().requires_grad_() for t in (x, *parameters)]
    expected = cases.group_affine(*wide, index, axis)
    expected.backward(grad.double())
    torch.testing.assert_close(y.detach().cpu().double(), expected.detach(), rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(given, wide, strict=True):
        torch.testing.assert_close(ours.grad.cpu().double(), theirs.grad, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_requires_a_gradient_gets_one(needed: tuple[bool, ...], op_device: torch.device) -> None:
    inputs = [t.to(op_device) for t in (tensor_of((4, 3, 5)), *cases.parameters_of(2, 3))]
    given = [t.clone().requires_grad_(need) for t, need in zip(inputs, needed, strict=True)]
    every = [t.clone().requires_grad_() for t in inputs]
    group_affine(*given).sum().backward()
    group_affine(*every).sum().backward()
    for ours, theirs, need in zip(given, every, needed, strict=True):
        assert torch.equal(ours.grad, theirs.grad) if need else ours.grad is None


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (1, 1)])
def test_smallest_shapes(shape: tuple[int, ...], op_device: torch.device) -> None:
    x = torch.ones(shape, device=op_device, requires_grad=True)
    groups = torch.zeros(shape[0], dtype=torch.int32, device=op_device)
    for index, count in ((None, 1), (groups, 2)):
        weight, bias = (t.to(op_device).requires_grad_() for t in cases.parameters_of(count, shape[1]))
        y = group_affine(x, weight, bias, index)
        y.sum().backward()
        assert y.shape == x.shape
        assert bias.grad[0].tolist() == [float(x.numel() // shape[1])] * shape[1]
        assert bias.grad[1:].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype: torch.dtype, op_device: torch.device) -> None:
    x = tensor_of((4, 3, 5)).to(op_device, dtype)
    parameters = [t.to(op_device) for t in cases.parameters_of(2, 3)]
    assert same_bits(group_affine(x, *parameters), group_affine(x.float(), *parameters).to(dtype))


X, W = torch.zeros(4, 3, 2), torch.zeros(2, 3)
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"x": 1.0}, "x is a float, expected a torch.Tensor"),
    ({"x": torch.zeros(4)}, "x has shape (4,), expected [N, C] or [N, C, ...]"),
    ({"axis": 0}, "axis is 0, expected 1 for [N, C, ...] or -1 for [N, ..., C]"),
    ({"weight": None}, "weight is a NoneType, expected a torch.Tensor"),
    ({"weight": W.half()}, "weight has dtype float16, expected float32"),
    ({"weight": torch.zeros(3)}, "weight has shape (3,), expected (2, 3) = (groups, channels)"),
    ({"weight": torch.zeros(2, 2)}, "weight has shape (2, 2), expected (2, 3) = (groups, channels)"),
    ({"bias": torch.zeros(3, 3)}, "bias has shape (3, 3), expected (2, 3) = (groups, channels)"),
    ({"bias": W.to("meta")}, "bias is on meta, expected cpu like x"),
    ({"groups": torch.zeros(4)}, "groups has dtype float32, expected int32"),
    ({"groups": torch.zeros(2).int()}, "groups has shape (2,), expected (4,) = (x.shape[0],)"),
    ({"x": torch.zeros(3, 3)}, "x has 3 samples, expected a multiple of 2, the groups of weight and bias; give the"),
    ({"weight": torch.zeros(0, 3), "bias": None}, "x has 4 samples, expected a multiple of 0"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS, ids=[message[:50] for _, message in ERRORS])
def test_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError) as caught:
        group_affine(**{"x": X, "weight": W, "bias": W, **change})
    assert str(caught.value).startswith(f"group_affine: {message}")


@pytest.mark.parametrize("layout", layouts_of(4))
def test_opcheck(layout: str, op_device: torch.device) -> None:
    ops = torch.ops.ttaq_kernels
    x = LAYOUTS[layout](tensor_of((4, 3, 2, 5))).to(op_device)
    weight, bias = (t.to(op_device) for t in cases.parameters_of(2, 3))
    index = cases.index_of(4, 2).to(op_device)
    inputs = tuple(t.detach().requires_grad_() for t in (x, weight, bias))
    torch.library.opcheck(ops.group_affine.default, (*inputs, index))
    torch.library.opcheck(ops.group_affine_backward.default, (torch.ones_like(x), x, weight, None, True, True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool, op_device: torch.device) -> None:
    torch._dynamo.reset()

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_affine(x * 2, weight, bias, axis=-1).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 4) if dynamic else (2,):
        results = []
        for function in (loss, compiled):
            inputs = [tensor_of((batch, 5, 3)), *cases.parameters_of(2, 3)]
            inputs = [t.to(op_device).requires_grad_() for t in inputs]
            value = function(*inputs)
            results.append((value.detach(), *torch.autograd.grad(value, inputs)))
        torch.testing.assert_close(*results, rtol=0, atol=0)


def assert_matches(
    x: Tensor, parameters: tuple[Tensor, ...], index: Tensor | None, out_dtype: torch.dtype | None = None
) -> None:
    weight, bias = parameters
    on_cpu = x.cpu() if out_dtype is None else x.cpu().to(out_dtype)
    cpu_index = None if index is None else index.cpu()
    y = module._launch_forward(x, weight, bias, index, out_dtype)
    assert same_bits(y, reference.group_affine(on_cpu, weight.cpu(), bias.cpu(), cpu_index))
    assert y.stride() == torch.empty_like(x).stride()
    without = module._launch_forward(x, weight, None, index, out_dtype)
    assert same_bits(without, reference.group_affine(on_cpu, weight.cpu(), None, cpu_index))
    grad = tensor_of(tuple(x.shape), 1).to(x.device, x.dtype)
    dx, sums = module._launch_backward(grad, x, weight, index, True, True, out_dtype)
    cpu_grad = grad.cpu() if out_dtype is None else grad.cpu().to(out_dtype)
    expected_dx, expected = reference.group_affine_backward(cpu_grad, on_cpu, weight.cpu(), cpu_index, True, True)
    assert same_bits(dx, expected_dx)
    assert dx.stride() == torch.empty_like(x).stride()
    _, magnitude = reference.group_affine_backward(cpu_grad.abs(), on_cpu.abs(), weight.cpu(), cpu_index, False, True)
    assert ((sums.cpu() - expected).abs() <= GROUP_AFFINE_SUMS * magnitude).all()
    assert same_bits(module._launch_backward(grad, x, weight, index, False, True)[1], sums)
    assert same_bits(module._launch_backward(grad, x, weight, index, True, False, out_dtype)[0], dx)


@pytest.mark.parametrize(("shape", "layout"), [*CASES, ((0, 3, 2, 2), "contiguous"), ((2, 3, 0), "contiguous")])
@pytest.mark.parametrize("by_index", [False, True])
def test_kernels(shape: tuple[int, ...], layout: str, by_index: bool, kernel_device: torch.device) -> None:
    parameters = tuple(t.to(kernel_device) for t in cases.parameters_of(2, shape[1]))
    index = cases.index_of(shape[0], 2).to(kernel_device) if by_index else None
    assert_matches(LAYOUTS[layout](tensor_of(shape).to(kernel_device)), parameters, index)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_in_half_types(dtype: torch.dtype, kernel_device: torch.device) -> None:
    # The interpreter cuts off instead of rounding when it stores bfloat16, so there only the load is tested.
    interpreted = kernel_device.type == "cpu" and dtype is torch.bfloat16
    parameters = tuple(t.to(kernel_device) for t in cases.parameters_of(2, 3))
    x = tensor_of((4, 3, 5, 5)).to(kernel_device, dtype)
    assert_matches(x, parameters, None, torch.float32 if interpreted else None)


@pytest.mark.gpu
def test_capture_in_a_cuda_graph() -> None:
    x, weight, bias = tensor_of((4, 64, 6, 6)).cuda(), *(t.cuda() for t in cases.parameters_of(2, 64))

    def step() -> list[Tensor]:
        return [module._launch_forward(x, weight, bias, None), *module._launch_backward(x, x, weight, None, True, True)]

    expected = [tensor.clone() for tensor in step()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(same_bits(*pair) for pair in zip(captured, expected, strict=True))
