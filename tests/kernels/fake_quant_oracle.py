"""Fake quantization written a second time, in NumPy, so that an error has to be made twice to stay unseen."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

GRIDS = {"W2": (-2, 1), "A3": (0, 7), "W4": (-8, 7), "A4": (0, 15), "W8": (-128, 127), "A8": (0, 255)}


def parameters(x: Tensor, qmin: int, qmax: int, axis: int | None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A scale of about 2 / (number of codes) and a zero point on the grid, per tensor or per index of `axis`."""
    draw = torch.Generator().manual_seed(seed)
    shape = () if axis is None else (x.shape[axis],)
    scale = (0.5 + torch.rand(shape, generator=draw)) * 4 / (qmax - qmin)
    return scale.to(x.device), torch.randint(qmin, qmax + 1, shape, generator=draw, dtype=torch.int32).to(x.device)


def values(shape: tuple[int, ...], scale: Tensor | float, seed: int = 0) -> Tensor:
    """Random fp32 values, among them ties of `scale`, signed zeros, subnormal and huge values, infinities and NaN."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=draw).reshape(-1)
    special = [0.0, -0.0, 1e-42, -1e-42, 3e38, -3e38, torch.inf, -torch.inf, torch.nan, 2.0**22, -(2.0**24) - 1]
    ties = [(k + 0.5) * float(torch.as_tensor(scale).flatten()[0]) for k in range(-9, 9)]
    for start, chosen in ((0, special), (1, ties)):
        for place, value in zip(range(start, x.numel(), 7), chosen, strict=False):
            x[place] = value
    return x.reshape(shape)


def _terms(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """Code minus zero point, inside, and d x_hat / d scale."""
    shape = [-1 if dim == axis else 1 for dim in range(x.ndim)]
    inv = (np.float32(1) / scale.detach().cpu().numpy().astype(np.float32)).reshape(shape)
    offset = zero_point.cpu().numpy().astype(np.float64).reshape(shape)
    with np.errstate(over="ignore", invalid="ignore"):
        v = (x.detach().cpu().float().numpy() * inv).astype(np.float64)
    unclamped = np.rint(v) + offset
    code = np.where(np.isnan(unclamped), qmin, np.clip(unclamped, qmin, qmax)) - offset
    inside = (unclamped >= qmin) & (unclamped <= qmax)
    return code, inside, code - np.where(inside, v, 0.0)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
    code, _, _ = _terms(x, scale, zero_point, qmin, qmax, axis)
    shape = [-1 if dim == axis else 1 for dim in range(x.ndim)]
    product = code.astype(np.float32) * scale.detach().cpu().numpy().reshape(shape)
    return torch.from_numpy(np.asarray(product, dtype=np.float32)).to(x.dtype)


def gradients(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dscale summed in fp64, and the sum of the magnitudes of the terms of dscale."""
    _, inside, slope = _terms(x, scale, zero_point, qmin, qmax, axis)
    wide = grad.detach().cpu().double().numpy()
    others = tuple(dim for dim in range(x.ndim) if dim != axis)
    dx = torch.from_numpy(np.asarray(np.where(inside, wide, 0.0))).to(x.dtype)
    sums = (np.asarray(part.sum(axis=others)) for part in (wide * slope, np.abs(wide * slope)))
    dscale, magnitude = (torch.from_numpy(part).reshape(scale.shape) for part in sums)
    return dx, dscale, magnitude
