"""The kernels of batch_norm against float64 and, element by element, against the reference's arithmetic."""

import importlib

import batch_norm_oracle as oracle
import pytest
import torch
from kernel_layouts import LAYOUTS, layouts_of, same_bits
from torch import Tensor

from ttaq_kernels import _batch_norm_launch as launcher
from ttaq_kernels import _channels

# The package exports functions of the same names.
moments = importlib.import_module("ttaq_kernels.moments")

EPS = 1e-5
SHAPES: list[tuple[int, ...]] = [
    (0, 3),
    (0, 3, 2, 2),
    (2, 0, 2, 2),
    (2, 3, 0, 2),
    (1, 1),
    (1, 3, 1, 1),
    (7, 5),
    (65, 70),
    (5, 3, 1, 1),
    (1, 3, 5, 7),
    (2, 3, 5, 7),
    (3, 70, 4, 5),
    (19, 3, 3, 3),
    (2, 9, 33),
    (2, 3, 2, 3, 4),
]
CASES = [
    pytest.param(shape, layout, id=f"{'x'.join(map(str, shape))}-{layout}")
    for shape in SHAPES
    for layout in layouts_of(len(shape))
]


def launch_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    alpha: float,
    needs: tuple[bool, bool] = (True, True),
    mask: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return launcher.launch_backward(
        grad, x, weight, None, statistics, mask, alpha, *needs, False, out_dtype=out_dtype
    )  # fmt: skip


def assert_all_matches(
    x: Tensor, grad: Tensor, given: oracle.Vectors, alpha: float, mask: Tensor | None = None
) -> None:
    """Moments, statistics, y, sums and dx, each from what the kernel before it gave."""
    # The interpreter cuts off instead of rounding when it stores bfloat16, so there only the load is tested.
    out_dtype = torch.float32 if x.device.type == "cpu" and x.dtype is torch.bfloat16 else x.dtype
    channel_moments = moments.launch_moments(x, mask)
    oracle.assert_moments(channel_moments, x, mask)
    y, statistics, _ = launcher.launch_forward(x, *given, mask, alpha, EPS, out_dtype=out_dtype)
    oracle.assert_statistics(statistics, channel_moments, given, alpha, EPS)
    assert same_bits(y, oracle.normalised(x, statistics, given).to(out_dtype))
    assert y.stride() == torch.empty_like(x).stride()
    dx, sums, _ = launch_backward(grad, x, given[0], statistics, alpha, mask=mask, out_dtype=out_dtype)
    oracle.assert_sums(sums, grad, x, statistics)
    assert same_bits(dx, oracle.input_gradient(grad, x, given[0], statistics, sums, alpha, mask).to(out_dtype))
    assert dx.stride() == torch.empty_like(x).stride()


def mask_of(samples: int, selected: str) -> Tensor:
    index = torch.arange(samples)
    return {"none": index < 0, "one": index == samples - 1, "some": index % 3 != 1, "all": index >= 0}[selected]


def gradient_of(x: Tensor, seed: int = 2) -> Tensor:
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return torch.empty_like(x).copy_(grad)


@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_shapes_and_layouts(shape: tuple[int, ...], layout: str, kernel_device: torch.device) -> None:
    x = LAYOUTS[layout](oracle.values(shape).to(kernel_device))
    assert_all_matches(x, gradient_of(x), oracle.vectors(shape[1], kernel_device), 0.3)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.01, 1.0])
def test_shares_of_the_batch(alpha: float, affine: bool, kernel_device: torch.device) -> None:
    x = oracle.values((3, 4, 5, 5)).to(kernel_device)
    assert_all_matches(x, gradient_of(x), oracle.vectors(4, kernel_device, affine), alpha)


@pytest.mark.parametrize("selected", ["none", "one", "some", "all"])
@pytest.mark.parametrize("shape", [(7, 5), (5, 3, 1, 1), (1, 3, 5, 7), (5, 3, 4, 5), (4, 1, 33), (0, 3)])
def test_selected_samples(shape: tuple[int, ...], selected: str, kernel_device: torch.device) -> None:
    mask = mask_of(shape[0], selected).to(kernel_device)
    for layout in layouts_of(len(shape)):
        x = LAYOUTS[layout](oracle.values(shape).to(kernel_device))
        for alpha in (0.3, 1.0):
            assert_all_matches(x, gradient_of(x), oracle.vectors(shape[1], kernel_device), alpha, mask)


def test_all_selected_is_no_mask(kernel_device: torch.device) -> None:
    x = oracle.values((3, 4, 5, 5)).to(kernel_device)
    given = oracle.vectors(4, kernel_device)
    results = []
    for mask in (None, mask_of(3, "all").to(kernel_device)):
        y, statistics, _ = launcher.launch_forward(x, *given, mask, 0.3, EPS)
        results.append((y, statistics, *launch_backward(gradient_of(x), x, given[0], statistics, 0.3, mask=mask)))
    assert all(same_bits(*pair) for pair in zip(*results, strict=True))


def test_samples_not_selected_are_not_read(kernel_device: torch.device) -> None:
    x = oracle.values((3, 4, 5, 5)).to(kernel_device)
    mask = torch.tensor([True, False, True, False, True], device=kernel_device)[:3]
    expected = moments.launch_moments(x, mask)
    x[1] = torch.nan
    assert same_bits(moments.launch_moments(x, mask), expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_many_chunks_and_parts(layout: str, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that each program walks over several chunks, the last of them partial or missing."""
    monkeypatch.setattr(_channels, "_CHANNELS_INSIDE", (64, 4))
    monkeypatch.setattr(_channels, "_POSITIONS_INSIDE", (64, 16))
    monkeypatch.setattr(_channels, "_REDUCING_PROGRAMS", 12)
    x = LAYOUTS[layout](oracle.values((5, 11, 7, 5)).to(kernel_device))
    tiles = _channels.Tiles.of(x)
    chunks, per_part, parts = tiles.reducing()
    assert tiles.columns > 1
    assert per_part > 1
    assert parts > 1
    assert chunks % per_part
    for mask in (None, mask_of(5, "one").to(kernel_device)):
        assert_all_matches(x, gradient_of(x), oracle.vectors(11, kernel_device), 0.3, mask)


@pytest.mark.parametrize("grad_layout", ["expanded", "contiguous", "channels_last", "permuted", "sliced"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_gradient_laid_out_unlike_x(layout: str, grad_layout: str, kernel_device: torch.device) -> None:
    x = LAYOUTS[layout](oracle.values((2, 3, 5, 7)).to(kernel_device))
    grad = oracle.values((2, 3, 5, 7), seed=2).to(kernel_device)
    grad = grad[:, :, :1, :1].expand(x.shape) if grad_layout == "expanded" else LAYOUTS[grad_layout](grad)
    assert_all_matches(x, grad, oracle.vectors(3, kernel_device), 0.3)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_slice_of_channels(layout: str, kernel_device: torch.device) -> None:
    """Read in place: the positions stay evenly spaced."""
    x = LAYOUTS[layout](oracle.values((2, 9, 4, 5)).to(kernel_device))[:, 2:6]
    assert_all_matches(x, gradient_of(x), oracle.vectors(4, kernel_device), 0.3)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype: torch.dtype, layout: str, kernel_device: torch.device) -> None:
    x = LAYOUTS[layout](oracle.values((3, 10, 4, 5)).to(kernel_device, dtype))
    assert_all_matches(x, gradient_of(x), oracle.vectors(10, kernel_device), 0.3)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_far_from_zero(layout: str, kernel_device: torch.device) -> None:
    """Mean 1000, standard deviation 1: E[x^2] - E[x]^2 would have no correct digit."""
    x = LAYOUTS[layout](torch.randn(8, 5, 20, 20, generator=torch.Generator().manual_seed(0)).to(kernel_device) + 1000)
    oracle.assert_moments(moments.launch_moments(x, None), x)


def test_constant_and_single_elements_have_no_variance(kernel_device: torch.device) -> None:
    assert moments.launch_moments(torch.full((4, 3, 4, 4), -7.0, device=kernel_device), None)[1].tolist() == [0, 0, 0]
    x = torch.tensor([[3.0, -1e4, 0.1]], device=kernel_device)
    assert torch.equal(moments.launch_moments(x, None)[:2], torch.stack((x[0], torch.zeros_like(x[0]))))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_channel(value: float, kernel_device: torch.device) -> None:
    x = oracle.values((2, 3, 4, 4)).to(kernel_device)
    x[1, 1, 2, 3] = value
    y, statistics, _ = launcher.launch_forward(x, *oracle.vectors(3, kernel_device), None, 1.0, EPS)
    assert statistics[:, [0, 2]].isfinite().all()
    assert y[:, [0, 2]].isfinite().all()
    assert y[:, 1].isnan().all()


@pytest.mark.parametrize(("need_x", "need_affine"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_only_the_gradients_asked_for(
    alpha: float, need_x: bool, need_affine: bool, kernel_device: torch.device
) -> None:
    x = oracle.values((3, 4, 5, 5)).to(kernel_device)
    given = oracle.vectors(4, kernel_device)
    _, statistics, _ = launcher.launch_forward(x, *given, None, alpha, EPS)
    dx, sums, _ = launch_backward(gradient_of(x), x, given[0], statistics, alpha)
    one, other, _ = launch_backward(gradient_of(x), x, given[0], statistics, alpha, (need_x, need_affine))
    assert same_bits(one, dx) if need_x else one.numel() == 0
    assert same_bits(other, sums) if need_affine else other.numel() == 0


def test_parameters_with_gaps(kernel_device: torch.device) -> None:
    x = oracle.values((3, 4, 5, 5)).to(kernel_device)
    given = oracle.vectors(4, kernel_device)
    spread = [torch.stack([vector, vector + 1], 1)[:, 0] for vector in given if vector is not None]
    first, second = (launcher.launch_forward(x, *vectors, None, 0.3, EPS)[0] for vectors in (spread, given))
    assert same_bits(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(64, 64, 56, 56), (64, 512, 7, 7), (200, 160, 32, 32), (64, 2048, 7, 7), (4096, 768)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shapes_of_networks(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    if layout not in layouts_of(len(shape)):
        pytest.skip("a matrix has no channels_last layout")
    x = LAYOUTS[layout](oracle.values(shape).cuda().to(dtype))
    assert_all_matches(x, gradient_of(x), oracle.vectors(shape[1], "cuda"), 0.3)


@pytest.mark.gpu
def test_repeatable() -> None:
    x = oracle.values((64, 64, 56, 56)).cuda()
    given = oracle.vectors(64, "cuda")

    def step() -> list[Tensor]:
        y, statistics, _ = launcher.launch_forward(x, *given, None, 1.0, EPS)
        return [y, statistics, *launch_backward(x, x, given[0], statistics, 1.0)]

    first = step()
    assert all(same_bits(*pair) for _ in range(3) for pair in zip(first, step(), strict=True))


@pytest.mark.gpu
def test_capture_in_a_cuda_graph() -> None:
    x = oracle.values((4, 8, 6, 5)).cuda()
    mask = torch.tensor([True, False, True, True], device="cuda")
    given = oracle.vectors(8, "cuda")

    def step() -> list[Tensor]:
        y, statistics, _ = launcher.launch_forward(x, *given, mask, 0.3, EPS)
        return [y, *launch_backward(x, x, given[0], statistics, 0.3, mask=mask)]

    expected = [tensor.clone() for tensor in step()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(same_bits(*pair) for pair in zip(captured, expected, strict=True))


@pytest.mark.gpu
def test_more_than_2_to_31_elements() -> None:
    rows = 2**25 + 3
    if torch.cuda.mem_get_info()[0] < 6 * 64 * rows:
        pytest.skip("needs 13 GB of free GPU memory")
    x = torch.zeros(rows, 64, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.arange(64)
    y, statistics, _ = launcher.launch_forward(x, *oracle.vectors(64, "cuda"), None, 0.0, EPS)
    assert same_bits(y[-1:], oracle.normalised(x[-1:], statistics, oracle.vectors(64, "cuda")).bfloat16())
    mean = moments.launch_moments(x, None)[0]
    torch.testing.assert_close(mean, torch.arange(64.0, device="cuda") / rows, rtol=1e-5, atol=0)
