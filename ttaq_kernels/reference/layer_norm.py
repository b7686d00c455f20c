"""Layer norm with groups and a grid in plain PyTorch: the CPU path, and what the kernels are tested against.

Same operations in the same order as the kernels, hence the same bits from the same statistics; in float32, or in
float64 for float64 inputs.
"""

import torch
from torch import Tensor

from ttaq_kernels.reference.group_affine import of_samples, sum_groups
from ttaq_kernels.reference.norm_act_quant import gradient_carrier, stored_shift

__all__ = ["layer_norm_backward", "layer_norm_forward", "normalise", "statistics_of"]


def _positions(x: Tensor) -> int:
    """Rows of each sample."""
    return x[0].numel() // x.shape[-1] if len(x) and x.shape[-1] else 1


def _of_rows(parameter: Tensor, groups: Tensor | None, x: Tensor) -> Tensor:
    """The row of `parameter` [G, C] that each row of `x` has: [1, C] or [M, C]."""
    if len(parameter) == 1:
        return parameter
    return of_samples(parameter, groups, len(x)).repeat_interleave(_positions(x), 0)


def statistics_of(x: Tensor, eps: float) -> Tensor:
    """[2, M]: mean and 1 / sqrt(var + eps) of each row."""
    rows = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
    mean = rows.mean(1, keepdim=True)
    var = (rows - mean).square_().mean(1)
    return torch.stack((mean.squeeze(1), 1 / torch.sqrt(var + eps)))


def normalise(
    x: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None, groups: Tensor | None
) -> Tensor:
    """[M, C]: ((x - mean) rstd) weight + bias."""
    y = (x.reshape(-1, x.shape[-1]) - statistics[0].unsqueeze(1)).mul_(statistics[1].unsqueeze(1))
    if weight is not None:
        y.mul_(_of_rows(weight, groups, x))
    return y if bias is None else y.add_(_of_rows(bias, groups, x))


def _unclamped(y: Tensor, scale: Tensor, zero_point: Tensor, nan: float) -> Tensor:
    return y.mul_(scale.reciprocal()).round_().add_(zero_point).nan_to_num_(nan=nan)


def layer_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    codes: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics, `y`, and for codes the tensor that carries their gradient; for values an empty one."""
    statistics = statistics_of(x, eps)
    y = normalise(x, statistics, weight, bias, groups)
    if scale is not None and zero_point is not None:
        y = _unclamped(y, scale, zero_point, float(qmin)).clamp_(qmin, qmax)
        y = y.sub_(stored_shift(qmax)) if codes else y.sub_(zero_point).mul_(scale)
    out = torch.empty_like(x, dtype=torch.int8 if codes else x.dtype)
    return statistics, out.copy_(y.view(x.shape)), gradient_carrier(x) if codes else x.new_empty(0)


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    groups: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    count: int,
    need_x: bool,
    need_affine: bool,
) -> tuple[Tensor, Tensor]:
    """dx, and [2, G, C]: dweight and dbias of `count` groups; what is not needed comes back empty."""
    g = grad.reshape(-1, x.shape[-1]).to(statistics.dtype)
    if scale is not None and zero_point is not None:
        u = _unclamped(normalise(x, statistics, weight, bias, groups), scale, zero_point, -torch.inf)
        # The gradient of hardtanh is where(low < u < high, g, 0) in one vectorised pass.
        g = torch.ops.aten.hardtanh_backward(g, u, qmin - 0.5, qmax + 0.5)
    normalised = normalise(x, statistics, None, None, None)
    dx, affine = x.new_empty(0), statistics.new_empty(0)
    if need_affine:
        shape = (len(x), -1, x.shape[-1]) if x.numel() else (len(x), 0, x.shape[-1])
        sums = torch.stack([(g * normalised).view(shape).sum(1), g.view(shape).sum(1)])
        affine = sum_groups(sums, groups, count)
    if need_x:
        weighted = g if weight is None else g * _of_rows(weight, groups, x)
        along = normalised * (weighted * normalised).mean(1, keepdim=True)
        slope = (weighted - weighted.mean(1, keepdim=True)).sub_(along).mul_(statistics[1].unsqueeze(1))
        dx = torch.empty_like(x).copy_(slope.view(x.shape))
    return dx, affine
