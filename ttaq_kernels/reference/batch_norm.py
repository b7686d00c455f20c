"""Adaptive batch norm in plain PyTorch: what the kernels are tested against, and the CPU path.

Same order of operations as the kernels, in float32 (float64 for float64 inputs); `reference.moments` says how the
passes walk over the batch. Sums of gradients are torch's own: one vectorised pass, no temporary.
"""

import torch
from torch import Tensor

from ttaq_kernels.reference.moments import along_channels, channel_moments, pieces

__all__ = ["batch_norm_backward", "batch_norm_forward", "mixed_statistics", "normalise"]


def mixed_statistics(
    batch_mean: Tensor,
    var: Tensor,
    count: int,
    source_mean: Tensor | None,
    source_var: Tensor | None,
    alpha: float,
    eps: float,
) -> Tensor:
    """[5, C]: mean, rstd, mean of the batch, alpha / M and var, given the moments of the batch and their M = `count`.

    At M = 0 the batch has no share; without a source either, mean is 0 and var 1.
    """
    alpha = alpha if count else 0.0
    mean = batch_mean
    if source_mean is not None and source_var is not None and alpha < 1:
        mean = (1 - alpha) * source_mean + alpha * batch_mean
        var = (1 - alpha) * source_var + alpha * var
    elif not count:
        var = torch.ones_like(var)
    # torch's root of float32 is off by an ulp now and then, that of the kernels is not.
    rstd = (var + eps).double().sqrt_().to(var.dtype).reciprocal_()
    return torch.stack((mean, rstd, batch_mean, torch.full_like(mean, alpha / max(1, count)), var))


def normalise(
    x: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """(x - mean) (rstd weight) + bias in the type of the statistics, as a new tensor or in `out`."""
    factor = statistics[1] if weight is None else statistics[1] * weight
    y = torch.sub(x, along_channels(statistics[0], x), out=out).mul_(along_channels(factor, x))
    return y if bias is None else y.add_(along_channels(bias, x))


def batch_statistics(
    x: Tensor,
    source_mean: Tensor | None,
    source_var: Tensor | None,
    sample_mask: Tensor | None,
    alpha: float,
    eps: float,
) -> Tensor:
    """`mixed_statistics` of a batch, whose moments are not computed at alpha 0."""
    if alpha > 0:
        batch_mean, var, count = channel_moments(x, sample_mask)
    else:
        dtype = torch.promote_types(x.dtype, torch.float32)
        batch_mean, var, count = *torch.zeros(2, x.shape[1], dtype=dtype, device=x.device), 0
    return mixed_statistics(batch_mean, var, count, source_mean, source_var, alpha, eps)


def batch_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    source_mean: Tensor | None,
    source_var: Tensor | None,
    sample_mask: Tensor | None,
    alpha: float,
    eps: float,
    _statistics_gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """`y` and the statistics, see `mixed_statistics`."""
    statistics = batch_statistics(x, source_mean, source_var, sample_mask, alpha, eps)
    y = torch.empty_like(x)
    in_place = y.dtype == statistics.dtype
    for x_piece, y_piece in pieces(x, y):
        result = normalise(x_piece, statistics, weight, bias, y_piece if in_place else None)
        if not in_place:
            y_piece.copy_(result)
    return y, statistics


def _torch_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, statistics: Tensor, need_x: bool
) -> tuple[Tensor | None, Tensor]:
    """dx for statistics of all samples of the batch, and [2, C]: rstd sum dy (x - mean), sum dy."""
    mean, rstd, *_ = statistics
    weight = torch.ones_like(rstd) if weight is None else weight
    # eps is not used where the statistics are given.
    arguments = (grad, x, weight, None, None, mean, rstd, True, 0.0, [need_x, True, True])
    dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(*arguments)
    return dx, torch.stack((dweight, dbias))


def _input_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    affine: Tensor | None,
    sample_mask: Tensor | None,
) -> Tensor:
    """rstd weight (dy - share dbias - (x - batch_mean) share rstd dweight); None for `affine` leaves out the sums."""
    _, rstd, batch_mean, share, _ = statistics
    dx = torch.empty_like(x)
    factor = along_channels(rstd if weight is None else rstd * weight, x)
    in_place = dx.dtype == statistics.dtype
    if affine is not None:
        centre, constant = along_channels(batch_mean, x), along_channels(share * affine[1], x)
        slope = along_channels(share * rstd * affine[0], x)
    for grad_piece, x_piece, dx_piece, selected in pieces(grad, x, dx, sample_mask):
        out = dx_piece if in_place else None
        result = grad_piece
        if affine is not None:
            along_x = (x_piece - centre).mul_(slope)
            result = torch.sub(grad_piece, constant, out=out).sub_(along_x)
            if selected is not None:
                result = torch.where(selected.view(-1, *[1] * (x.ndim - 1)), result, grad_piece)
        result = torch.mul(result, factor, out=out)
        if not in_place:
            dx_piece.copy_(result)
    return dx


def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    sample_mask: Tensor | None,
    alpha: float,
    need_x: bool,
    need_affine: bool,
) -> tuple[Tensor, Tensor]:
    """`dx` and [2, C]: dweight and dbias; what is not needed comes back empty.

    dbias = sum dy, dweight = rstd sum dy (x - mean), and with share = alpha / M, or 0 for samples not selected,
    dx = rstd weight (dy - share dbias - (x - batch_mean) share rstd dweight).
    """
    dx: Tensor | None = None
    affine: Tensor | None = None
    if x.numel() == 0:
        dx, affine = torch.empty_like(x), statistics.new_zeros(2, x.shape[1])
    elif need_affine or alpha > 0:
        of_batch = alpha == 1 and sample_mask is None
        dx, affine = _torch_backward(grad, x, weight, statistics, need_x and of_batch)
    if not need_x:
        dx = x.new_empty(0)
    elif dx is None:
        dx = _input_gradient(grad, x, weight, statistics, affine if alpha > 0 else None, sample_mask)
    elif dx.stride() != torch.empty_like(x, device="meta").stride():
        dx = torch.empty_like(x).copy_(dx)
    return dx, affine if need_affine and affine is not None else statistics.new_empty(0)
