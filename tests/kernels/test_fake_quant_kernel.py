"""The kernels of fake_quantize against the reference: interpreted, and on a GPU."""

from importlib.metadata import version

import fake_quant_oracle as oracle
import pytest
import torch
from kernel_layouts import LAYOUTS, layouts_of, same_bits
from kernel_tolerances import FAKE_QUANTIZE_DSCALE
from packaging.version import Version
from torch import Tensor

from ttaq_kernels import fake_quant
from ttaq_kernels.reference import fake_quant as reference

# Shapes from nothing to several tiles, with axes of stride one, in the middle and outermost.
SHAPES_AND_AXES: list[tuple[tuple[int, ...], tuple[int | None, ...]]] = [
    ((), (None,)),
    ((1,), (None, 0)),
    ((63,), (None, 0)),
    ((0,), (None, 0)),
    ((4, 0, 3), (None, 0, 1)),
    ((5000,), (None,)),
    ((3, 2100), (None, 0, 1)),
    ((130, 33), (0, 1)),
    ((2, 1, 5), (1,)),
    ((2, 3, 5, 7), (None, 0, 1, 3)),
    ((3, 70, 6, 5), (0, 1)),
]
CASES = [
    pytest.param(shape, axis, layout, id=f"{'x'.join(map(str, shape)) or 'scalar'}-axis_{axis}-{layout}")
    for shape, axes in SHAPES_AND_AXES
    for axis in axes
    for layout in layouts_of(len(shape))
]
GRID = oracle.GRIDS["A4"]


def special_values(shape: tuple[int, ...], scale: Tensor, device: torch.device) -> Tensor:
    x = oracle.values(shape, scale if scale.numel() else 1.0).to(device)
    # The interpreter of older versions lets NaN through minimum and maximum, which no GPU does.
    nan_as_on_gpu = device.type == "cuda" or Version(version("triton")) >= Version("3.8")
    return x if nan_as_on_gpu else x.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


def make(shape: tuple[int, ...], axis: int | None, layout: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    scale, zero_point = oracle.parameters(torch.empty(shape), *GRID, axis)
    x = LAYOUTS[layout](special_values(shape, scale, device))
    return x, scale.to(device), zero_point.to(device)


def assert_backward_matches(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> None:
    """dx of both kernels and dscale, all against the reference run on the CPU."""
    on_cpu = [tensor.cpu() for tensor in (grad, x, scale, zero_point)]
    dx, dscale = fake_quant._launch_backward(True, grad, x, scale, zero_point, *GRID, axis)
    ste, nothing = fake_quant._launch_backward(False, grad, x, scale, zero_point, *GRID, axis)
    expected_dx, expected_dscale = reference.lsq_backward(*on_cpu, *GRID, axis)
    _, _, magnitude = oracle.gradients(*on_cpu, *GRID, axis)
    assert nothing is None
    assert same_bits(dx, expected_dx)
    assert same_bits(ste, expected_dx)
    assert dx.stride() == torch.empty_like(x).stride()
    assert dscale is not None
    assert dscale.shape == scale.shape
    assert ((dscale.cpu() - expected_dscale).abs() <= FAKE_QUANTIZE_DSCALE * magnitude).all()


@pytest.mark.parametrize(("shape", "axis", "layout"), CASES)
def test_forward(shape: tuple[int, ...], axis: int | None, layout: str, kernel_device: torch.device) -> None:
    x, scale, zero_point = make(shape, axis, layout, kernel_device)
    out = fake_quant._launch_forward(x, scale, zero_point, *GRID, axis)
    assert same_bits(out, reference.fake_quantize(x.cpu(), scale.cpu(), zero_point.cpu(), *GRID, axis))
    assert out.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize(("shape", "axis", "layout"), CASES)
def test_backward(shape: tuple[int, ...], axis: int | None, layout: str, kernel_device: torch.device) -> None:
    x, scale, zero_point = make(shape, axis, layout, kernel_device)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(kernel_device)
    assert_backward_matches(grad, x, scale, zero_point, axis)


@pytest.mark.parametrize("grad_layout", ["expanded", "channels_last", "permuted", "sliced"])
def test_gradient_laid_out_unlike_x(grad_layout: str, kernel_device: torch.device) -> None:
    x, scale, zero_point = make((2, 3, 5, 7), 1, "contiguous", kernel_device)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(kernel_device)
    grad = grad[:, :, :1, :1].expand(x.shape) if grad_layout == "expanded" else LAYOUTS[grad_layout](grad)
    assert_backward_matches(grad, x, scale, zero_point, 1)


@pytest.mark.parametrize("grid", oracle.GRIDS)
@pytest.mark.parametrize("axis", [None, 1])
def test_grids(grid: str, axis: int | None, kernel_device: torch.device) -> None:
    qmin, qmax = oracle.GRIDS[grid]
    scale, zero_point = oracle.parameters(torch.empty(40, 30), qmin, qmax, axis)
    x = special_values((40, 30), scale, kernel_device).cpu()
    out = fake_quant._launch_forward(*(t.to(kernel_device) for t in (x, scale, zero_point)), qmin, qmax, axis)
    assert same_bits(out, reference.fake_quantize(x, scale, zero_point, qmin, qmax, axis))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_half_types(dtype: torch.dtype, axis: int | None, kernel_device: torch.device) -> None:
    x, scale, zero_point = make((9, 120), axis, "contiguous", kernel_device)
    x = x.to(dtype)
    # The interpreter cuts off instead of rounding when it stores bfloat16, so there only the load is tested.
    interpreted = kernel_device.type == "cpu" and dtype is torch.bfloat16
    out = fake_quant._launch_forward(x, scale, zero_point, *GRID, axis, torch.float32 if interpreted else None)
    expected = reference.fake_quantize(
        (x.float() if interpreted else x).cpu(), scale.cpu(), zero_point.cpu(), *GRID, axis
    )
    assert same_bits(out, expected)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(kernel_device, dtype)
    assert_backward_matches(grad, x, scale, zero_point, axis)


def test_parameters_with_gaps(kernel_device: torch.device) -> None:
    x, scale, zero_point = make((6, 10), 0, "contiguous", kernel_device)
    spread = [torch.stack([tensor, tensor + 1], 1)[:, 0] for tensor in (scale, zero_point)]
    out = fake_quant._launch_forward(x, *spread, *GRID, 0)
    assert same_bits(out, reference.fake_quantize(x.cpu(), scale.cpu(), zero_point.cpu(), *GRID, 0))


def test_scale_gradient_is_repeatable(kernel_device: torch.device) -> None:
    images = 64 if kernel_device.type == "cuda" else 2
    x, scale, zero_point = make((images, 70, 4, 4), 1, "channels_last", kernel_device)
    grad = torch.randn_like(x)
    first, second = (fake_quant._launch_backward(True, grad, x, scale, zero_point, *GRID, 1)[1] for _ in range(2))
    assert first is not None
    assert second is not None
    assert same_bits(first, second)


@pytest.mark.gpu
def test_capture_in_a_cuda_graph() -> None:
    x, scale, zero_point = make((4, 8, 6, 5), 1, "contiguous", torch.device("cuda"))
    grad = torch.randn_like(x)

    def step() -> tuple[Tensor, Tensor, Tensor | None]:
        out = fake_quant._launch_forward(x, scale, zero_point, *GRID, 1)
        return out, *fake_quant._launch_backward(True, grad, x, scale, zero_point, *GRID, 1)

    expected = [tensor.clone() for tensor in step() if tensor is not None]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(same_bits(*pair) for pair in zip(captured, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("axis", [None, 1])
def test_more_than_2_to_31_elements(axis: int | None) -> None:
    rows = 2**25 + 3
    if torch.cuda.mem_get_info()[0] < 6 * 64 * rows:
        pytest.skip("needs 13 GB of free GPU memory")
    x = torch.zeros(rows, 64, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.linspace(-1, 4, 64)
    scale, zero_point = oracle.parameters(x, *GRID, axis)
    out = fake_quant._launch_forward(x, scale, zero_point, *GRID, axis)
    expected = reference.fake_quantize(x[-1:].cpu(), scale.cpu(), zero_point.cpu(), *GRID, axis)
    assert same_bits(out[-1:], expected)
