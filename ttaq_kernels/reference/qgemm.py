"""The product with a packed weight in plain PyTorch: what the kernel is tested against, and the CPU path.

Integer sums are exact: float32 holds every integer up to 2^24, so the sum over k is cut into pieces that stay below,
and these are added in float64. That takes a fraction of the time of int32 or float64 products.
"""

import torch
from torch import Tensor

from ttaq_kernels.reference.pack import integers

__all__ = ["packed_linear", "packed_linear_input_gradient"]

_EXACT = 2**24


def _largest(x: Tensor) -> int:
    return int(x.abs().amax()) if x.numel() else 0


def _exact_product(x: Tensor, weight: Tensor) -> Tensor:
    """fp32(x @ weight.T) for integers in float32, rounded once."""
    piece = (_EXACT - 1) // max(1, _largest(x) * _largest(weight))
    if piece >= x.shape[1]:
        return x @ weight.T
    acc = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float64, device=x.device)
    for x_piece, weight_piece in zip(torch.split(x, piece, 1), torch.split(weight, piece, 1), strict=True):
        acc += x_piece @ weight_piece.T
    return acc.float()


def packed_linear(
    x: Tensor,
    codes: Tensor,
    bits: int,
    scale: Tensor,
    zero_point: Tensor | None,
    _row_sum: Tensor,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
    qmin: int,
    qmax: int,
) -> Tensor:
    """y[m, n] of `ttaq_kernels.qgemm`, for x [M, K]."""
    weight = integers(codes, zero_point, bits, x.shape[1]).float()
    x = x.float() if input_zero_point is None else x.float().sub_(input_zero_point)
    with torch.autocast(x.device.type, enabled=False):
        y = x @ weight.T if input_scale is None else _exact_product(x, weight)
    y = y.mul_(scale if input_scale is None else scale * input_scale)
    if bias is not None:
        y = y.add_(bias.float())
    if out_scale is not None and out_zero_point is not None:
        # torch.clamp would keep NaN, and codes cannot hold it.
        q = y.mul_(out_scale.reciprocal()).round_().add_(out_zero_point).nan_to_num_(nan=float(qmin))
        y = q.clamp_(qmin, qmax)
    return y.to(dtype)


def packed_linear_input_gradient(
    grad: Tensor, codes: Tensor, bits: int, length: int, scale: Tensor, zero_point: Tensor | None
) -> Tensor:
    """dx[m, k] = sum_n (grad[m, n] * scale[n]) (q - zero_point)[n, k], in the type of `grad`.

    bfloat16 and float16 hold the integers exactly, so only the product with the scale is rounded.
    """
    return (grad.float() * scale).to(grad.dtype) @ integers(codes, zero_point, bits, length).to(grad.dtype)
