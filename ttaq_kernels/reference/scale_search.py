"""The search for the grid of each row in plain PyTorch: the CPU path, and what the kernels are tested against.

Candidates are tried one after the other, largest scale first, until no other can win.
"""

import torch
from torch import Tensor

__all__ = ["full_scale", "nearest", "scale_search"]

_SMALLEST = 1e-8  # scales stay above it, so that their inverse is finite
_BLOCK = 1 << 17  # values scored at a time: what stays in a CPU's cache


def full_scale(lo: Tensor, hi: Tensor, qmin: int, qmax: int) -> Tensor:
    """The scale of the grid that covers [lo, hi]."""
    # Dividing by a number would multiply by its inverse on a GPU.
    top, bottom = torch.full_like(hi, qmax), torch.full_like(lo, qmin)
    step = torch.maximum(hi / top, lo / bottom) if qmin else (hi - lo) / top
    return step.clamp_(min=_SMALLEST)


def nearest(distance: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
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
        tried = [(torch.full_like(scale, zero_point), 0.0) for zero_point in range(qmax + 1)]
    else:
        centre = nearest(-lo, full, qmin, qmax)
        tried = [((centre + step).clamp_(qmin, qmax), 0.0) for step in (0, -1, 1, -2, 2)]
        # Each of these keeps one end where it is, but for half a scale of rounding there and half a scale here.
        tried += [(nearest(-lo, scale, qmin, qmax), 1.0), (qmax - nearest(hi, scale, qmin, qmax), 1.0)]
    # A row of one sign has one zero point, whatever the rows beside it have.
    positive, negative = lo == 0, (hi == 0) & (lo != 0)
    return [(zero_point.masked_fill_(positive, 0).masked_fill_(negative, qmax), shift) for zero_point, shift in tried]


def _search(
    x: Tensor, lo: Tensor, hi: Tensor, qmin: int, qmax: int, p: float, candidates: int
) -> tuple[Tensor, Tensor]:
    """The best scale and zero point of each row of `x` [rows, values]."""
    full = full_scale(lo, hi, qmin, qmax)
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


def scale_search(
    rows: Tensor, lo: Tensor, hi: Tensor, qmin: int, qmax: int, p: float, candidates: int
) -> tuple[Tensor, Tensor]:
    """The scale (float32) and zero point (int32) of each row of `rows` [R, values], whose range is [lo, hi]."""
    blocks = [torch.split(tensor, max(1, _BLOCK // rows.shape[1])) for tensor in (rows, lo, hi)]
    found = [_search(x, low, high, qmin, qmax, p, candidates) for x, low, high in zip(*blocks, strict=True)]
    scales, zero_points = zip(*found, strict=True)
    return torch.cat(scales), torch.cat(zero_points).int()
