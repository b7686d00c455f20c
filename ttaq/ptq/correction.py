"""Distribution correction (PD-Quant, arXiv 2212.07048, section 3.3): inputs that fit the statistics of the source data.

    min over x'  sum over batch norms of mean (mean_s - running_mean)^2 + (std_s - running_std)^2
                 + mean over images and positions of sum_c (x' - x)^2 / lamb

mean_s and std_s are those of each image and channel in front of the norm, in the float unit. 500 steps of Adam (1e-3,
a tenth where the loss stalls for 100 steps, at least 1e-5) for each batch of 32 images.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ttaq.nn import AdaptiveBatchNorm2d

__all__ = ["corrected"]

_BATCH, _STEPS, _LR, _LEAST_LR, _PATIENCE = 32, 500, 1e-3, 1e-5, 100


def corrected(unit: nn.Module, x: Tensor, lamb: float) -> Tensor:
    """`x` [N, ...], changed so that the batch norms of the float `unit` see what they were trained on."""
    norms = [m for m in unit.modules() if isinstance(m, AdaptiveBatchNorm2d) and m.running_mean is not None]
    if not norms:
        return x
    return torch.cat([_corrected(unit, norms, batch, lamb) for batch in torch.split(x, _BATCH)])


def _corrected(unit: nn.Module, norms: list[AdaptiveBatchNorm2d], x: Tensor, lamb: float) -> Tensor:
    distances: list[Tensor] = []

    def listen(norm: AdaptiveBatchNorm2d) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: distances.append(_distance(args[0], norm))

    with torch.enable_grad(), ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_pre_hook(listen(norm)).remove)
        moved = x.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([moved], lr=_LR)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, min_lr=_LEAST_LR, patience=_PATIENCE)
        for _ in range(_STEPS):
            distances.clear()
            unit(moved)
            far = (moved - x).square().sum() / (x.numel() / x.shape[1])
            loss = torch.stack(distances).sum() + far / lamb
            optimizer.zero_grad()
            loss.backward(inputs=[moved])  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step(loss.detach())
    return moved.detach()


def _distance(x: Tensor, norm: AdaptiveBatchNorm2d) -> Tensor:
    if norm.running_mean is None or norm.running_var is None:
        raise RuntimeError("corrected: a batch norm lost its running statistics")
    values = x.flatten(2)
    deviation = values.var(2, correction=0).add(norm.eps).sqrt() - norm.running_var.add(norm.eps).sqrt()
    return (values.mean(2) - norm.running_mean).square().mean() + deviation.square().mean()
