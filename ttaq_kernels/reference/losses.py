"""Losses of one softmax in plain PyTorch: what the kernels are tested against, and the CPU path.

Everything works in float32, or in float64 for float64 logits.
"""

import torch
from torch import Tensor

__all__ = ["add_offset", "softmax_loss", "weighted"]

_CLIP, _TINY = 0.99, 1e-5  # of the soft likelihood ratio


def add_offset(logits: Tensor, offset: Tensor | None) -> Tensor:
    """logits + offset, in at least float32."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return z if offset is None else z + offset


def weighted(loss: Tensor, weights: Tensor | None) -> Tensor:
    """`loss` with each row times its weight; a bool mask counts as 0 and 1."""
    if weights is None:
        return loss
    return loss * weights.to(loss.dtype).view(-1, *[1] * (loss.ndim - 1))


def _entropy(d: Tensor, p: Tensor, log_sum: Tensor, need_slope: bool) -> tuple[Tensor, Tensor | None]:
    """-sum p ln p and -ln p, which is its slope but for a constant."""
    # -inf made the smallest number: times p = 0 that gives 0, the limit of p ln p, and not NaN.
    slope = torch.sub(log_sum, d.clamp_min_(torch.finfo(d.dtype).min), out=d)
    return (p * slope).sum(1), slope if need_slope else None


def _likelihood_ratio(p: Tensor, need_slope: bool) -> tuple[Tensor, Tensor | None]:
    """-sum c ln(c / (1 - c) + tiny) with c = min(p, clip), and its slope."""
    clipped = p.clamp_max(_CLIP)
    rest = 1 - clipped
    log_ratio = (clipped / rest).add_(_TINY).log_()
    loss = (clipped * log_ratio).sum(1).neg_()
    if not need_slope:
        return loss, None
    slope = clipped.div(rest.mul_(clipped.add(rest, alpha=_TINY))).add_(log_ratio).neg_()
    # The gradient of hardtanh is where(low < p < high, slope, 0) in one vectorised pass.
    return loss, torch.ops.aten.hardtanh_backward.grad_input(slope, p, -1.0, _CLIP, grad_input=slope)


def softmax_loss(
    logits: Tensor, weights: Tensor | None, offset: Tensor | None, kind: str, need_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The loss of each row [B], and its gradient [B, C] in the type of the logits, or nothing.

    With l = sum_c f(p_c): dl / dz_c = p_c (f'(p_c) - sum_k p_k f'(p_k)).
    """
    z = add_offset(logits, offset)
    d = z - z.amax(1, keepdim=True)
    p = d.exp()
    total = p.sum(1, keepdim=True)
    p.div_(total)
    if kind == "entropy":
        loss, slope = _entropy(d, p, total.log(), need_gradient)
    else:
        loss, slope = _likelihood_ratio(p, need_gradient)
    if slope is None:
        return weighted(loss, weights), logits.new_empty(0)
    mean = (p * slope).sum(1, keepdim=True)
    gradient = torch.empty_like(logits)
    return weighted(loss, weights), gradient.copy_(weighted(slope.sub_(mean).mul_(p), weights))
