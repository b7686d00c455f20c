"""TENT: entropy minimisation over the affine parameters of the norm layers."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ttaq.tta.norm_learner import NormLearner
from ttaq_kernels import softmax_entropy

__all__ = ["Tent"]


class Tent(NormLearner):
    """One gradient step per batch on the mean entropy of its predictions, with batch norm on the batch's statistics.

    With logits z [B, C] and p = softmax(z)::

        L     = mean_i H_i,    H_i = -sum_c p_ic ln p_ic
        theta = weight and bias of every batch, layer and group norm; all else is frozen

    The logits returned are those of the forward before the update.

    Args:
        as in `ttaq.tta.norm_learner.NormOptions`. lr: the literature uses 1e-3 with Adam for CIFAR-C in batches of
            200, and with SGD 2.5e-4 for ImageNet-C in batches of 64, 1e-3 for a ViT.

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

    def step(self, x: Tensor) -> Tensor:
        """Logits, then one step on their mean entropy."""
        logits, features = self.see(x)
        answer = self.answered(logits)
        self.learn(softmax_entropy(logits, offset=self.offset).mean(), logits, features)
        return answer
