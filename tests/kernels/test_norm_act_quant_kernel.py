"""The kernels of norm_act_quant, bit for bit: against the ops one after the other, and against the CPU path."""

import importlib
from importlib.metadata import version

import batch_norm_oracle as oracle
import pytest
import torch
from fake_quant_oracle import values as special_values
from kernel_layouts import LAYOUTS, layouts_of, same_bits
from packaging.version import Version
from torch import Tensor
from torch.nn import functional

from ttaq_kernels import _batch_norm_launch as launcher
from ttaq_kernels import _channels, fake_quantize
from ttaq_kernels.moments import launch_moments
from ttaq_kernels.pack import to_kernel_order
from ttaq_kernels.reference import norm_act_quant as reference
from ttaq_kernels.reference.norm_act_quant import Epilogue

EPS = 1e-5
ACTIVATIONS = {"identity": lambda z: z, "relu": torch.relu, "relu6": functional.relu6}
A4, A8 = (0, 15), (0, 255)


def epilogue(x: Tensor, act: str = "relu", grid: tuple[int, int] | None = A4, residual: bool = True) -> Epilogue:
    other = oracle.values(x.shape, seed=5).to(x.device, x.dtype) if residual else None
    if grid is None:
        return Epilogue(other, act=act)
    scale = torch.tensor([4 / (grid[1] - grid[0])], device=x.device)
    zero_point = torch.tensor([grid[0] + 3], dtype=torch.int32, device=x.device)
    return Epilogue(other, scale, zero_point, *grid, act)


def added(x: Tensor, statistics: Tensor, given: oracle.Vectors, after: Epilogue) -> Tensor:
    z = oracle.normalised(x, statistics, given)
    return z if after.residual is None else z + after.residual.float()


def finished(z: Tensor, after: Epilogue) -> Tensor:
    a = ACTIVATIONS[after.act](z)
    if after.scale is None or after.zero_point is None:
        return a
    return fake_quantize(a, after.scale, after.zero_point, after.qmin, after.qmax)


def assert_forward(x: Tensor, given: oracle.Vectors, alpha: float, after: Epilogue) -> tuple[Tensor, Tensor]:
    """Values, codes and packed codes from the statistics that the kernel found; z and the statistics."""
    # The interpreter cuts off instead of rounding when it stores bfloat16.
    out_dtype = torch.float32 if x.device.type == "cpu" and x.dtype is torch.bfloat16 else x.dtype
    y, statistics, carrier = launcher.launch_forward(x, *given, None, alpha, EPS, after=after, out_dtype=out_dtype)
    z = added(x, statistics, given, after)
    expected = finished(z, after)
    assert same_bits(y, expected.to(out_dtype))
    assert y.stride() == torch.empty_like(x).stride()
    assert carrier.numel() == 0
    if after.scale is not None:
        codes = (expected / after.scale).round() + after.zero_point
        shift = reference.stored_shift(after.qmax)
        stored, _, carrier = launcher.launch_forward(x, *given, None, alpha, EPS, after=after, output="codes")
        assert stored.dtype == torch.int8
        assert torch.equal(stored.float() + shift, codes)
        assert stored.stride() == torch.empty_like(x).stride()
        assert carrier.shape == x.shape
        assert not carrier.any()
    if after.scale is not None and (after.qmin, after.qmax) == A4:
        packed, repeated, _ = launcher.launch_forward(x, *given, None, alpha, EPS, after=after, output="packed")
        assert same_bits(repeated, statistics)
        rows = codes.movedim(1, -1).reshape(packed.shape[0], x.shape[1]).to(torch.uint8)
        assert torch.equal(packed.cpu(), to_kernel_order(rows.cpu(), 4))
    return z, statistics


def assert_backward(
    grad: Tensor, x: Tensor, given: oracle.Vectors, alpha: float, after: Epilogue, z: Tensor, statistics: Tensor
) -> None:
    out_dtype = torch.float32 if x.device.type == "cpu" and x.dtype is torch.bfloat16 else x.dtype
    leaf = z.detach().requires_grad_()
    (passed,) = torch.autograd.grad(finished(leaf, after), leaf, grad.float())
    if after.act == "relu6":
        # At NaN torch gives 0 or the gradient, depending on where in the tensor it is.
        passed = passed.where(~z.isnan(), 0)
    arguments = (grad, x, *given[:2], statistics, None, alpha)
    for need_residual in (False, True) if after.residual is not None else (False,):
        dx, sums, dresidual = launcher.launch_backward(
            *arguments, True, True, need_residual, after=after, out_dtype=out_dtype
        )
        oracle.assert_sums(sums, passed, x, statistics)
        assert same_bits(dx, oracle.input_gradient(passed, x, given[0], statistics, sums, alpha).to(out_dtype))
        assert dx.stride() == torch.empty_like(x).stride()
        if need_residual:
            assert same_bits(dresidual, passed.to(x.dtype))
    alone = launcher.launch_backward(*arguments, True, False, False, after=after, out_dtype=out_dtype)[0]
    assert same_bits(alone, dx)


def assert_all(x: Tensor, after: Epilogue, alpha: float = 0.3, grad: Tensor | None = None) -> None:
    given = oracle.vectors(x.shape[1], x.device)
    z, statistics = assert_forward(x, given, alpha, after)
    grad = torch.empty_like(x).copy_(oracle.values(x.shape, seed=3)) if grad is None else grad
    assert_backward(grad, x, given, alpha, after, z, statistics)


SHAPES: list[tuple[int, ...]] = [
    (0, 3),
    (2, 0, 2, 2),
    (1, 1),
    (7, 5),
    (1, 3, 1, 1),
    (2, 70, 2, 3),
    (2, 9, 33),
    (19, 3, 3, 3),
]
CASES = [
    pytest.param(shape, layout, id=f"{'x'.join(map(str, shape))}-{layout}")
    for shape in SHAPES
    for layout in layouts_of(len(shape))
]


@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_shapes_and_layouts(shape: tuple[int, ...], layout: str, kernel_device: torch.device) -> None:
    x = LAYOUTS[layout](oracle.values(shape).to(kernel_device))
    assert_all(x, epilogue(x))


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("grid", [None, A4, A8, (-8, 7)])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_what_comes_after(act: str, grid: tuple[int, int] | None, residual: bool, kernel_device: torch.device) -> None:
    x = oracle.values((2, 4, 2, 5)).to(kernel_device)
    assert_all(x, epilogue(x, act, grid, residual), alpha=1.0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("other", ["contiguous", "channels_last", "permuted", "sliced"])
def test_residual_and_gradient_laid_out_unlike_x(layout: str, other: str, kernel_device: torch.device) -> None:
    x = LAYOUTS[layout](oracle.values((2, 3, 5, 4)).to(kernel_device))
    after = epilogue(x)
    grad = LAYOUTS[other](oracle.values(x.shape, seed=3).to(kernel_device))
    assert_all(x, after._replace(residual=LAYOUTS[other](after.residual)), grad=grad)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype: torch.dtype, layout: str, kernel_device: torch.device) -> None:
    x = LAYOUTS[layout](oracle.values((3, 10, 4, 5)).to(kernel_device, dtype))
    assert_all(x, epilogue(x))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_many_tiles(layout: str, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_channels, "_CHANNELS_INSIDE", (256, 32))
    monkeypatch.setattr(_channels, "_POSITIONS_INSIDE", (256, 4))
    monkeypatch.setattr(_channels, "_REDUCING_PROGRAMS", 6)
    x = LAYOUTS[layout](oracle.values((3, 67, 2, 3)).to(kernel_device))
    assert_all(x, epilogue(x))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_ties_and_what_is_not_finite(act: str, kernel_device: torch.device) -> None:
    """With weight and bias 0 the residual is quantized as it is."""
    x = oracle.values((4, 3, 4, 5)).to(kernel_device)
    zero = torch.zeros(3, device=kernel_device)
    given = (zero, zero, *oracle.vectors(3, kernel_device)[2:])
    after = epilogue(x, act)
    values = special_values(x.shape, 4 / 15).to(kernel_device)
    # The interpreter of older versions lets NaN through minimum and maximum, which no GPU does.
    if kernel_device.type == "cpu" and Version(version("triton")) < Version("3.8"):
        values = values.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    grad = oracle.values(x.shape, seed=3).to(kernel_device)
    for grid in (after, Epilogue(act=act)):
        case = grid._replace(residual=values)
        z, statistics = assert_forward(x, given, 0.0, case)
        assert_backward(grad, x, given, 0.0, case, z, statistics)


@pytest.mark.parametrize("output", ["values", "codes", "packed"])
def test_equal_to_the_cpu_path(output: str, kernel_device: torch.device) -> None:
    """At alpha 0 nothing is summed on the way to the result, so every bit agrees."""
    x = oracle.values((2, 70, 2, 3)).to(kernel_device)
    given, after = oracle.vectors(70, kernel_device), epilogue(x, "relu6")
    y, statistics, _ = launcher.launch_forward(x, *given, None, 0.0, EPS, after=after, output=output)
    on_cpu = [None if tensor is None else tensor.cpu() for tensor in (x, *given, None, *after[:3])]
    same, expected, _ = reference.norm_act_quant_forward(*on_cpu, *after[3:], output, 0.0, EPS)
    assert torch.equal(y.cpu(), expected)
    assert same_bits(statistics, same)
    grad = oracle.values(x.shape, seed=3)
    needs = (True, True, True)
    dx, _, dresidual = launcher.launch_backward(
        grad.to(kernel_device), x, *given[:2], statistics, None, 0.0, *needs, after=after
    )
    want_dx, _, want_dresidual = reference.norm_act_quant_backward(
        grad, *on_cpu[:3], same, None, *on_cpu[6:], *after[3:], 0.0, *needs
    )
    assert same_bits(dx, want_dx)
    assert same_bits(dresidual, want_dresidual)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("selected", [(1, 0, 1), (0, 0, 0)])
def test_selected_samples_and_constant_statistics(
    selected: tuple[int, ...], constant: bool, layout: str, kernel_device: torch.device
) -> None:
    """Forward from the moments of the selected samples; backward with them, or without their gradient."""
    x = LAYOUTS[layout](oracle.values((3, 4, 2, 5)).to(kernel_device))
    mask = torch.tensor(selected, device=kernel_device).bool()
    given, after, alpha = oracle.vectors(4, kernel_device), epilogue(x, "relu6"), 0.3
    y, statistics, _ = launcher.launch_forward(x, *given, mask, alpha, EPS, after=after)
    oracle.assert_statistics(statistics, launch_moments(x, mask), given, alpha, EPS)
    z = added(x, statistics, given, after).detach().requires_grad_()
    assert same_bits(y, finished(z, after).detach())
    grad = torch.empty_like(x).copy_(oracle.values(x.shape, seed=3))
    (passed,) = torch.autograd.grad(finished(z, after), z, grad)
    share = 0.0 if constant else alpha
    for need_residual in (False, True):
        arguments = (grad, x, *given[:2], statistics, mask, share, True, True, need_residual)
        dx, sums, dresidual = launcher.launch_backward(*arguments, after=after)
        oracle.assert_sums(sums, passed, x, statistics)
        assert same_bits(dx, oracle.input_gradient(passed, x, given[0], statistics, sums, share, mask))
        if need_residual:
            assert same_bits(dresidual, passed)


@pytest.mark.parametrize(
    ("output", "residual", "forward", "backward"),
    [("values", False, 6, 10), ("codes", False, 5, 10), ("packed", False, 4.5, 10), ("packed", True, 6.5, 14)],
)
def test_bytes_moved(
    output: str, residual: bool, forward: float, backward: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per element of a bfloat16 tensor: every kernel reads or writes each of its tensors once."""
    moved = []

    def count(_who: str, _kernel: object, _programs: int, *arguments: object, **_options: object) -> None:
        stored = [t.untyped_storage().nbytes() for t in arguments if isinstance(t, Tensor)]
        moved.append(sum(size for size in stored if 2 * size >= x.numel()))

    for module in ("_batch_norm_launch", "moments"):
        monkeypatch.setattr(importlib.import_module(f"ttaq_kernels.{module}"), "launch", count)
    x = torch.zeros(4, 128, 16, 16, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    given, after = oracle.vectors(128), epilogue(x, residual=residual)
    launcher.launch_forward(x, *given, None, 1.0, EPS, after=after, output=output)
    assert sum(moved) == forward * x.numel()
    for need_residual in (False, True) if residual else (False,):
        moved.clear()
        arguments = (x, x, *given[:2], torch.ones(5, 128), None, 1.0, True, True, need_residual)
        launcher.launch_backward(*arguments, after=after)
        assert sum(moved) == backward * x.numel()


def test_only_the_residual_needs_a_gradient(kernel_device: torch.device) -> None:
    x = oracle.values((3, 4, 3, 5)).to(kernel_device)
    given, grad = oracle.vectors(4, kernel_device), oracle.values((3, 4, 3, 5), seed=3).to(kernel_device)
    for after in (epilogue(x), epilogue(x, "identity", None)):
        _, statistics, _ = launcher.launch_forward(x, *given, None, 0.0, EPS, after=after)
        arguments = (grad, x, *given[:2], statistics, None, 0.0)
        dx, sums, dresidual = launcher.launch_backward(*arguments, False, False, True, after=after)
        assert dx.numel() == sums.numel() == 0
        expected = launcher.launch_backward(*arguments, True, True, True, after=after)[2]
        assert same_bits(dresidual, expected)
        assert dresidual.data_ptr() != grad.data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 64, 56, 56), (64, 512, 7, 7), (200, 160, 32, 32)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shapes_of_networks(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = oracle.values(shape).cuda().to(dtype, memory_format=torch.channels_last)
    assert_all(x, epilogue(x))


@pytest.mark.gpu
def test_capture_in_a_cuda_graph() -> None:
    x = oracle.values((4, 70, 6, 5)).cuda()
    given, after = oracle.vectors(70, "cuda"), epilogue(x)
    mask = torch.tensor([True, False, True, True], device="cuda")

    def step() -> list[Tensor]:
        codes = [
            launcher.launch_forward(x, *given, mask, 0.3, EPS, after=after, output=output)[0]
            for output in ("codes", "packed")
        ]
        y, statistics, _ = launcher.launch_forward(x, *given, mask, 0.3, EPS, after=after)
        needs = (True, True, True)
        return [*codes, y, *launcher.launch_backward(x, x, *given[:2], statistics, mask, 0.3, *needs, after=after)]

    expected = [tensor.clone() for tensor in step()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(captured, expected, strict=True))
