"""Device functions in inline assembly: what it computes, emulated for every fraction, and on a GPU."""

import re

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ttaq_kernels import _math
from ttaq_kernels._launch import launch, tl, triton

Floats = NDArray[np.float32]
_BLOCK = 1 << 16  # numbers at a time, which stay in the cache


def _fma(a: Floats, b: Floats, c: Floats, up: bool) -> Floats:
    """a b + c in float32 with one rounding, to nearest even or up."""
    product = a.astype(np.float64) * b.astype(np.float64)  # exact: 24 and 24 bits
    total = product + c
    above = total - product
    missed = (product - (total - above)) + (c - above)  # of the exact sum, exactly
    # Rounded to odd, the sum in float64 lies on the side of every float32, and of every middle of two, that it should.
    even = (missed != 0) & (total.view(np.int64) & 1 == 0)
    total.view(np.int64)[even] += np.where((missed > 0) == (total > 0), 1, -1)[even]
    nearest = total.astype(np.float32)
    below = np.flatnonzero(nearest < total) if up else []
    nearest[below] = np.nextafter(nearest[below], np.float32(np.inf))
    return nearest


def _run(assembly: str, x: Floats, approximation: Floats) -> Floats:
    """What the instructions of `assembly` make of $1 = x, if rcp.approx is `approximation`."""
    registers = {"$1": x, "0f3F800000": np.ones_like(x), "0fFF7FFFFF": np.full_like(x, np.finfo(np.float32).min)}
    for name, operands in re.findall(r"([a-zN.0-9]+\.f32) ([^;]+);", assembly.split(";", 1)[1]):
        target, *given = operands.split(", ")
        values = [registers[register] for register in given]
        if name == "neg.f32":
            registers[target] = -values[0]
        elif name == "max.NaN.f32":
            registers[target] = np.maximum(*values)
        elif name == "rcp.approx.ftz.f32":
            registers[target] = approximation
        else:
            registers[target] = _fma(values[0], values[1], values[2], up=name == "fma.rp.f32")
    return registers["$0"]


def test_fma_by_hand() -> None:
    """1 + 2^-24 is the middle of two numbers: what is added below the last bit of float64 decides."""
    one, tiny = np.float32([1, 1, 1]), np.float32([2**-24, 2**-24, 2**-24])
    nudged = tiny * np.float32([1, 1 + 2**-23, 1 - 2**-24])
    assert _fma(nudged, one, one, up=False).tolist() == [1, 1 + 2**-23, 1]
    assert _fma(nudged, one, one, up=True).tolist() == [1 + 2**-23] * 3
    far = np.float32([2**-70, -(2**-70), 0])
    assert _fma(far, one, one, up=True).tolist() == [1 + 2**-23, 1, 1]
    assert _fma(far, one, one, up=False).tolist() == [1, 1, 1]


@pytest.mark.parametrize("units", [-1, 0, 1])
def test_the_reciprocal_is_rounded_right(units: int) -> None:
    """For every fraction, whatever the hardware answers within 1 unit (PTX ISA, rcp.approx.ftz.f32); the exponent only
    scales. Of x = 2 - 2^-23 a step less would be wrong.
    """
    assembly = getattr(_math._RECIPROCAL, "value", _math._RECIPROCAL)
    assert assembly.count(";") == 8
    for first in range(1 << 23, 1 << 24, _BLOCK):
        x = (np.arange(first, first + _BLOCK) / (1 << 23)).astype(np.float32)
        expected = np.float32(1) / x
        approximation = (expected.view(np.int32) + np.int32(units)).view(np.float32)
        assert np.array_equal(_run(assembly, x, approximation), expected)


def test_the_reciprocal_of_what_is_beyond() -> None:
    """0 where the approximation is; NaN of 0, whose approximation is infinity."""
    assembly = getattr(_math._RECIPROCAL, "value", _math._RECIPROCAL)
    with np.errstate(invalid="ignore"):
        x, approximation = np.float32([np.inf, 2.0**127, np.nan, 0]), np.float32([0, 0, np.nan, np.inf])
        assert _run(assembly, x, approximation).astype(str).tolist() == ["0.0", "0.0", "nan", "nan"]


@triton.jit
def _kernel(x_ptr, inverse_ptr, log2_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(inverse_ptr + offs, _math.reciprocal(x))
    tl.store(log2_ptr + offs, _math.log2_of_hardware(x))


def _both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    inverse, log2 = torch.empty_like(x), torch.empty_like(x)
    launch("test", _kernel, x.numel() // 64, x, inverse, log2, BLOCK=64)
    return inverse.cpu(), log2.cpu()


def test_on_the_device(kernel_device: torch.device) -> None:
    """Over the exponents that are promised, and what NaN becomes."""
    x = torch.exp2(torch.linspace(-126, 125, 1 << 12))
    inverse, log2 = _both(x.to(kernel_device))
    assert torch.equal(inverse, 1 / x)
    error = (log2.double() - x.double().log2()).abs()
    assert (error <= 2**-22 * log2.double().abs().clamp(min=1)).all()
    assert all(values.isnan().all() for values in _both(torch.full((64,), torch.nan, device=kernel_device)))


@pytest.mark.gpu
def test_every_fraction_on_a_gpu() -> None:
    x = torch.arange(1 << 23, 1 << 24).float() / (1 << 23)
    assert torch.equal(_both(x.cuda())[0], 1 / x)
    beyond = torch.tensor([torch.inf, 2.0**127, torch.nan, 0.0] * 16, device="cuda")
    inverse = _both(beyond)[0].view(16, 4)
    assert inverse[:, :2].eq(0).all()
    assert inverse[:, 2:].isnan().all()
    zeros = torch.tensor([0.0, 2.0**-127] * 32, device="cuda")
    assert (_both(zeros)[1] == -torch.inf).all()
