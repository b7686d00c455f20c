"""Adaptive batch norm in plain PyTorch: what the kernels are tested against, and the CPU path.

Same order of operations as the kernels, in float32 (float64 for float64 inputs); `reference.moments` says how the
passes walk over the batch.
"""

import torch
from torch import Tensor

from ttaq_kernels.reference.moments import (
    add_channel_sums,
    along_channels,
    batch_norm_moments,
    elements_per_channel,
    pieces,
)

__all__ = ["batch_norm_backward", "batch_norm_forward"]


def batch_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    source_mean: Tensor | None,
    source_var: Tensor | None,
    alpha: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`y` and the statistics [3, C] that the backward needs: mean, rstd, and the mean of the batch (0 at alpha 0)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if alpha > 0:
        batch_mean, var = batch_norm_moments(x)
    else:
        batch_mean, var = torch.zeros(2, x.shape[1], dtype=dtype, device=x.device)
    mean = batch_mean
    if source_mean is not None and source_var is not None and alpha < 1:
        mean = (1 - alpha) * source_mean + alpha * batch_mean
        var = (1 - alpha) * source_var + alpha * var
    rstd = 1 / torch.sqrt(var + eps)
    factor = rstd if weight is None else rstd * weight
    y = torch.empty_like(x)
    for x_piece, y_piece in pieces(x, y):
        normalised = (x_piece - along_channels(mean, x)).mul_(along_channels(factor, x))
        y_piece.copy_(normalised if bias is None else normalised.add_(along_channels(bias, x)))
    return y, torch.stack((mean, rstd, batch_mean))


def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    alpha: float,
    need_x: bool,
    need_affine: bool,
) -> tuple[Tensor, Tensor]:
    """`dx` and [2, C]: dweight and dbias; what is not needed comes back empty.

    dbias = sum dy, dweight = rstd sum dy (x - mean), and with share = alpha / M
    dx = rstd weight (dy - share dbias - (x - batch_mean) share rstd dweight).
    """
    mean, rstd, batch_mean = statistics
    sums = torch.zeros(2, x.shape[1], dtype=torch.float64, device=x.device)
    if need_affine or alpha > 0:
        for grad_piece, x_piece in pieces(grad, x):
            wide = grad_piece.to(mean.dtype)
            add_channel_sums(sums[0], (x_piece - along_channels(mean, x)).mul_(wide))
            add_channel_sums(sums[1], wide)
        sums[0] *= rstd
    affine = sums.to(mean.dtype)
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    if need_x:
        share = alpha / elements_per_channel(x)
        slope = along_channels(share * rstd * affine[0], x)
        constant = along_channels(share * affine[1], x)
        factor = along_channels(rstd if weight is None else rstd * weight, x)
        for grad_piece, x_piece, dx_piece in pieces(grad, x, dx):
            if alpha > 0:
                along_x = (x_piece - along_channels(batch_mean, x)).mul_(slope)
                dx_piece.copy_((grad_piece - constant).sub_(along_x).mul_(factor))
            else:
                dx_piece.copy_(grad_piece * factor)
    return dx, affine if need_affine else statistics.new_empty(0)
