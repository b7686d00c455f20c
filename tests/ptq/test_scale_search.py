"""The scale search against a naive one that tries every grid of the same list, in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from ttaq_kernels import KernelError, fake_quantize, search_scale
from ttaq_kernels.reference import scale_search as reference

CASES = {
    "normal": lambda g: torch.randn(3, 40, generator=g),
    "one sided": lambda g: torch.randn(3, 40, generator=g).relu(),
    "negative": lambda g: -torch.rand(3, 40, generator=g),
    "outlier": lambda g: torch.cat([torch.randn(3, 39, generator=g), torch.full((3, 1), 30.0)], 1),
    "skewed": lambda g: torch.nn.functional.gelu(3 * torch.randn(3, 40, generator=g)),
    "tiny": lambda g: 1e-5 * torch.randn(3, 40, generator=g) - 2e-6,
}


def grid_range(bits: int, symmetric: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def error(x: np.ndarray, scale: float, zero_point: int, qmin: int, qmax: int, p: float) -> float:
    q = np.clip(np.rint(x / scale) + zero_point, qmin, qmax)
    return float((np.abs(x - (q - zero_point) * scale) ** p).mean())


def naive_best(x: np.ndarray, bits: int, symmetric: bool, p: float, candidates: int) -> float:
    """The smallest error of any grid in the list of the docstring of `scale_search`."""
    qmin, qmax = grid_range(bits, symmetric)
    lo, hi = min(x.min(), 0), max(x.max(), 0)
    full = max(hi / qmax, lo / qmin) if symmetric else (hi - lo) / qmax
    best = np.inf
    for i in range(1, candidates + 1):
        scale = max(full * i / candidates, 1e-8)
        if symmetric:
            zero_points = {0}
        elif bits <= 4:
            zero_points = set(range(qmax + 1))
        else:
            centre = round(-lo / full)
            zero_points = {*range(centre - 2, centre + 3), round(-lo / scale), qmax - round(hi / scale)}
        for zero_point in zero_points:
            if qmin <= zero_point <= qmax:
                best = min(best, error(x, scale, zero_point, qmin, qmax, p))
    return best


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, True), (4, False), (6, False), (8, False), (8, True)])
def test_finds_the_best_grid_of_the_list(case: str, bits: int, symmetric: bool) -> None:
    x = CASES[case](torch.Generator().manual_seed(bits))
    qmin, qmax = grid_range(bits, symmetric)
    for axis, rows in ((0, x), (None, x[:1])):
        scale, zero_point = search_scale(rows, bits, symmetric=symmetric, axis=axis)
        assert scale.dtype == torch.float32
        assert zero_point.dtype == torch.int32
        assert scale.shape == zero_point.shape == (len(rows),)
        for row, s, z in zip(rows.double().numpy(), scale.tolist(), zero_point.tolist(), strict=True):
            assert qmin <= z <= qmax
            found, best = error(row, s, z, qmin, qmax, 2.4), naive_best(row, bits, symmetric, 2.4, 100)
            assert found <= best * (1 + 1e-4)


@pytest.mark.parametrize(("p", "candidates"), [(1.0, 7), (2.0, 30), (4.0, 100)])
def test_other_errors_and_counts(p: float, candidates: int) -> None:
    x = torch.randn(5, 60, generator=torch.Generator().manual_seed(1))
    scale, zero_point = search_scale(x, 3, axis=0, p=p, candidates=candidates)
    for row, s, z in zip(x.double().numpy(), scale.tolist(), zero_point.tolist(), strict=True):
        assert error(row, s, z, 0, 7, p) <= naive_best(row, 3, False, p, candidates) * (1 + 1e-4)


def test_min_max_by_hand() -> None:
    x = torch.tensor([[-1.0, 0.5, 2.0], [0.0, 1.0, 3.0], [-6.0, -1.0, -2.0], [0.0, 0.0, 0.0]])
    scale, zero_point = search_scale(x, 2, axis=0, search="minmax")
    assert scale.tolist() == pytest.approx([1.0, 1.0, 2.0, 1e-8])
    assert zero_point.tolist() == [1, 0, 3, 0]
    scale, zero_point = search_scale(x, 2, axis=0, symmetric=True, search="minmax")
    assert scale.tolist() == pytest.approx([2.0, 3.0, 3.0, 1e-8])
    assert zero_point.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("search", ["mse", "minmax"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_constant_and_dead_channels(search: str, symmetric: bool, bits: int) -> None:
    x = torch.stack([torch.zeros(9), torch.full((9,), 0.7), torch.full((9,), -0.7), torch.full((9,), 1e-20)])
    scale, zero_point = search_scale(x, bits, axis=0, symmetric=symmetric, search=search)
    assert (scale >= 1e-8).all()
    y = fake_quantize(x, scale, zero_point, *grid_range(bits, symmetric), 0)
    assert torch.allclose(y, x, atol=1e-7), "a constant channel lies on its own grid"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_and_layouts_find_the_same(dtype: torch.dtype) -> None:
    x = torch.randn(4, 6, 5, 3, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = search_scale(x.float().transpose(0, 1).contiguous(), 4, axis=0)
    for layout in (x, x.contiguous(memory_format=torch.channels_last)):
        for axis in (1, -3):
            for got, want in zip(search_scale(layout, 4, axis=axis), expected, strict=True):
                assert torch.equal(got, want)


def test_channels_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels are searched in blocks, which may end their search at different times."""
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(3)) * torch.logspace(-4, 2, 50)[:, None]
    x[7] = x[7].abs()
    alone = [search_scale(x[row : row + 1], 4, axis=0) for row in range(50)]
    for rows_per_block in (1, 7, 50):
        monkeypatch.setattr(reference, "_BLOCK", 64 * rows_per_block)
        scale, zero_point = search_scale(x, 4, axis=0)
        assert torch.equal(scale, torch.cat([s for s, _ in alone]))
        assert torch.equal(zero_point, torch.cat([z for _, z in alone]))


def test_a_large_tensor_is_sampled_without_bias() -> None:
    """A stride of 8, of 16 ... would see the borders of the images much too often."""
    images = torch.rand(80, 4, 32, 32, generator=torch.Generator().manual_seed(5))
    images[..., 0] *= 6
    scale, zero_point = search_scale(images, 3, candidates=12)
    flat = images.double().numpy().ravel()
    assert error(flat, scale.item(), zero_point.item(), 0, 7, 2.4) < 1.02 * naive_best(flat, 3, False, 2.4, 12)
    images[0, 0, 3, 3] = 70.0  # one value that the sample need not hold
    assert search_scale(images, 3, search="minmax")[0].item() == pytest.approx(10.0)


def nan_at(x: Tensor, value: float) -> Tensor:
    return torch.cat([x.flatten(), torch.tensor([value])])


X = torch.ones(2, 3)
ERRORS = [
    ({"x": [1.0]}, "x is a list"),
    ({"x": torch.ones(2, dtype=torch.int32)}, "x has dtype int32"),
    ({"x": torch.ones(0, 3)}, "at least one value"),
    ({"x": torch.ones(3, 0), "axis": 0}, "at least one value"),
    ({"x": nan_at(X, float("nan"))}, "NaN or Inf"),
    ({"x": nan_at(X, float("-inf"))}, "NaN or Inf"),
    ({"bits": 1}, "bits is 1, expected 2 to 8"),
    ({"bits": 9}, "bits is 9"),
    ({"bits": 4.0}, "bits is 4.0"),
    ({"axis": 2}, "axis is 2"),
    ({"search": "mean"}, "search is 'mean'"),
    ({"p": 0.5}, "p is 0.5"),
    ({"candidates": 0}, "candidates is 0"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_errors(change: dict, message: str) -> None:
    arguments = {"x": X, "bits": 4, **change}
    with pytest.raises(KernelError, match=r"^search_scale: ") as caught:
        search_scale(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("shape", list(itertools.product([1, 3], [1, 2])))
def test_single_values(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    for axis in (None, 0, 1):
        scale, zero_point = search_scale(x, 8, axis=axis)
        assert torch.allclose(fake_quantize(x, scale, zero_point, 0, 255, axis), x, atol=2e-2)
