"""Weight and bias per group of samples in plain PyTorch: the CPU path, and what the kernels are tested against."""

import torch
from torch import Tensor

__all__ = ["group_affine", "group_affine_backward", "of_samples", "sum_groups"]


def of_samples(parameter: Tensor, groups: Tensor | None, samples: int) -> Tensor:
    """[N, C]: the row of `parameter` [G, C] that each sample has."""
    if len(parameter) == 1:
        return parameter.expand(samples, -1)
    if groups is not None:
        return parameter[groups]
    return parameter.repeat_interleave(samples // len(parameter), 0)


def sum_groups(sums: Tensor, groups: Tensor | None, count: int) -> Tensor:
    """[2, N, C] -> [2, G, C]: the sums of the samples of each group, always added in the same order."""
    if groups is None:
        return sums.view(2, count, sums.shape[1] // count, sums.shape[2]).sum(2)
    members = groups == torch.arange(count, device=groups.device).unsqueeze(1)
    return torch.stack([sums.masked_fill(~member.view(-1, 1), 0.0).sum(1) for member in members], 1)


def _shaped(parameter: Tensor, x: Tensor) -> Tensor:
    """[N, C] -> [N, C, 1, ...]"""
    return parameter.view(*parameter.shape, *[1] * (x.ndim - 2))


def _times(x: Tensor, weight: Tensor, groups: Tensor | None, like: Tensor | None = None) -> Tensor:
    """x weight in the type of `weight`, laid out as a dense tensor like `like`, by default `x`."""
    out = torch.empty_like(x if like is None else like, dtype=weight.dtype)
    return torch.mul(x, _shaped(of_samples(weight, groups, len(x)), x), out=out)


def group_affine(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Tensor | None) -> Tensor:
    """x weight + bias, computed in float32 (float64 for float64 weights)."""
    y = _times(x, weight, groups)
    if bias is not None:
        y += _shaped(of_samples(bias, groups, len(x)), x)
    return y.to(x.dtype)


def group_affine_backward(
    grad: Tensor, x: Tensor, weight: Tensor, groups: Tensor | None, need_x: bool, need_affine: bool
) -> tuple[Tensor, Tensor]:
    """dx = dy weight, and [2, G, C]: sum dy x and sum dy; what is not needed comes back empty."""
    dx, affine = x.new_empty(0), weight.new_empty(0)
    if need_x:
        dx = _times(grad, weight, groups, x).to(x.dtype)
    if need_affine:
        wide, positions = grad.to(weight.dtype), list(range(2, x.ndim))
        terms = (wide * x, wide)
        sums = torch.stack([term.sum(positions) if positions else term for term in terms])
        affine = sum_groups(sums, groups, len(weight))
    return dx, affine
