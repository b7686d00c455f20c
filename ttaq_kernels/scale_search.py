"""Search for the scale and zero point of a grid: by range, or by the error that rounding to the grid makes.

`minmax` covers the values, from lo <= 0 to hi >= 0:

    asymmetric  scale = (hi - lo) / (2^b - 1)                      zero_point = clamp(-rint(lo / scale), 0, 2^b - 1)
    symmetric   scale = max(hi / (2^(b-1) - 1), -lo / 2^(b-1))     zero_point = 0

`mse` tries i / candidates of that scale, i = 1, ..., candidates, and takes the one with the smallest mean
|x - x_hat|^p. Up to 4 bits it tries each with every zero point; above, with the zero points that divide the range as lo
and hi do (and those up to 2 away), that keep lo, and that keep hi. Values of one sign need one zero point. Of equals
the largest scale wins.

Two launches: a program scores one scale with all its zero points on up to 8192 values, then one program for each grid
adds these parts in a fixed order and picks the best. 4 bytes per value, read once from memory and then, for each scale,
from the cache; about 20 instructions per value and candidate. Called once per tensor, by `ttaq.nn.Quantizer.calibrate`.
"""

import torch
from torch import Tensor

from ttaq_kernels._check import check_axis, check_input
from ttaq_kernels._launch import ceil_div, launch, next_power_of_2, tl, triton
from ttaq_kernels._library import register_op
from ttaq_kernels._math import round_half_even
from ttaq_kernels.errors import KernelError
from ttaq_kernels.reference import scale_search as reference

# Device functions stay without types: Triton has none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

__all__ = ["search_scale"]

_WHO = "search_scale"
_SAMPLES = 1 << 16  # values that score a per-tensor grid
_PART = 1 << 13  # values of a row that one program scores, the same for all GPUs, since the split decides the rounding
_TILE = 2048  # pairs of value and zero point of a program at a time
_SMALLEST = tl.constexpr(1e-8)
_NONE = tl.constexpr(1 << 30)  # above every place in the list of candidates


@triton.jit
def power(base, exponent):
    """base^exponent, base >= 0, exponent > 0"""
    return tl.exp2(exponent * tl.log2(base))


@triton.jit
def _scale(number, full, candidates):
    """The scale of this number, of which 0 is the largest."""
    share = tl.div_rn(tl.cast(candidates - number, tl.float32), tl.cast(candidates, tl.float32))
    return tl.maximum(full * share, _SMALLEST)


@triton.jit
def _zero_point(index, scale, full, lo, hi, qmax, LIST: tl.constexpr):
    """The zero point of this index among those to try with a scale."""
    # Triton makes a constant of a 1, which has no methods: hence tl.cast.
    zero_point = tl.cast(index, tl.float32)
    if LIST == "none":
        zero_point *= 0.0
    else:
        top = tl.cast(qmax, tl.float32)
        if LIST == "near":
            # 0, -1, 1, -2, 2 from where the full range has it; 5 keeps lo, 6 keeps hi.
            step = tl.where(index % 2 == 1, -((index + 1) // 2), index // 2)
            full_range = round_half_even(tl.div_rn(-lo, full))
            zero_point = tl.minimum(full_range, top) + tl.where(index < 5, step, 0).to(tl.float32)
            above = tl.minimum(round_half_even(tl.div_rn(hi, scale)), top)
            zero_point = tl.where(index == 6, top - above, zero_point)
            zero_point = tl.where(index == 5, round_half_even(tl.div_rn(-lo, scale)), zero_point)
            zero_point = tl.minimum(tl.maximum(zero_point, 0.0), top)
        zero_point = tl.where(lo == 0.0, 0.0, tl.where(hi == 0.0, top, zero_point))
    return zero_point


@triton.jit
def _score_kernel(
    x_ptr,
    full_ptr,
    lo_ptr,
    hi_ptr,
    parts_ptr,
    values,
    parts,
    candidates,
    qmin,
    qmax,
    p,
    LIST: tl.constexpr,
    LENGTH: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """parts[row, part, number, index] = sum |clamp(rint(v) + zero_point, qmin, qmax) - zero_point - v|^p, v = x inv"""
    program = tl.program_id(0).to(tl.int64)
    row, first = program // candidates // parts, program // candidates % parts * PART
    full, lo, hi = tl.load(full_ptr + row), tl.load(lo_ptr + row), tl.load(hi_ptr + row)
    scale = _scale((program % candidates).to(tl.int32), full, candidates)
    inv = tl.div_rn(1.0, scale)
    zero_point = _zero_point(tl.arange(0, LENGTH)[:, None], scale, full, lo, hi, qmax, LIST)
    lowest, highest = tl.cast(qmin, tl.float32) - zero_point, tl.cast(qmax, tl.float32) - zero_point
    total = tl.zeros((LENGTH, BLOCK_V), tl.float32)
    for start in range(0, tl.minimum(values - first, PART), BLOCK_V):
        offs_v = first + start + tl.arange(0, BLOCK_V)[None, :]
        # A 0 where the row has ended costs nothing: every grid has it.
        v = tl.load(x_ptr + row * values + offs_v, mask=offs_v < values, other=0.0) * inv
        total += power(tl.abs(tl.minimum(tl.maximum(round_half_even(v), lowest), highest) - v), p)
    tl.store(parts_ptr + program * LENGTH + tl.arange(0, LENGTH), tl.sum(total, axis=1))


@triton.jit
def _select_kernel(
    parts_ptr,
    full_ptr,
    lo_ptr,
    hi_ptr,
    scale_ptr,
    zero_point_ptr,
    values,
    parts,
    candidates,
    qmax,
    inverse_p,
    LIST: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The scale and zero point with the smallest (sum / values)^(1/p) scale of a row, the first of equals."""
    row = tl.program_id(0).to(tl.int64)
    full, lo, hi = tl.load(full_ptr + row), tl.load(lo_ptr + row), tl.load(hi_ptr + row)
    index = tl.arange(0, LENGTH)[None, :]
    best = tl.full((), float("inf"), tl.float32)
    chosen = tl.full((), 0, tl.int32)
    for first in range(0, candidates, BLOCK_N):
        number = first + tl.arange(0, BLOCK_N)[:, None]
        total = tl.zeros((BLOCK_N, LENGTH), tl.float32)
        for part in range(parts):
            offs = ((row * parts + part) * candidates + number) * LENGTH + index
            total += tl.load(parts_ptr + offs, mask=number < candidates, other=0.0)
        # In the units of x and to the power 1 / p: a norm, comparable between scales.
        error = power(tl.div_rn(total, tl.cast(values, tl.float32)), inverse_p) * _scale(number, full, candidates)
        error = tl.where(number < candidates, error, float("inf"))
        least = tl.min(tl.min(error, axis=1), axis=0)
        place = tl.min(tl.min(tl.where(error == least, number * LENGTH + index, _NONE), axis=1), axis=0)
        chosen = tl.where(least < best, place, chosen)
        best = tl.minimum(least, best)
    scale = _scale(chosen // LENGTH, full, candidates)
    tl.store(scale_ptr + row, scale)
    zero_point = _zero_point(chosen % LENGTH, scale, full, lo, hi, qmax, LIST)
    tl.store(zero_point_ptr + row, zero_point.to(tl.int32))


def _launch(
    rows: Tensor, lo: Tensor, hi: Tensor, qmin: int, qmax: int, p: float, candidates: int
) -> tuple[Tensor, Tensor]:
    values = rows.shape[1]
    kind, length = ("none", 1) if qmin else ("all", qmax + 1) if qmax < 16 else ("near", 8)
    parts = ceil_div(values, _PART)
    full = reference.full_scale(lo, hi, qmin, qmax)
    partial = full.new_empty(len(rows), parts, candidates, length)
    scale, zero_point = torch.empty_like(full), torch.empty_like(full, dtype=torch.int32)
    ranges, kinds = (full, lo.contiguous(), hi.contiguous()), {"LIST": kind, "LENGTH": length}
    blocks = {"PART": _PART, "BLOCK_V": min(next_power_of_2(values), _TILE // length)}
    scored = (rows.contiguous(), *ranges, partial, values, parts, candidates, qmin, qmax, p)
    launch(_WHO, _score_kernel, len(rows) * parts * candidates, *scored, **kinds, **blocks)
    found = (partial, *ranges, scale, zero_point, values, parts, candidates, qmax, 1 / p)
    block_n = min(next_power_of_2(candidates), _TILE // (2 * length))
    launch(_WHO, _select_kernel, len(rows), *found, **kinds, BLOCK_N=block_n, num_warps=8)
    return scale, zero_point


_search_scale = register_op(
    "search_scale(Tensor rows, Tensor lo, Tensor hi, int qmin, int qmax, float p, int candidates) -> (Tensor, Tensor)",
    cpu=reference.scale_search,
    cuda=_launch,
    fake=lambda _rows, lo, *_: (torch.empty_like(lo), torch.empty_like(lo, dtype=torch.int32)),
)


def search_scale(
    x: Tensor,
    bits: int,
    *,
    symmetric: bool = False,
    axis: int | None = None,
    p: float = 2.4,
    candidates: int = 100,
    search: str = "mse",
) -> tuple[Tensor, Tensor]:
    """The grid of `fake_quantize` that fits `x` best.

    Args:
        x: float32, bfloat16 or float16, any shape with at least one value, finite.
        bits: 2 to 8; codes 0 to 2^bits - 1.
        symmetric: codes -2^(bits-1) to 2^(bits-1) - 1 and zero point 0 instead.
        axis: the dimension of which every index gets its own grid. None for one grid: then at most 65,536 values,
            evenly strided, score the candidates; the range is always that of all values.
        p: exponent of the error. candidates: number of scales to try. Both only for "mse".
        search: "mse" or "minmax".

    Returns:
        scale: float32 >= 1e-8, shape [1] or [x.shape[axis]]. zero_point: int32, the same shape.

    Exactness: the grids tried are the same bit for bit on every device. Where the errors of two agree to about 1e-6, it
    depends on the device which of them is chosen, but not on the run.

    Raises:
        KernelError: an argument out of range, an empty x, or NaN or Inf in x (this waits for the device).
    """
    check_input(_WHO, "x", x)
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise KernelError(f"{_WHO}: bits is {bits!r}, expected 2 to 8")
    if search not in ("mse", "minmax"):
        raise KernelError(f"{_WHO}: search is {search!r}, expected 'mse' or 'minmax'")
    if not p >= 1 or candidates < 1:
        raise KernelError(f"{_WHO}: p is {p} and candidates is {candidates}, expected both at least 1")
    if not x.numel():
        raise KernelError(f"{_WHO}: x has shape {tuple(x.shape)}, expected at least one value")
    x = x.detach()
    rows = x.reshape(1, -1) if axis is None else x.movedim(check_axis(_WHO, axis, x), 0).flatten(1)
    rows = rows.reshape(rows.shape[0], -1).float()
    lo, hi = rows.amin(1).clamp_(max=0), rows.amax(1).clamp_(min=0)
    if not bool((lo.isfinite() & hi.isfinite()).all()):
        raise KernelError(f"{_WHO}: x has NaN or Inf values, expected finite ones; look where they come from")
    qmin = -(2 ** (bits - 1)) if symmetric else 0
    qmax = qmin + 2**bits - 1
    if search == "minmax":
        full = reference.full_scale(lo, hi, qmin, qmax)
        return full, reference.nearest(-lo, full, qmin, qmax).int()
    if axis is None:
        # An odd stride does not fall into step with the rows of an image.
        rows = rows[:, :: max(1, ceil_div(rows.shape[1], _SAMPLES) | 1)]
    found: tuple[Tensor, Tensor] = _search_scale(rows, lo, hi, qmin, qmax, float(p), candidates)
    return found
