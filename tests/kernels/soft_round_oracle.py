"""AdaRound as its formulas stand, clamp included, in float64 and for autograd."""

import torch
from torch import Tensor

GRIDS = {"W2": (-2, 1), **{f"W{bits}": (0, 2**bits - 1) for bits in range(3, 9)}, "S8": (-128, 127)}


def weight(shape: tuple[int, ...], qmin: int, qmax: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of which some lie outside the grid, its scale and its zero point."""
    draw = torch.Generator().manual_seed(seed)
    channels = (shape[0],)
    scale = (0.5 + torch.rand(channels, generator=draw)) * 4 / (qmax - qmin)
    zero_point = torch.randint(qmin, qmax + 1, channels, generator=draw, dtype=torch.int32)
    return torch.randn(shape, generator=draw), scale, zero_point


def along(parameter: Tensor, w: Tensor) -> Tensor:
    return parameter.double().reshape(-1, *(1,) * (w.ndim - 1))


def h_of(v: Tensor) -> Tensor:
    return (torch.sigmoid(v) * 1.2 - 0.1).clamp(0, 1)


def soft_round(v: Tensor, w: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """(clamp(floor(w / scale) + h(v) + zero_point, qmin, qmax) - zero_point) * scale, with float32's floor."""
    place = (w * along(1 / scale, w).float()).double()
    offset = along(zero_point, w)
    return ((place.floor() + h_of(v) + offset).clamp(qmin, qmax) - offset) * along(scale, w)


def start(w: Tensor, scale: Tensor) -> Tensor:
    """v with h(v) = w / scale - floor(w / scale)."""
    place = (w * along(1 / scale, w).float()).double()
    return -(1.2 / (place - place.floor() + 0.1) - 1).log()


def penalty(v: Tensor, beta: float) -> Tensor:
    return (1 - (2 * h_of(v) - 1).abs() ** beta).sum()
