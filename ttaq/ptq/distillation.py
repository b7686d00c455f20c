"""After the units: the norms of the whole model learn what the float model predicts.

    L = T^2 mean_i KL(softmax(z_float,i / T) || softmax(z_i / T))

The units learn one after the other what the float units do, and no unit sees what its error does to the answer. Weights
and grids stay where the units left them; weight and bias of the norms, which adaptation moves too, learn on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from ttaq.nn import QuantizedModel
from ttaq.nn.adapt_norms import norm_affine
from ttaq.ptq.observe import Progress
from ttaq.ptq.settings import Reconstruction

__all__ = ["distil"]


def distil(
    model: QuantizedModel,
    teacher: QuantizedModel,
    images: Tensor,
    settings: Reconstruction,
    *,
    seed: int,
    progress: Progress | None = None,
) -> None:
    """Train the norms of the quantized `model`, in place, with `settings.distillation` steps of Adam.

    teacher: the float model, in the mode of batch norm that `model` is in. images: [N, C, H, W]. The learning rate goes
    down to 0 along a cosine.

    Source: Hinton et al., arXiv 1503.02531, section 2.
    """
    parameters = list(norm_affine(model, "quantize").values())
    learned_before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    device, generator = parameters[0].device, torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(parameters, lr=settings.distillation_lr, fused=True)
    steps, temperature = settings.distillation, settings.temperature
    # Layers on a grid compute the gradient of every weight that asks for one, wanted here or not.
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_()
    try:
        for step in range(steps):
            rate = settings.distillation_lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = rate
            places = torch.randint(len(images), (settings.distillation_batch,), generator=generator)
            x = images[places].to(device, torch.float32).contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                target = functional.log_softmax(teacher(x) / temperature, 1)
            with torch.enable_grad():
                log_p = functional.log_softmax(model(x) / temperature, 1)
                loss = temperature**2 * functional.kl_div(log_p, target, reduction="batchmean", log_target=True)
                gradients = torch.autograd.grad(loss, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            if progress is not None:
                progress(step + 1, steps, f"distillation loss {loss.item():.4g}")
    finally:
        for parameter in parameters:
            parameter.grad = None
        for parameter, learned in learned_before.items():
            parameter.requires_grad_(learned)
