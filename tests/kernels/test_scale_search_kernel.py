"""The kernels of search_scale: the grid that the reference picks, which is the first of the best in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ttaq_kernels import scale_search as module
from ttaq_kernels import search_scale
from ttaq_kernels.reference import scale_search as reference

GRIDS = [(0, 3), (0, 7), (0, 15), (0, 31), (0, 255), (-2, 1), (-8, 7), (-128, 127)]


def rows_of(values: int = 70, seed: int = 0) -> Tensor:
    """Rows of both signs, of one sign each, with an outlier, skewed, tiny, and of zeros."""
    x = torch.randn(7, values, generator=torch.Generator().manual_seed(seed))
    x[1], x[2] = x[1].abs(), -x[2].abs()
    x[3, 0] = 12
    x[4] = torch.nn.functional.gelu(3 * x[4])
    x[5] = 1e-5 * x[5] - 3e-6
    x[6] = 0
    return x


def ranges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)


def naive(row: Tensor, qmin: int, qmax: int, p: float, candidates: int) -> tuple[float, int]:
    """Every grid of the list one after the other, largest scale first, its error in float64; the first of the best."""
    x = row.numpy()
    lo, hi = np.minimum(x.min(), np.float32(0)), np.maximum(x.max(), np.float32(0))
    full = max(hi / np.float32(qmax), lo / np.float32(qmin)) if qmin else (hi - lo) / np.float32(qmax)
    full = max(full, np.float32(1e-8))
    best, found = np.inf, (0.0, 0)
    for i in range(candidates, 0, -1):
        scale = max(full * np.float32(i / candidates), np.float32(1e-8))
        if qmin or lo == 0:
            zero_points = [0]
        elif hi == 0:
            zero_points = [qmax]
        elif qmax < 16:
            zero_points = list(range(qmax + 1))
        else:
            centre = round(float(-lo / full))
            zero_points = [centre + step for step in (0, -1, 1, -2, 2)]
            zero_points += [round(float(-lo / scale)), qmax - min(round(float(hi / scale)), qmax)]
            zero_points = [min(max(zero_point, 0), qmax) for zero_point in zero_points]
        v = x * (np.float32(1) / scale)
        for zero_point in zero_points:
            rounded = np.clip(np.rint(v), qmin - zero_point, qmax - zero_point)
            error = (np.abs(rounded.astype(np.float64) - v) ** p).mean() ** (1 / p) * float(scale)
            if error < best:
                best, found = error, (float(scale), zero_point)
    return found


def assert_finds(x: Tensor, qmin: int, qmax: int, device: torch.device, p: float = 2.4, candidates: int = 20) -> None:
    arguments = (qmin, qmax, p, candidates)
    lo, hi = ranges(x)
    scale, zero_point = module._launch(x.to(device), lo.to(device), hi.to(device), *arguments)
    assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int32)
    expected_scale, expected_zero_point = reference.scale_search(x, lo, hi, *arguments)
    assert torch.equal(scale.cpu(), expected_scale)
    assert torch.equal(zero_point.cpu(), expected_zero_point)
    assert list(zip(scale.tolist(), zero_point.tolist(), strict=True)) == [naive(row, *arguments) for row in x]


@pytest.mark.parametrize(("qmin", "qmax"), GRIDS)
def test_grids(qmin: int, qmax: int, kernel_device: torch.device) -> None:
    assert_finds(rows_of(), qmin, qmax, kernel_device)


@pytest.mark.parametrize("p", [1.0, 2.0, 4.0])
def test_other_errors(p: float, kernel_device: torch.device) -> None:
    assert_finds(rows_of(seed=1), 0, 7, kernel_device, p)


@pytest.mark.parametrize("values", [1, 2, 9])
def test_few_values(values: int, kernel_device: torch.device) -> None:
    """One value lies on several grids, whose errors are rounding: only that the best is as good can be asked for."""
    x = rows_of(values)[:5]
    lo, hi = ranges(x)
    for qmin, qmax in ((0, 3), (0, 255), (-8, 7)):
        scale, zero_point = (
            found.cpu()[:, None]
            for found in module._launch(*(t.to(kernel_device) for t in (x, lo, hi)), qmin, qmax, 2.4, 10)
        )
        assert ((zero_point >= qmin) & (zero_point <= qmax)).all()
        y = ((x / scale).round() + zero_point).clamp(qmin, qmax).sub(zero_point) * scale
        other = [torch.tensor(naive(row, qmin, qmax, 2.4, 10)) for row in x]
        best_scale, best = torch.stack(other)[:, :1], torch.stack(other)[:, 1:]
        best_y = ((x / best_scale).round() + best).clamp(qmin, qmax).sub(best) * best_scale
        ours, theirs = ((t - x).abs().pow(2.4).mean(1) for t in (y, best_y))
        assert (ours <= theirs * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize(("qmin", "qmax"), [(0, 7), (0, 255), (-8, 7)])
def test_parts_and_blocks(qmin: int, qmax: int, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several parts, parts of several blocks and a short last one, and more candidates than a block of them."""
    monkeypatch.setattr(module, "_PART", 32)
    monkeypatch.setattr(module, "_TILE", 32)
    assert_finds(rows_of(70)[:5], qmin, qmax, kernel_device)


def test_one_candidate(kernel_device: torch.device) -> None:
    assert_finds(rows_of(), 0, 15, kernel_device, candidates=1)


def test_of_equals_the_first_wins(kernel_device: torch.device) -> None:
    """Whole numbers have no error on their own grid, whatever comes after; zeros have none on any."""
    x = torch.stack([torch.tensor([-1.0, 0.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.zeros(4)])
    lo, hi = ranges(x)
    scale, zero_point = module._launch(*(t.to(kernel_device) for t in (x, lo, hi)), 0, 3, 2.0, 6)
    assert scale.tolist() == pytest.approx([1, 1, 1e-8])
    assert zero_point.tolist() == [1, 0, 0]


def test_rows_with_gaps(kernel_device: torch.device) -> None:
    x = rows_of(140)
    assert_finds(x[:, ::2], 0, 15, kernel_device, candidates=5)
    assert_finds(x.t().contiguous().t()[:, :50], 0, 255, kernel_device, candidates=5)


def test_no_rows(kernel_device: torch.device) -> None:
    nothing = torch.empty(0, device=kernel_device)
    scale, zero_point = module._launch(torch.empty(0, 3, device=kernel_device), nothing, nothing, 0, 15, 2.4, 5)
    assert scale.shape == zero_point.shape == (0,)


@pytest.mark.parametrize(("qmin", "qmax"), [(0, 7), (0, 255), (-8, 7)])
def test_opcheck(qmin: int, qmax: int, op_device: torch.device) -> None:
    x = rows_of().to(op_device)
    torch.library.opcheck(torch.ops.ttaq_kernels.search_scale.default, (x, *ranges(x), qmin, qmax, 2.4, 3))


def test_op_compiles_into_one_graph(op_device: torch.device) -> None:
    torch._dynamo.reset()
    x = rows_of().to(op_device)

    def search(rows: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = torch.ops.ttaq_kernels.search_scale(rows * 2, *ranges(rows * 2), 0, 7, 2.4, 3)
        return scale * 2, zero_point + 1

    for got, want in zip(torch.compile(search, fullgraph=True, backend="aot_eager")(x), search(x), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("search", ["mse", "minmax"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_as_on_the_cpu(bits: int, search: str) -> None:
    x = torch.randn(64, 32, 3, 3, generator=torch.Generator().manual_seed(bits))
    for axis in (None, 0):
        for got, want in zip(
            search_scale(x.cuda(), bits, axis=axis, search=search),
            search_scale(x, bits, axis=axis, search=search),
            strict=True,
        ):
            assert torch.equal(got.cpu(), want)


@pytest.mark.gpu
@pytest.mark.parametrize(("qmin", "qmax"), GRIDS)
def test_shapes_of_networks(qmin: int, qmax: int) -> None:
    """As many values as a tensor is sampled at, and the channels of a layer; the errors of the best are compared."""
    for shape in ((1, 65_536), (512, 4608)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        on_gpu = x.cuda()
        arguments = (*ranges(on_gpu), qmin, qmax, 2.4, 100)
        found = module._launch(on_gpu, *arguments)
        again = module._launch(on_gpu, *arguments)
        expected = reference.scale_search(on_gpu, *arguments)
        errors = []
        for scale, zero_point in (found, expected):
            v = on_gpu.double() / scale.double()[:, None]
            rounded = v.round().clamp((qmin - zero_point)[:, None], (qmax - zero_point)[:, None])
            errors.append((rounded - v).abs().pow(2.4).mean(1).pow(1 / 2.4) * scale)
        torch.testing.assert_close(*errors, rtol=1e-5, atol=0)
        assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))


@pytest.mark.gpu
def test_capture_in_a_cuda_graph() -> None:
    x = rows_of().cuda()
    arguments = (x, *ranges(x), 0, 15, 2.4, 20)
    expected = [found.clone() for found in module._launch(*arguments)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = module._launch(*arguments)
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(captured, expected, strict=True))
