"""fake_quantize as users call it: values, gradients, layouts, errors, torch.compile; on the CPU and on a GPU."""

import os
import shutil
from collections.abc import Callable
from typing import Any

import fake_quant_oracle as oracle
import pytest
import torch
from kernel_layouts import LAYOUTS, layouts_of, same_bits
from kernel_tolerances import FAKE_QUANTIZE_DSCALE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ttaq_kernels import KernelError, fake_quantize

F32, BF16, F16, I32 = torch.float32, torch.bfloat16, torch.float16, torch.int32
INF, NAN = float("inf"), float("nan")


def test_worked_by_hand(op_device: torch.device) -> None:
    """Scale 0.5, zero point 1, codes 0 to 3: the grid is -0.5, 0, 0.5, 1."""
    #                 tie -> 0  tie -> 2  tie -> 0                  below  above
    x = torch.tensor([0.25, 0.75, -0.25, 0.6, 1.2, -0.7, 0.0, -0.0, -0.8, 1.3, INF, -INF, NAN], device=op_device)
    expected = [0.0, 1.0, 0.0, 0.5, 1.0, -0.5, 0.0, 0.0, -0.5, 1.0, 1.0, -0.5, -0.5]
    scale = torch.tensor(0.5, device=op_device, requires_grad=True)
    x.requires_grad_()
    out = fake_quantize(x, scale, torch.tensor(1, dtype=I32, device=op_device), 0, 3)
    assert same_bits(out.detach(), torch.tensor(expected))
    out.backward(torch.ones_like(out))
    #                      u:  1  3  1  2  3  0  1  1  -1  4  ...
    assert x.grad.tolist() == [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    # rint(v) - v inside for v = 0.5 1.5 -0.5 1.2 2.4 -1.4 0 -0, then -1 2 2 -1 -1 outside.
    slopes = [-0.5, 0.5, 0.5, -0.2, -0.4, 0.4, 0, 0, -1, 2, 2, -1, -1]
    assert scale.grad.item() == pytest.approx(sum(slopes), abs=1e-6)


@pytest.mark.parametrize("grid", oracle.GRIDS)
def test_equal_to_torch_bit_for_bit(grid: str) -> None:
    qmin, qmax = oracle.GRIDS[grid]
    scale, zero_point = oracle.parameters(torch.empty(()), qmin, qmax, None)
    x = oracle.values((20000,), scale)
    for dtype in (F32, BF16):
        expected = torch.fake_quantize_per_tensor_affine(x.to(dtype), scale, zero_point, qmin, qmax)
        assert same_bits(fake_quantize(x.to(dtype), scale, zero_point, qmin, qmax), expected)


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -4])
def test_channels_are_tensors_of_their_own(axis: int, op_device: torch.device) -> None:
    """Not compared with torch per channel, which on CUDA rounds after adding the zero point and on CPU loses +Inf."""
    scale, zero_point = oracle.parameters(torch.empty(3, 4, 5, 6), -8, 7, axis % 4)
    x = oracle.values((3, 4, 5, 6), scale)
    out = fake_quantize(*(tensor.to(op_device) for tensor in (x, scale, zero_point)), -8, 7, axis)
    for channel, (one, offset) in enumerate(zip(scale, zero_point, strict=True)):
        expected = torch.fake_quantize_per_tensor_affine(x.select(axis, channel), one, offset, -8, 7)
        assert same_bits(out.select(axis, channel).contiguous(), expected.contiguous())


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("layout", layouts_of(4))
@pytest.mark.parametrize("axis", [None, 1])
def test_values_and_gradients_equal_numpy(
    axis: int | None, layout: str, dtype: torch.dtype, op_device: torch.device
) -> None:
    scale, zero_point = oracle.parameters(torch.empty(2, 3, 5, 4), 0, 7, axis)
    x = LAYOUTS[layout](oracle.values((2, 3, 5, 4), scale).to(dtype))
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    given = LAYOUTS[layout](x.to(op_device)).detach().requires_grad_()
    given_scale = scale.to(op_device).requires_grad_()
    out = fake_quantize(given, given_scale, zero_point.to(op_device), 0, 7, axis)
    out.backward(grad.to(op_device))
    assert same_bits(out.detach(), oracle.fake_quantize(x, scale, zero_point, 0, 7, axis))
    assert out.stride() == torch.empty_like(given).stride()
    dx, dscale, magnitude = oracle.gradients(grad, x, scale, zero_point, 0, 7, axis)
    assert same_bits(given.grad, dx)
    assert ((given_scale.grad.cpu() - dscale).abs() <= FAKE_QUANTIZE_DSCALE * magnitude).all()


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_gradients_equal_autograd_of_the_straight_through_form(axis: int | None, op_device: torch.device) -> None:
    """y = (clamp(v + (rint(v) - v).detach() + zero_point) - zero_point) * scale, differentiated by autograd in fp64."""
    draw = torch.Generator().manual_seed(0)
    scale, zero_point = oracle.parameters(torch.empty(6, 50), 0, 15, axis)
    shape = [-1 if dim == axis else 1 for dim in range(2)]
    # Away from ties, where fp64 would round to another code.
    steps = torch.randint(-20, 20, (6, 50), generator=draw) + 0.8 * (torch.rand(6, 50, generator=draw) - 0.5)
    x = (steps * scale.reshape(shape)).to(op_device).requires_grad_()
    grad = torch.randn(6, 50, generator=draw)
    scale = scale.to(op_device).requires_grad_()
    fake_quantize(x, scale, zero_point.to(op_device), 0, 15, axis).backward(grad.to(op_device))

    x64, scale64 = (tensor.detach().cpu().double().requires_grad_() for tensor in (x, scale))
    v, offset = x64 / scale64.reshape(shape), zero_point.reshape(shape)
    code = (v + (v.round() - v).detach() + offset).clamp(0, 15)
    ((code - offset) * scale64.reshape(shape)).backward(grad.double())
    torch.testing.assert_close(x.grad.cpu().double(), x64.grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scale.grad.cpu().double(), scale64.grad, rtol=1e-5, atol=1e-4)


class _Ops(TorchDispatchMode):
    """Records the ops of this package that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ttaq_kernels":
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("of_scale", "backward"), [(False, "ste"), (True, "lsq")])
def test_scale_gradient_is_computed_only_on_demand(of_scale: bool, backward: str) -> None:
    x, scale = torch.randn(4, requires_grad=True), torch.ones(1, requires_grad=of_scale)
    with _Ops() as ops:
        fake_quantize(x, scale, torch.zeros(1, dtype=I32), 0, 3).sum().backward()
    assert ops.names == [
        "ttaq_kernels.fake_quantize.default",
        f"ttaq_kernels.fake_quantize_{backward}_backward.default",
    ]
    assert (scale.grad is None) != of_scale


def test_inputs_and_outputs_share_nothing(op_device: torch.device) -> None:
    x = torch.ones(3, device=op_device)
    before = x.clone()
    fake_quantize(x, torch.ones(1, device=op_device), torch.zeros(1, dtype=I32, device=op_device), 0, 3).add_(5)
    assert torch.equal(x, before)


def _given(**changes: Any) -> dict[str, Any]:
    grid = {"scale": torch.ones(64), "zero_point": torch.zeros(64, dtype=I32), "qmin": 0, "qmax": 15, "axis": 0}
    return {"x": torch.zeros(64, 2), **grid, **changes}


ERRORS: list[tuple[dict[str, Any], str]] = [
    (_given(x=[1.0]), "x is a list, expected a torch.Tensor"),
    (_given(x=torch.zeros(64, 2).double()), "x has dtype float64, expected float32 or bfloat16 or float16"),
    (_given(scale=0.5), "scale is a float, expected a torch.Tensor"),
    (_given(scale=torch.ones(64).half()), "scale has dtype float16, expected float32; convert it with scale.to(...)"),
    (_given(scale=torch.ones(3)), "scale has shape (3,), expected (64,) = x.shape[axis=0]"),
    (_given(scale=torch.ones(64, 1)), "scale has shape (64, 1), expected (64,) = x.shape[axis=0]"),
    (_given(axis=-1), "scale has shape (64,), expected (2,) = x.shape[axis=-1]"),
    (_given(axis=None), "scale has shape (64,), expected () or (1,) for one scale per tensor (axis=None)"),
    (_given(axis=2), "axis is 2, expected -2 <= axis < 2 for x of shape (64, 2)"),
    (_given(axis=-3), "axis is -3, expected -2 <= axis < 2"),
    (_given(x=torch.zeros(())), "axis is 0, expected 0 <= axis < 0 for x of shape (); leave it out"),
    (
        _given(scale=torch.ones(64, device="meta")),
        "scale is on meta, expected cpu like x; move it with scale.to(x.device)",
    ),
    (_given(zero_point=torch.zeros(64)), "zero_point has dtype float32, expected int32"),
    (_given(zero_point=torch.zeros((), dtype=I32)), "zero_point has shape (), expected (64,) like scale"),
    (_given(zero_point=torch.zeros(64, dtype=I32, device="meta")), "zero_point is on meta, expected cpu like x"),
    (_given(qmin=4, qmax=4), "codes go from qmin=4 to qmax=4, expected -65536 <= qmin < qmax <= 65536"),
    (_given(qmax=1 << 20), "codes go from qmin=0 to qmax=1048576, expected"),
    (_given(qmin=-(1 << 20)), "codes go from qmin=-1048576 to qmax=15, expected"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[message[:40] for _, message in ERRORS])
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError) as caught:
        fake_quantize(**arguments)
    assert str(caught.value).startswith(f"fake_quantize: {message}")


@pytest.mark.parametrize("layout", layouts_of(4))
@pytest.mark.parametrize(("axis", "of_scale"), [(None, False), (1, True)])
def test_opcheck(axis: int | None, of_scale: bool, layout: str, op_device: torch.device) -> None:
    x = LAYOUTS[layout](torch.randn(2, 3, 4, 5)).to(op_device).requires_grad_()
    scale, zero_point = oracle.parameters(x, 0, 15, axis)
    scale.requires_grad_(of_scale)
    torch.library.opcheck(torch.ops.ttaq_kernels.fake_quantize.default, (x, scale, zero_point, 0, 15, axis))
    detached = (torch.randn_like(x), x.detach(), scale.detach(), zero_point, 0, 15, axis)
    backward = f"fake_quantize_{'lsq' if of_scale else 'ste'}_backward"
    torch.library.opcheck(getattr(torch.ops.ttaq_kernels, backward).default, detached)


def _double_then_quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return fake_quantize(x * 2, scale, zero_point, 0, 15, axis=-3)


def _value_and_gradients(
    function: Callable[..., Tensor], x: Tensor, scale: Tensor, zero_point: Tensor
) -> tuple[Tensor, ...]:
    inputs = x.detach().requires_grad_(), scale.detach().requires_grad_()
    out = function(*inputs, zero_point)
    return out.detach(), *torch.autograd.grad(out.sum(), inputs)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool, op_device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_double_then_quantize, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3) if dynamic else (2,):
        for layout in layouts_of(4):
            x = LAYOUTS[layout](torch.randn(batch, 3, 4, 5).to(op_device))
            parameters = oracle.parameters(x, 0, 15, 1)
            eager, ours = (_value_and_gradients(f, x, *parameters) for f in (_double_then_quantize, compiled))
            torch.testing.assert_close(ours, eager, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
# The first import of the code generator touches parts of torch that are deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compiles_to_code(op_device: torch.device) -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 3, 4, 5, device=op_device).to(memory_format=torch.channels_last)
    parameters = oracle.parameters(x, 0, 15, 1)
    with torch.no_grad():
        out = torch.compile(_double_then_quantize, fullgraph=True)(x, *parameters)
    assert same_bits(out, _double_then_quantize(x, *parameters))
    assert out.stride() == x.stride()
