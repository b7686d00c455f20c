"""Softmax entropy in plain PyTorch: what the kernels are tested against, and the CPU path.

Every function works in float32, or in float64 for float64 logits.
"""

import torch
from torch import Tensor

__all__ = ["softmax_entropy_backward", "softmax_entropy_forward"]


def _finite(log_p: Tensor) -> Tensor:
    """-inf made the smallest number: times p = 0 that gives 0, the limit of p ln p, and not NaN."""
    return log_p.clamp_min(torch.finfo(log_p.dtype).min)


def softmax_entropy_forward(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy, maximum and log_sum, each [B]: log_sum = ln sum_c e^d_c, H = log_sum - sum_c p_c d_c, d = z - maximum.

    The maximum and the logarithm stay apart: their sum would round away the digits of ln p at large logits.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    maximum = z.amax(1)
    shifted = z - maximum.unsqueeze(1)
    weights = shifted.exp()
    total = weights.sum(1)
    moment = weights.mul(_finite(shifted)).sum(1)
    log_sum = total.log()
    return log_sum - moment / total, maximum, log_sum


def softmax_entropy_backward(
    grad_entropy: Tensor, logits: Tensor, entropy: Tensor, maximum: Tensor, log_sum: Tensor
) -> Tensor:
    """`-g_i p_ic (ln p_ic + H_i)` in the type of the logits; 0 where p underflows to 0."""
    z = logits.to(entropy.dtype)
    log_p = (z - maximum.unsqueeze(1)) - log_sum.unsqueeze(1)
    p = log_p.exp()
    slope = _finite(log_p).add_(entropy.unsqueeze(1)).mul_(p)
    return (-grad_entropy.unsqueeze(1) * slope).to(logits.dtype)
