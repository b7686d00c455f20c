"""The optimizers of the gradient methods, with a state that exists from the start and begins at zero."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from ttaq.errors import InputError

__all__ = ["make_optimizer", "zero_state"]

_MOMENTS = {torch.optim.Adam: ("exp_avg", "exp_avg_sq", "step"), torch.optim.SGD: ("momentum_buffer",)}


def make_optimizer(
    who: str,
    parameters: Iterable[nn.Parameter],
    kind: str,
    *,
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = False,
) -> torch.optim.Optimizer:
    """`kind` "adam" (betas 0.9 and 0.999, eps 1e-8) or "sgd" (`momentum`, dampening 0, `nesterov`); no weight decay.

    Fused: one call per step instead of some ten per parameter, and nothing waits for the device. Adam ignores
    `momentum`. Errors: `InputError` in the name of `who` for unknown kinds and numbers out of range.
    """
    if not isinstance(lr, (int, float)) or not 0 <= lr < math.inf:
        raise InputError(f"{who}: lr is {lr!r}, expected a finite number >= 0")
    if not isinstance(momentum, (int, float)) or not 0 <= momentum < 1:
        raise InputError(f"{who}: momentum is {momentum!r}, expected a number in [0, 1)")
    if nesterov and (kind != "sgd" or momentum == 0):
        raise InputError(
            f"{who}: nesterov is set with optimizer {kind!r} and momentum {momentum}, expected 'sgd' and momentum > 0"
        )
    if kind == "adam":
        return torch.optim.Adam(parameters, lr=lr, fused=True)
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, nesterov=nesterov, fused=True)
    raise InputError(f"{who}: optimizer is {kind!r}, expected 'adam' or 'sgd'")


def zero_state(optimizer: torch.optim.Optimizer) -> None:
    """Bring `optimizer` to where it is before its first step, as tensors: moments and step counts that are 0.

    torch creates its state in the first step. Having it from the start makes it a fixed set of tensors that can be
    saved, checked and restored in place, and changes no result: torch's moments begin as the same zeros, except that
    SGD takes the first gradient as its momentum buffer, which is what 0 * momentum + gradient gives.
    """
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        state = optimizer.state[parameter]
        for key in _MOMENTS[type(optimizer)] if not state else ():
            # The fused kernels count steps in an fp32 scalar on the device of the parameter.
            scalar = key == "step"
            state[key] = torch.zeros_like(parameter) if not scalar else parameter.new_zeros((), dtype=torch.float32)
        for value in state.values():
            value.zero_()
