"""TENT: entropy minimisation over the affine parameters of the norm layers."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ttaq.nn.adapt_norms import adaptive_batch_norms, norm_affine
from ttaq.tta.adapter import Adapter
from ttaq.tta.optimizer import make_optimizer
from ttaq_kernels import softmax_entropy

__all__ = ["Tent"]


class Tent(Adapter):
    """One gradient step per batch on the mean entropy of its predictions, with batch norm on the batch's statistics.

    With logits z [B, C] and p = softmax(z)::

        L     = mean_i H_i,    H_i = -sum_c p_ic ln p_ic
        theta = weight and bias of every batch, layer and group norm; all else is frozen

    The logits returned are those of the forward before the update.

    Args:
        lr: learning rate. The literature uses 1e-3 with Adam for CIFAR-C in batches of 200, and with SGD 2.5e-4 for
            ImageNet-C in batches of 64, 1e-3 for a ViT.
        optimizer: "adam" (betas 0.9, 0.999) or "sgd" (`momentum`, `nesterov`, dampening 0); no weight decay.

    A channel with a single value (batch 1, 1 x 1 pixels) has batch variance 0: the layer answers with its bias and
    learns nothing else. On a quantized model gradients pass the activation quantizers straight-through. Errors:
    `InputError` for options out of range, a model without norm parameters and batch norm of another type than
    BatchNorm2d.

    State: the norm parameters, the optimizer's moments and step counts, counters.

    Differs from the paper: the rest of the model is in eval mode (no dropout, no stochastic depth) where the original
    code calls train(); running statistics stay what they were, unused.

    Source: Wang et al., "Tent: fully test-time adaptation by entropy minimization", arXiv 2006.10726, section 3.
    """

    method: ClassVar[str] = "tent"

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        optimizer: str = "adam",
        momentum: float = 0.9,
        nesterov: bool = False,
        check_finite: bool = True,
    ) -> None:
        options = {"lr": lr, "optimizer": optimizer, "momentum": momentum, "nesterov": nesterov}
        super().__init__(model, options=options, check_finite=check_finite)
        for layer in adaptive_batch_norms(self.model, "Tent").values():
            layer.alpha, layer.prior_n = 1.0, None
        affine = norm_affine(self.model, "Tent")
        self.adapt(
            affine, make_optimizer("Tent", affine.values(), optimizer, lr=lr, momentum=momentum, nesterov=nesterov)
        )

    def step(self, x: Tensor) -> Tensor:
        """Logits, then one step on their mean entropy."""
        logits: Tensor = self.model(x)
        self.update(softmax_entropy(logits).mean())
        return logits
