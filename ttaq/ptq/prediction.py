"""What a unit in training does to the prediction of the whole model.

    p(u)   = softmax(tail(unit(u)) / T)                 tail: the float units after this one
    L_G    = KL(p_float || p(x_q))                      p_float: what the float model predicts (PD-Quant, eq. 8)
    L_PC   = KL(p(x_q), held fixed || p(x_q + noise))   (TTAQ, arXiv 2412.09899, section 3.3)

x_q is the input of the unit in the quantized model, without drop. The equations of L_PC are not in the public text of
the paper: this is the reading that its words allow.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttaq.ptq.settings import Reconstruction

__all__ = ["prediction_loss"]


def prediction_loss(
    unit: Callable[[Tensor], Tensor],
    tail: nn.Module,
    x_q: Tensor,
    mixed: Tensor,
    logits: Tensor,
    settings: Reconstruction,
    step: Tensor | None,
    generator: torch.Generator,
) -> Tensor:
    """`prediction * L_G + perturbation * L_PC` of `settings`, a mean over the images.

    unit: the unit in training. x_q, mixed: its input without and with drop. logits: [N, classes] of the float model.
    step: the step of the grid that x_q lies on, None where it lies on none ("step" noise is then that of 1 % of its
    largest value). generator: draws the noise.
    """
    total = x_q.new_zeros(())
    p_q = functional.log_softmax(tail(unit(x_q)).float() / settings.temperature, 1)
    if settings.prediction:
        p_float = functional.log_softmax(logits.float() / settings.temperature, 1)
        total = total + settings.prediction * _divergence(p_float, p_q)
    if settings.perturbation:
        perturbed = _perturbed(x_q, mixed, settings, step, generator)
        p_perturbed = functional.log_softmax(tail(unit(perturbed)).float() / settings.temperature, 1)
        total = total + settings.perturbation * _divergence(p_q.detach(), p_perturbed)
    return total


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _perturbed(
    x_q: Tensor, mixed: Tensor, settings: Reconstruction, step: Tensor | None, generator: torch.Generator
) -> Tensor:
    if settings.perturbation_kind == "mix":
        return mixed
    if settings.perturbation_kind == "gaussian":
        noise = torch.empty_like(x_q).normal_(generator=generator)
        noise.mul_(settings.perturbation_size * x_q.std())
    else:
        noise = torch.empty_like(x_q).uniform_(-0.5, 0.5, generator=generator)
        noise.mul_(x_q.abs().amax() * 0.01 if step is None else step)
    # What a ReLU made stays above zero.
    return torch.where(x_q.amin() < 0, x_q + noise, (x_q + noise).clamp_(min=0))
