"""Soft rounding in plain PyTorch: what the kernels are tested against, and the CPU path."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["penalty", "penalty_backward", "soft_round", "soft_round_backward", "step_"]


def _sigmoid(v: Tensor) -> tuple[Tensor, Tensor]:
    """sigmoid(v), and its stretched form before the clamp."""
    s = torch.sigmoid(v)
    return s, s.mul(1.2).sub_(0.1)


def _slope(s: Tensor, stretched: Tensor) -> Tensor:
    """dh / dv: 1.2 s (1 - s) where 0 <= stretched <= 1, else 0."""
    # The gradient of hardtanh is where(low < u < high, value, 0) in one vectorised pass; no value of `stretched` lies
    # between 0 or 1 and these bounds.
    clip = torch.ops.aten.hardtanh_backward.default
    slope: Tensor = clip((1 - s).mul_(s).mul_(1.2), stretched, -1e-9, 1.0000001)
    return slope


def _along(parameter: Tensor, v: Tensor) -> Tensor:
    return parameter.reshape(-1, *(1,) * (v.ndim - 1))


def _pull(stretched: Tensor, beta: float) -> Tensor:
    """d (1 - |2h - 1|^beta) / dh."""
    d = stretched.clamp(0, 1).mul_(2).sub_(1)
    # A third of the time of torch.pow; log 0 = -inf gives the power 0.
    power = d.abs().log_().mul_(beta - 1).exp_()
    return power.mul_(d.sign_()).mul_(-2 * beta)


def soft_round(v: Tensor, codes: Tensor, scale: Tensor, bottom: Tensor, hard: bool) -> Tensor:
    """(codes + bottom + h) * scale."""
    rounded = v.ge(0).to(v.dtype) if hard else _sigmoid(v)[1].clamp_(0, 1)
    return rounded.add_(codes.add(_along(bottom, v))).mul_(_along(scale, v))


def soft_round_backward(grad: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    """grad * scale * dh / dv."""
    return _slope(*_sigmoid(v)).mul_(grad).mul_(_along(scale, v))


def penalty(v: Tensor, beta: Tensor) -> Tensor:
    """The sum of 1 - |2h - 1|^beta."""
    d = _sigmoid(v)[1].clamp_(0, 1).mul_(2).sub_(1)
    return (1 - d.abs_().log_().mul_(beta).exp_()).sum()


def penalty_backward(grad: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """The gradient of `v`."""
    s, stretched = _sigmoid(v)
    return _pull(stretched, beta.item()).mul_(_slope(s, stretched)).mul_(grad)


def step_(
    vs: Sequence[Tensor],
    w_hats: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grads: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    bottoms: Sequence[Tensor],
    knobs: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One step of Adam on every v, in place; then w_hat is what the new v rounds to."""
    lr, beta, weight, step = knobs.tolist()
    size, correction = lr / -math.expm1(step * math.log(beta1)), math.sqrt(-math.expm1(step * math.log(beta2)))
    for v, w_hat, exp_avg, exp_avg_sq, grad, code, scale, bottom in zip(
        vs, w_hats, exp_avgs, exp_avg_sqs, grads, codes, scales, bottoms, strict=True
    ):
        s, stretched = _sigmoid(v)
        gradient = grad * _along(scale, v)
        if weight:
            gradient.add_(_pull(stretched, beta), alpha=weight)
        gradient.mul_(_slope(s, stretched))
        exp_avg.mul_(beta1).add_(gradient, alpha=1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        v.addcdiv_(exp_avg, exp_avg_sq.sqrt().div_(correction).add_(eps), value=-size)
        w_hat.copy_(soft_round(v, code, scale, bottom, hard=False))
