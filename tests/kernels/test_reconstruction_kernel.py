"""The kernels of reconstruction_loss and gather_mix against the reference: interpreted, and on a GPU."""

import fake_quant_oracle as oracle
import pytest
import torch
from kernel_layouts import LAYOUTS, layouts_of, same_bits
from kernel_tolerances import RECONSTRUCTION
from torch import Tensor

from ttaq_kernels.reference import gather_mix as gather_mix_reference
from ttaq_kernels.reference import reconstruction as reference

# The package exports functions of the same names.
reconstruction = __import__("ttaq_kernels.reconstruction", fromlist=["_launch"])
gather_mix = __import__("ttaq_kernels.gather_mix", fromlist=["_launch"])

GRID = oracle.GRIDS["A4"]
SHAPES: list[tuple[int, ...]] = [(1, 1), (5, 3), (70, 33), (2, 3, 5), (1, 1, 1, 1), (2, 3, 5, 7), (3, 70, 6, 5)]
CASES = [
    pytest.param(shape, layout, id=f"{'x'.join(map(str, shape))}-{layout}")
    for shape in SHAPES
    for layout in layouts_of(len(shape))
]


def make(shape: tuple[int, ...], layout: str) -> tuple[Tensor, ...]:
    """h, target, residual, scale, zero_point, on the CPU."""
    scale, zero_point = oracle.parameters(torch.empty(()), *GRID, None)
    h = oracle.values(shape, scale).nan_to_num(nan=0.0, posinf=9.0, neginf=-9.0).clamp(-1e3, 1e3)
    draw = torch.Generator().manual_seed(1)
    target, residual = torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
    return LAYOUTS[layout](h), target, residual, scale, zero_point


def assert_matches(
    inputs: tuple[Tensor, ...], keep: float, residual: bool, quantizer: bool, device: torch.device
) -> None:
    h, target, shortcut, scale, zero_point = inputs
    seed = torch.tensor(7) if keep < 1 else None
    given = [h, target, shortcut if residual else None, *((scale, zero_point) if quantizer else (None, None))]
    rest = (*GRID, residual, keep if quantizer else 1.0)
    seed = seed if quantizer else None
    half = device.type == "cpu" and h.dtype is torch.bfloat16
    on_device = [None if tensor is None else tensor.to(device) for tensor in given]
    out_dtype = torch.float32 if half else None
    loss, dh, dscale = reconstruction._launch(*on_device, *rest, None if seed is None else seed.to(device), out_dtype)
    expected_loss, expected_dh, expected_dscale = reference.loss_and_gradients(*given, *rest, seed)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=RECONSTRUCTION)
    assert dh.stride() == torch.empty_like(h).stride()
    if half:
        torch.testing.assert_close(dh.cpu(), expected_dh.float(), rtol=2**-8, atol=1e-30)
    else:
        assert torch.equal(dh.cpu(), expected_dh)
    assert dscale.shape == expected_dscale.shape
    slope = expected_dh.double().abs().sum() + expected_dscale.abs() + 1
    assert (dscale.cpu() - expected_dscale).abs() <= RECONSTRUCTION * GRID[1] * slope


@pytest.mark.parametrize("quantizer", [True, False])
@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_shapes_and_layouts(shape: tuple[int, ...], layout: str, quantizer: bool, kernel_device: torch.device) -> None:
    assert_matches(make(shape, layout), 0.5, True, quantizer, kernel_device)


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.2])
@pytest.mark.parametrize("residual", [True, False])
def test_options(residual: bool, keep: float, kernel_device: torch.device) -> None:
    assert_matches(make((2, 3, 5, 7), "channels_last"), keep, residual, True, kernel_device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype: torch.dtype, kernel_device: torch.device) -> None:
    h, target, residual, *grid = make((4, 40), "contiguous")
    assert_matches((h.to(dtype), target.to(dtype), residual.to(dtype), *grid), 0.5, True, True, kernel_device)


def test_where_the_error_is_zero(kernel_device: torch.device) -> None:
    target = make((4, 40), "contiguous")[1]
    given = (tensor.to(kernel_device) for tensor in (target, target))
    loss, dh, _ = reconstruction._launch(*given, None, None, None, 0, 0, False, 1.0, None)
    assert loss.item() == 0
    assert dh.count_nonzero() == 0


def test_repeatable(kernel_device: torch.device) -> None:
    h, target, residual, *grid = (tensor.to(kernel_device) for tensor in make((3, 70, 6, 5), "channels_last"))
    seed = torch.tensor(7, device=kernel_device)
    first, second = (reconstruction._launch(h, target, residual, *grid, *GRID, True, 0.5, seed) for _ in range(2))
    assert all(same_bits(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.2])
@pytest.mark.parametrize("codes", [True, False])
@pytest.mark.parametrize("shape", [(3,), (4, 5), (3, 0), (7, 2100), (5, 3, 5, 7)], ids=str)
def test_gather_mix(shape: tuple[int, ...], codes: bool, keep: float, kernel_device: torch.device) -> None:
    draw = torch.Generator().manual_seed(0)
    scale, zero_point = torch.tensor(0.37), torch.tensor(100, dtype=torch.int32)
    for layout in ("contiguous", "channels_last") if len(shape) == 4 else ("contiguous",):
        floating, quantized = (LAYOUTS[layout](torch.randn(shape, generator=draw)) for _ in range(2))
        grid = (scale, zero_point) if codes else (None, None)
        if codes:
            quantized = LAYOUTS[layout](torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8))
        for index in (torch.randint(0, shape[0], (5,), generator=draw), torch.zeros(0, dtype=torch.int64)):
            given = (quantized, floating, index, keep, torch.tensor(7), *grid)
            on_device = [tensor.to(kernel_device) if isinstance(tensor, Tensor) else tensor for tensor in given]
            out, expected = gather_mix._launch(*on_device), gather_mix_reference.gather_mix(*given)
            assert same_bits(out, expected)
            assert out.stride() == expected.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gather_mix_of_half_types(dtype: torch.dtype, kernel_device: torch.device) -> None:
    floating, quantized = torch.randn(2, 4, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    index, seed = torch.tensor([3, 0, 3]), torch.tensor(7)
    on_device = [tensor.to(kernel_device) for tensor in (quantized, floating, index, seed)]
    # The interpreter cuts off instead of rounding when it stores bfloat16, so there it stores float32.
    out = gather_mix._launch(*on_device[:3], 0.5, on_device[3], None, None, torch.float32)
    expected = gather_mix_reference.gather_mix(quantized, floating, index, 0.5, seed, None, None)
    assert same_bits(out, expected.float())


@pytest.mark.gpu
def test_capture_in_a_cuda_graph() -> None:
    """A replay draws with the seed, and takes the rows, that the tensors hold by then."""
    h, target, residual, *grid = (tensor.cuda() for tensor in make((3, 70, 6, 5), "channels_last"))
    seed, index = torch.tensor(7).cuda(), torch.tensor([0, 1, 2]).cuda()

    def step() -> tuple[Tensor, ...]:
        mixed = gather_mix._launch(
            h, target.contiguous(memory_format=torch.channels_last), index, 0.5, seed, None, None
        )
        return mixed, *reconstruction._launch(mixed, target, residual, *grid, *GRID, True, 0.5, seed)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        seed.add_(1)
        index.copy_(index.roll(1))
        graph.replay()
        assert all(same_bits(*pair) for pair in zip(captured, step(), strict=True))
