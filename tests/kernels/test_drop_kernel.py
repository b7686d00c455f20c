"""The kernels of fake_quantize with QDrop against the reference: interpreted, and on a GPU."""

import fake_quant_oracle as oracle
import pytest
import torch
from kernel_layouts import LAYOUTS, layouts_of, same_bits
from kernel_tolerances import FAKE_QUANTIZE_DSCALE
from torch import Tensor

from ttaq_kernels import fake_quant
from ttaq_kernels._philox import Drop
from ttaq_kernels.reference import fake_quant as reference

GRID = oracle.GRIDS["A4"]
SHAPES: list[tuple[int, ...]] = [(), (1,), (63,), (0,), (4, 0, 3), (130, 33), (2, 3, 5, 7), (3, 70, 6, 5)]
CASES = [
    pytest.param(shape, layout, id=f"{'x'.join(map(str, shape)) or 'scalar'}-{layout}")
    for shape in SHAPES
    for layout in layouts_of(len(shape))
]


def make(shape: tuple[int, ...], layout: str, device: torch.device) -> tuple[Tensor, ...]:
    """x without NaN, scale, zero_point, seed."""
    scale, zero_point = oracle.parameters(torch.empty(()), *GRID, None)
    x = oracle.values(shape, scale).nan_to_num(nan=-0.0, posinf=torch.inf, neginf=-torch.inf)
    return LAYOUTS[layout](x.to(device)), scale.to(device), zero_point.to(device), torch.tensor(11, device=device)


def assert_matches(keep: float, x: Tensor, scale: Tensor, zero_point: Tensor, seed: Tensor, interpreted: bool) -> None:
    drop = Drop.of(keep)
    half = interpreted and x.dtype is torch.bfloat16
    out = fake_quant._launch_forward(x, scale, zero_point, *GRID, None, torch.float32 if half else None, drop, seed)
    on_cpu = [tensor.cpu() for tensor in (x, scale, zero_point)]
    given = on_cpu[0].float() if half else on_cpu[0]
    assert same_bits(out, reference.drop(given, *on_cpu[1:], *GRID, keep, seed.cpu()))
    assert out.stride() == torch.empty_like(x).stride()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device, x.dtype)
    dx, dscale = fake_quant._launch_backward(True, grad, x, scale, zero_point, *GRID, None, drop, seed)
    expected_dx, expected_dscale = reference.drop_backward(grad.cpu(), *on_cpu, *GRID, keep, seed.cpu())
    _, _, magnitude = oracle.gradients(grad, *on_cpu, *GRID, None)
    assert same_bits(dx, expected_dx)
    assert dscale is not None
    assert (dscale.cpu() - expected_dscale).abs() <= FAKE_QUANTIZE_DSCALE * magnitude


@pytest.mark.parametrize("keep", [0.5, 0.2])
@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_shapes_and_layouts(shape: tuple[int, ...], layout: str, keep: float, kernel_device: torch.device) -> None:
    assert_matches(keep, *make(shape, layout, kernel_device), interpreted=kernel_device.type == "cpu")


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.004, 0.498, 0.996, 0.999, 1.0])
def test_probabilities(keep: float, kernel_device: torch.device) -> None:
    assert_matches(keep, *make((300,), "contiguous", kernel_device), interpreted=kernel_device.type == "cpu")


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, 2**31, -(2**31)])
@pytest.mark.parametrize("keep", [0.5, 0.2])
def test_seeds(seed: int, keep: float, kernel_device: torch.device) -> None:
    x, scale, zero_point, _ = make((300,), "contiguous", kernel_device)
    given = torch.tensor([seed], device=kernel_device)
    assert_matches(keep, x, scale, zero_point, given, interpreted=kernel_device.type == "cpu")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_bits(bits: int, layout: str, kernel_device: torch.device) -> None:
    """Every width, per tensor with every kind of drop and per channel, on grids with and without negative codes."""
    shape = (2, 3, 5, 7)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for qmin, axis, keep in ((0, None, 0.5), (-(2 ** (bits - 1)), None, 0.0), (0, None, 1.0), (0, 1, 1.0)):
        grid = qmin, qmin + 2**bits - 1
        scale, zero_point = oracle.parameters(torch.empty(shape), *grid, axis)
        x = oracle.values(shape, scale).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        x = LAYOUTS[layout](x)
        on_device = [tensor.to(kernel_device) for tensor in (x, scale, zero_point)]
        drop, seed = Drop.of(keep), torch.tensor(11)
        drawn = None, drop, seed.to(kernel_device)
        out = fake_quant._launch_forward(*on_device, *grid, axis, *drawn)
        dx, dscale = fake_quant._launch_backward(True, grad.to(kernel_device), *on_device, *grid, axis, *drawn[1:])
        assert dscale is not None
        if axis is None:
            expected = reference.drop(x, scale, zero_point, *grid, keep, seed)
            expected_dx, expected_dscale = reference.drop_backward(grad, x, scale, zero_point, *grid, keep, seed)
        else:
            expected = reference.fake_quantize(x, scale, zero_point, *grid, axis)
            expected_dx, expected_dscale = reference.lsq_backward(grad, x, scale, zero_point, *grid, axis)
        assert same_bits(out, expected)
        assert same_bits(dx, expected_dx)
        _, _, magnitude = oracle.gradients(grad, x, scale, zero_point, *grid, axis)
        assert ((dscale.cpu() - expected_dscale).abs() <= FAKE_QUANTIZE_DSCALE * magnitude).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype: torch.dtype, kernel_device: torch.device) -> None:
    x, *rest = make((9, 120), "contiguous", kernel_device)
    assert_matches(0.5, x.to(dtype), *rest, interpreted=kernel_device.type == "cpu")


def test_another_tiling_draws_the_same_bits(monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device) -> None:
    inputs = make((3, 70, 6, 5), "channels_last", kernel_device)
    outs = []
    for tile in (128, 512, 2048):
        monkeypatch.setattr("ttaq_kernels._matrix._TILE", tile)
        outs.append(fake_quant._launch_forward(*inputs[:3], *GRID, None, None, Drop.of(0.5), inputs[3]))
    assert same_bits(outs[0], outs[1])
    assert same_bits(outs[0], outs[2])


@pytest.mark.gpu
def test_capture_in_a_cuda_graph() -> None:
    """A replay draws with the seed that the tensor holds by then."""
    x, scale, zero_point, seed = make((4, 8, 6, 5), "contiguous", torch.device("cuda"))

    def step() -> list[Tensor]:
        out = fake_quant._launch_forward(x, scale, zero_point, *GRID, None, None, Drop.of(0.5), seed)
        dx, dscale = fake_quant._launch_backward(True, x, x, scale, zero_point, *GRID, None, Drop.of(0.5), seed)
        assert dscale is not None
        return [out, dx, dscale]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        seed.add_(1)
        graph.replay()
        assert all(same_bits(*pair) for pair in zip(captured, step(), strict=True))
