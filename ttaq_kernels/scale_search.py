"""Search for the scale and zero point of a grid: by range, or by the error that rounding to the grid makes.

`minmax` covers the values, from lo <= 0 to hi >= 0:

    asymmetric  scale = (hi - lo) / (2^b - 1)                      zero_point = clamp(-rint(lo / scale), 0, 2^b - 1)
    symmetric   scale = max(hi / (2^(b-1) - 1), -lo / 2^(b-1))     zero_point = 0

`mse` tries i / candidates of that scale, i = 1, ..., candidates, and takes the one with the smallest mean
|x - x_hat|^p. Up to 4 bits it tries each with every zero point; above, with the zero points that divide the range as lo
and hi do (and those up to 2 away), that keep lo, and that keep hi. Values of one sign need one zero point. Of equals
the largest scale wins.

Plain PyTorch on the device of x; called once per tensor, by `ttaq.nn.Quantizer.calibrate`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttaq_kernels._check import check_axis, check_input
from ttaq_kernels.errors import KernelError

__all__ = ["search_scale"]

_SMALLEST = 1e-8  # scales stay above it, so that their inverse is finite
_SAMPLES = 1 << 16  # values that score a per-tensor grid
_BLOCKS = {"cpu": 1 << 17}  # values scored at a time: what stays in a CPU's cache
_BLOCK = 1 << 24  # elsewhere: few launches


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

    Raises:
        KernelError: an argument out of range, an empty x, or NaN or Inf in x (this waits for the device).
    """
    check_input("search_scale", "x", x)
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise KernelError(f"search_scale: bits is {bits!r}, expected 2 to 8")
    if search not in ("mse", "minmax"):
        raise KernelError(f"search_scale: search is {search!r}, expected 'mse' or 'minmax'")
    if not p >= 1 or candidates < 1:
        raise KernelError(f"search_scale: p is {p} and candidates is {candidates}, expected both at least 1")
    if not x.numel():
        raise KernelError(f"search_scale: x has shape {tuple(x.shape)}, expected at least one value")
    x = x.detach()
    rows = x.reshape(1, -1) if axis is None else x.movedim(check_axis("search_scale", axis, x), 0).flatten(1)
    rows = rows.reshape(rows.shape[0], -1).float()
    lo, hi = rows.amin(1).clamp_(max=0), rows.amax(1).clamp_(min=0)
    if not bool((lo.isfinite() & hi.isfinite()).all()):
        raise KernelError("search_scale: x has NaN or Inf values, expected finite ones; look where they come from")
    qmin = -(2 ** (bits - 1)) if symmetric else 0
    qmax = qmin + 2**bits - 1
    if search == "minmax":
        full = _full_scale(lo, hi, qmin, qmax)
        return full, _nearest(-lo, full, qmin, qmax).int()
    if axis is None:
        # An odd stride does not fall into step with the rows of an image.
        rows = rows[:, :: max(1, -(-rows.shape[1] // _SAMPLES) | 1)]
    per_block = max(1, _BLOCKS.get(x.device.type, _BLOCK) // rows.shape[1])
    blocks = [torch.split(tensor, per_block) for tensor in (rows, lo, hi)]
    found = [_search(v, low, high, qmin, qmax, p, candidates) for v, low, high in zip(*blocks, strict=True)]
    scales, zero_points = zip(*found, strict=True)
    return torch.cat(scales), torch.cat(zero_points).int()


def _full_scale(lo: Tensor, hi: Tensor, qmin: int, qmax: int) -> Tensor:
    """The scale of the grid that covers [lo, hi]."""
    step = torch.maximum(hi / qmax, lo / qmin) if qmin else (hi - lo) / qmax
    return step.clamp_(min=_SMALLEST)


def _nearest(distance: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """The zero point that leaves `distance` below zero."""
    return torch.zeros_like(scale) if qmin else (distance / scale).round_().clamp_(qmin, qmax)


def _zero_points(
    scale: Tensor, full: Tensor, lo: Tensor, hi: Tensor, qmin: int, qmax: int
) -> list[tuple[Tensor, float]]:
    """The zero points to try with `scale`, for each row. With each, by how many scales its grid may reach beyond the
    grid of a larger scale."""
    if qmin or not bool(lo.any()):
        return [(torch.zeros_like(scale), 0.0)]
    if not bool(hi.any()):
        return [(torch.full_like(scale, qmax), 0.0)]
    if qmax < 16:
        return [(torch.full_like(scale, zero_point), 0.0) for zero_point in range(qmax + 1)]
    centre = _nearest(-lo, full, qmin, qmax)
    around = [((centre + step).clamp_(qmin, qmax), 0.0) for step in (0, -1, 1, -2, 2)]
    # Each of these keeps one end where it is, but for half a scale of rounding there and half a scale here.
    return [*around, (_nearest(-lo, scale, qmin, qmax), 1.0), (qmax - _nearest(hi, scale, qmin, qmax), 1.0)]


def _search(
    x: Tensor, lo: Tensor, hi: Tensor, qmin: int, qmax: int, p: float, candidates: int
) -> tuple[Tensor, Tensor]:
    """The best scale and zero point of each row of `x` [rows, values]."""
    full = _full_scale(lo, hi, qmin, qmax)
    best, best_scale, best_zero_point = torch.full_like(full, torch.inf), full, torch.zeros_like(full)
    hopeless: set[int] = set()
    for i in range(candidates, 0, -1):
        scale = (full * (i / candidates)).clamp_(min=_SMALLEST)
        v = x * scale.reciprocal()[:, None]
        rounded = v.round()
        tried = _zero_points(scale, full, lo, hi, qmin, qmax)
        for index, (zero_point, shift) in enumerate(tried):
            if index in hopeless:
                continue
            clamped = torch.maximum(rounded, (qmin - zero_point)[:, None])
            error = torch.minimum(clamped, (qmax - zero_point)[:, None], out=clamped).sub_(v)
            # In the units of x and to the power 1 / p: a norm, comparable between scales.
            error = error.abs_().pow_(p).mean(1).pow_(1 / p).mul_(scale)
            better = error < best
            best = torch.where(better, error, best)
            best_scale = torch.where(better, scale, best_scale)
            best_zero_point = torch.where(better, zero_point, best_zero_point)
            # The error is at most a rounding error of scale / 2 plus the clipping error, which grows as the scale
            # shrinks, but for `shift`. Once clipping alone is worse than the best, this zero point cannot win any more.
            if bool(((error - (0.5 + shift) * scale > best) | (best == 0)).all()):
                hopeless.add(index)
        if len(hopeless) == len(tried):
            break
    return best_scale, best_zero_point
