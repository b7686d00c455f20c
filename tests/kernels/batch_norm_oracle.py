"""Batch norm written a second time, in float64 and differentiated by autograd, and what the kernels must keep to."""

import torch
from kernel_tolerances import BATCH_NORM_MEAN, BATCH_NORM_RSTD, BATCH_NORM_SUMS, BATCH_NORM_VAR
from torch import Tensor

Vectors = tuple[Tensor | None, Tensor | None, Tensor, Tensor]  # weight, bias, source mean, source variance


def vectors(channels: int, device: torch.device | str = "cpu", affine: bool = True) -> Vectors:
    draw = torch.Generator().manual_seed(1)
    mean, bias = torch.randn(2, channels, generator=draw).to(device)
    var, weight = (0.5 + torch.rand(2, channels, generator=draw)).to(device)
    return (weight, bias, mean, var) if affine else (None, None, mean, var)


def values(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Channels of different means and spreads."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    scale = torch.linspace(0.3, 3, max(shape[1], 1))[: shape[1]].view(1, -1, *[1] * (len(shape) - 2))
    return x * scale + (1 - scale)


def along(vector: Tensor, x: Tensor) -> Tensor:
    return vector.reshape(1, -1, *[1] * (x.ndim - 2))


def others(x: Tensor) -> list[int]:
    return [dim for dim in range(x.ndim) if dim != 1]


def formula(
    x: Tensor, given: Vectors, alpha: float, eps: float = 1e-5, *, mask: Tensor | None = None, constant: bool = False
) -> Tensor:
    """The definition, in the type of `x`; with `constant` no gradient goes through the statistics."""
    weight, bias, source_mean, source_var = given
    chosen = x if mask is None else x[mask]
    mean = chosen.mean(others(x))
    var = (chosen - along(mean, x)).square().mean(others(x))
    if constant:
        mean, var = mean.detach(), var.detach()
    mean = (1 - alpha) * source_mean + alpha * mean
    var = (1 - alpha) * source_var + alpha * var
    y = (x - along(mean, x)) / along(var + eps, x).sqrt()
    if weight is not None:
        y = y * along(weight, x)
    return y if bias is None else y + along(bias, x)


def double(given: Vectors) -> Vectors:
    weight, bias, mean, var = (None if vector is None else vector.detach().cpu().double() for vector in given)
    assert mean is not None
    assert var is not None
    return weight, bias, mean, var


def assert_moments(moments: Tensor, x: Tensor, mask: Tensor | None = None) -> None:
    """Mean and variance of fp32 against fp64; both are 0 without elements."""
    x = x if mask is None else x[mask]
    wide = x.detach().cpu().double()
    mean, var, count = moments.detach().cpu().double()
    assert count.tolist() == [x.numel() // max(1, x.shape[1])] * x.shape[1]
    if not x.numel():
        assert not moments.any()
        return
    magnitude = BATCH_NORM_MEAN * wide.abs().mean(others(x))
    true_mean = wide.mean(others(x))
    true_var = (wide - along(true_mean, x)).square().mean(others(x))
    assert ((mean - true_mean).abs() <= magnitude).all()
    # A variance around a mean that is wrong by e is too large by e^2.
    assert ((var - true_var).abs() <= BATCH_NORM_VAR * true_var + magnitude**2).all()


def assert_statistics(statistics: Tensor, moments: Tensor, given: Vectors, alpha: float, eps: float) -> None:
    """The mixture, given the moments of the batch; without elements the source alone."""
    mean, rstd, batch_mean, share, var = statistics.detach().cpu().double()
    moments = moments.detach().cpu().double() if alpha > 0 else torch.zeros(3, len(mean), dtype=torch.float64)
    _, _, source_mean, source_var = double(given)
    torch.testing.assert_close(batch_mean, moments[0], rtol=0, atol=0)
    alpha = alpha if (moments[2] > 0).any() else 0.0
    torch.testing.assert_close(share, alpha / moments[2].clamp_min(1), rtol=2e-7, atol=0)
    mixed = (1 - alpha) * source_mean + alpha * moments[0]
    bound = (1 - alpha) * source_mean.abs() + alpha * moments[0].abs()
    assert ((mean - mixed).abs() <= 2e-7 * bound).all()
    torch.testing.assert_close(var, (1 - alpha) * source_var + alpha * moments[1], rtol=2e-7, atol=0)
    torch.testing.assert_close(rstd, (var + eps).rsqrt(), rtol=BATCH_NORM_RSTD, atol=0)


def normalised(x: Tensor, statistics: Tensor, given: Vectors) -> Tensor:
    """y from given statistics, in the kernel's order of operations: equal bit for bit."""
    weight, bias, *_ = given
    factor = statistics[1] if weight is None else statistics[1] * weight
    y = (x.float() - along(statistics[0], x)) * along(factor, x)
    return y if bias is None else y + along(bias, x)


def assert_sums(sums: Tensor, grad: Tensor, x: Tensor, statistics: Tensor) -> None:
    """dweight and dbias, given the statistics."""
    mean, rstd, *_ = statistics.detach().cpu().double()
    wide = grad.detach().cpu().double()
    slope = wide * (x.detach().cpu().double() - along(mean, x)) * along(rstd, x)
    for got, terms in zip(sums.detach().cpu().double(), (slope, wide), strict=True):
        assert ((got - terms.sum(others(x))).abs() <= BATCH_NORM_SUMS * terms.abs().sum(others(x))).all()


def input_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    sums: Tensor,
    alpha: float,
    mask: Tensor | None = None,
) -> Tensor:
    """dx from given statistics and sums, in the kernel's order of operations: equal bit for bit."""
    _, rstd, batch_mean, share, _ = statistics
    dx = grad.float()
    if alpha > 0:
        along_x = (x.float() - along(batch_mean, x)) * along(share * rstd * sums[0], x)
        through = (dx - along(share * sums[1], x)) - along_x
        dx = through if mask is None else through.where(mask.view(-1, *[1] * (x.ndim - 1)), dx)
    return dx * along(rstd if weight is None else rstd * weight, x)
