"""The kernels of layer_norm against the reference: bit for bit from the same statistics, sums within a tolerance."""

import group_cases as cases
import pytest
import torch
from fake_quant_oracle import values as special_values
from kernel_layouts import LAYOUTS, same_bits
from kernel_tolerances import LAYER_NORM_DX, LAYER_NORM_STATISTICS, LAYER_NORM_SUMS
from torch import Tensor

from ttaq_kernels import _layer_norm_kernels as kernels
from ttaq_kernels.reference import layer_norm as reference
from ttaq_kernels.reference.norm_act_quant import stored_shift

EPS = 1e-6
Grid = tuple[Tensor | None, Tensor | None, int, int]
NO_GRID: Grid = (None, None, 0, 255)


def tensor_of(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return 0.5 + 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grid(qmin: int, qmax: int) -> Grid:
    scale = torch.tensor([4 / (qmax - qmin)])
    return scale, torch.tensor([qmin + 3 * (qmax - qmin) // 8], dtype=torch.int32), qmin, qmax


def on(device: torch.device, given: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(t.to(device) if isinstance(t, Tensor) else t for t in given)


def assert_matches(
    x: Tensor,
    parameters: tuple[Tensor | None, Tensor | None],
    index: Tensor | None,
    quantizer: Grid = NO_GRID,
    grad: Tensor | None = None,
    device: torch.device | None = None,
) -> None:
    """Everything is given on the CPU; the kernels run on `device`."""
    device = device or torch.device("cpu")
    # The interpreter cuts off instead of rounding when it stores bfloat16.
    out_dtype = torch.float32 if device.type == "cpu" and x.dtype is torch.bfloat16 else x.dtype
    there = on(device, (x, *parameters, index, *quantizer))
    statistics, y, _ = kernels.launch_forward(*there, False, EPS, out_dtype)
    mean, rstd = statistics.cpu()
    expected = reference.statistics_of(x, EPS)
    magnitude = x.reshape(-1, x.shape[-1]).float().abs().mean(1)
    assert ((mean - expected[0]).abs() <= LAYER_NORM_STATISTICS * magnitude).all()
    torch.testing.assert_close(rstd, expected[1], rtol=LAYER_NORM_STATISTICS, atol=0)

    scale, zero_point, qmin, qmax = quantizer
    v = reference.normalise(x, statistics.cpu(), *parameters, index)
    if scale is not None:
        v = (v * (1 / scale)).round().add(zero_point).clamp(qmin, qmax)
        again, stored, carrier = kernels.launch_forward(*there, True, EPS)
        assert same_bits(again, statistics)
        assert torch.equal(stored.cpu().float() + stored_shift(qmax), v.view(x.shape))
        assert stored.stride() == torch.empty_like(x).stride()
        assert carrier.shape == x.shape
        v = (v - zero_point) * scale
    assert same_bits(y, v.view(x.shape).to(out_dtype))
    assert y.stride() == torch.empty_like(x).stride()

    grad = tensor_of(tuple(x.shape), 3).to(x.dtype) if grad is None else grad
    count = kernels.group_count(*parameters)
    arguments = (grad, x, *parameters, statistics.cpu(), index, *quantizer, count)
    dx, sums = kernels.launch_backward(*on(device, arguments), True, True, out_dtype)
    want_dx, want_sums = reference.layer_norm_backward(arguments[0].float(), x.float(), *arguments[2:], True, True)
    n = ((x.reshape(-1, x.shape[-1]).float() - mean[:, None]) * rstd[:, None]).view(x.shape)
    magnitudes = reference.layer_norm_backward(
        grad.float().abs(), n.abs(), None, None, torch.tensor([[0.0], [1.0]]).expand(2, len(mean)), index,
        *NO_GRID, count, False, True,
    )[1]  # fmt: skip
    assert ((sums.cpu() - want_sums).abs() <= LAYER_NORM_SUMS * magnitudes).all()
    h = grad.float().abs() * (1 if parameters[0] is None else parameters[0].abs().max())
    bound = h + h.mean(-1, keepdim=True) + n.abs() * (h * n.abs()).mean(-1, keepdim=True)
    bound = LAYER_NORM_DX * bound * rstd.view(*x.shape[:-1], 1)
    if out_dtype is not torch.float32:
        bound = bound + torch.finfo(out_dtype).eps * want_dx.abs()
    assert ((dx.cpu().float() - want_dx).abs() <= bound).all()
    assert dx.stride() == torch.empty_like(x).stride()
    assert same_bits(kernels.launch_backward(*on(device, arguments), True, False, out_dtype)[0], dx)
    assert same_bits(kernels.launch_backward(*on(device, arguments), False, True)[1], sums)


SHAPES: list[tuple[int, ...]] = [(0, 3), (2, 0, 3), (1, 1), (2, 3), (6, 5), (4, 3, 70), (2, 5, 2, 33), (2, 2, 2100)]


@pytest.mark.parametrize("by_index", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_shapes(shape: tuple[int, ...], by_index: bool, kernel_device: torch.device) -> None:
    groups = 1 if shape[0] % 2 else 2
    index = cases.index_of(shape[0], groups) if by_index else None
    assert_matches(tensor_of(shape), cases.parameters_of(groups, shape[-1]), index, grid(0, 15), device=kernel_device)


@pytest.mark.parametrize("quantizer", [NO_GRID, grid(0, 255), grid(-8, 7), grid(0, 1)], ids=["", "8", "-8", "1 bit"])
@pytest.mark.parametrize("present", [(True, True), (True, False), (False, True), (False, False)])
def test_what_is_there(quantizer: Grid, present: tuple[bool, bool], kernel_device: torch.device) -> None:
    parameters = cases.parameters_of(2, 7)
    weight, bias = (t if there else None for t, there in zip(parameters, present, strict=True))
    assert_matches(tensor_of((4, 3, 7)), (weight, bias), None, quantizer, device=kernel_device)


@pytest.mark.parametrize("layout", ["permuted", "sliced"])
def test_layouts(layout: str, kernel_device: torch.device) -> None:
    x, grad = tensor_of((4, 3, 6)), tensor_of((4, 3, 6), 3)
    parameters = cases.parameters_of(2, 6)
    assert_matches(LAYOUTS[layout](x), parameters, None, grid(0, 15), device=kernel_device)
    assert_matches(x, parameters, None, grid(0, 15), LAYOUTS[layout](grad), device=kernel_device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype: torch.dtype, kernel_device: torch.device) -> None:
    assert_matches(tensor_of((4, 3, 10)).to(dtype), cases.parameters_of(2, 10), None, grid(0, 15), device=kernel_device)


@pytest.mark.parametrize("by_index", [False, True])
def test_many_parts(by_index: bool, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of several blocks of rows, the last of them short, in groups that end inside a block."""
    monkeypatch.setattr(kernels, "_REDUCING_PROGRAMS", 5)
    monkeypatch.setattr(kernels, "_TILE", 32)
    index = cases.index_of(4, 2) if by_index else None
    assert_matches(tensor_of((4, 9, 6)), cases.parameters_of(2, 6), index, grid(0, 15), device=kernel_device)


def test_far_from_zero(kernel_device: torch.device) -> None:
    """A variance from differences keeps its digits where the mean is a thousand standard deviations away."""
    x = (1000 + torch.randn(3, 64, generator=torch.Generator().manual_seed(0))).to(kernel_device)
    statistics = kernels.launch_forward(x, None, None, None, *NO_GRID, False, EPS)[0].cpu().double()
    var, mean = torch.var_mean(x.cpu().double(), 1, correction=0)
    torch.testing.assert_close(statistics[0], mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics[1], (var + EPS).rsqrt(), rtol=1e-5, atol=0)


def test_ties_and_what_is_not_finite(kernel_device: torch.device) -> None:
    """With weight 0 the bias is quantized as it is; a row of NaN becomes qmin and passes no gradient to dbias."""
    scale, zero_point, qmin, qmax = on(kernel_device, grid(0, 15))
    bias = special_values((1, 60), 4 / 15).nan_to_num(nan=0.0).to(kernel_device)
    weight, x = torch.zeros_like(bias), tensor_of((3, 60)).to(kernel_device)
    given = (weight, bias, None, scale, zero_point, qmin, qmax)
    statistics, y, _ = kernels.launch_forward(x, *given, False, EPS)
    codes = (bias.cpu() * (1 / scale.cpu())).round().add(zero_point.cpu()).clamp(qmin, qmax)
    assert same_bits(y[0], ((codes - zero_point.cpu()) * scale.cpu())[0])
    u = (bias.cpu() * (1 / scale.cpu())).round() + zero_point.cpu()
    arguments = (torch.ones_like(x), x, weight, bias, statistics, None, *given[3:], 1)
    passed = kernels.launch_backward(*arguments, False, True)[1][1].cpu()
    assert torch.equal(passed, 3.0 * ((u >= qmin) & (u <= qmax)))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 197, 768), (64, 197, 192), (8, 50, 1280), (4, 8192)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shapes_of_networks(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_matches(
        tensor_of(shape).to(dtype), cases.parameters_of(2, shape[-1]), None, grid(0, 255), device=torch.device("cuda")
    )


@pytest.mark.gpu
def test_capture_in_a_cuda_graph() -> None:
    device = torch.device("cuda")
    x, parameters = tensor_of((4, 5, 70)).cuda(), on(device, cases.parameters_of(2, 70))
    quantizer = on(device, grid(0, 15))

    def step() -> list[Tensor]:
        statistics, y, _ = kernels.launch_forward(x, *parameters, None, *quantizer, False, EPS)
        codes = kernels.launch_forward(x, *parameters, None, *quantizer, True, EPS)[1]
        return [y, codes, *kernels.launch_backward(x, x, *parameters, statistics, None, *quantizer, 2, True, True)]

    expected = [tensor.clone() for tensor in step()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(captured, expected, strict=True))
