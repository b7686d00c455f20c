"""Cross entropy of two softmaxes in plain PyTorch: what the kernel is tested against, and the CPU path.

Everything works in float32, or in float64 for float64 logits.
"""

import torch
from torch import Tensor

from ttaq_kernels.reference.losses import add_offset, weighted

__all__ = ["softmax_cross_entropy"]


def _softmax(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d = z - max z, p = softmax(z) and ln sum e^d."""
    d = z - z.amax(1, keepdim=True)
    p = d.exp()
    total = p.sum(1, keepdim=True)
    return d, p.div_(total), total.log()


def _mean(p: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """sum_c p_c d_c, and d without what p = 0 takes out of it: 0 times -inf would be NaN."""
    if d.isneginf().any():
        d = d.masked_fill(p == 0, 0.0)
    return (p * d).sum(1, keepdim=True), d


def softmax_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None,
    offset: Tensor | None,
    symmetric: bool,
    need_logits: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each row [B], and its gradients by the logits and by the target [B, C], or nothing in their place."""
    d, p, log_sum = _softmax(add_offset(logits, offset))
    target_d, target_p, target_log_sum = _softmax(add_offset(target, None))
    mean, d = _mean(target_p, d)
    loss = log_sum - mean
    if symmetric:
        target_mean, target_d = _mean(p, target_d)
        loss = 0.5 * (loss + (target_log_sum - target_mean))
    by_logits, by_target = logits.new_empty(0), target.new_empty(0)
    if need_target:
        gradient = torch.sub(mean, d, out=d).mul_(target_p)
        if symmetric:
            gradient.add_(target_p).sub_(p).mul_(0.5)
        by_target = torch.empty_like(target).copy_(weighted(gradient, weights))
    if need_logits:
        gradient = p - target_p
        if symmetric:
            gradient.add_(torch.sub(target_mean, target_d, out=target_d).mul_(p)).mul_(0.5)
        by_logits = torch.empty_like(logits).copy_(weighted(gradient, weights))
    return weighted(loss.squeeze(1), weights), by_logits, by_target
