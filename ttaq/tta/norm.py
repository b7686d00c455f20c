"""Norm: batch norm on statistics of the test batch."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ttaq.errors import InputError
from ttaq.nn.adapt_norms import adaptive_batch_norms
from ttaq.tta.adapter import Adapter

__all__ = ["Norm"]


class Norm(Adapter):
    """Batch norm whose statistics are those of the source data mixed with those of the batch; nothing is learned.

    For each channel of each `BatchNorm2d`, with the running statistics as source and the biased variance of the batch::

        mean = (1 - alpha) mean_source + alpha mean_batch
        var  = (1 - alpha) var_source  + alpha var_batch          (no term for the gap of the two means)

    Args:
        alpha: share of the batch in [0, 1]. 1 (the default) is "BN adapt" or "BN-1" and needs no running statistics,
            0 is Source, 0.1 suits single images.
        prior_n: instead of `alpha`, how many images the source statistics count for: `alpha = B / (B + prior_n)`.

    A channel with a single value (batch 1, 1 x 1 pixels) has batch variance 0, so alpha 1 answers with the layer's
    bias. Errors: `InputError` for both options at once, options out of range, a model without batch norm and one with
    batch norm of another type than BatchNorm2d.

    State: counters only. Weights, biases and running statistics never change.

    Differs from the paper: in nothing; implementations that read the variance off a momentum-1 buffer use the unbiased
    one.

    Source: Schneider et al., "Improving robustness against common corruptions by covariate shift adaptation",
    arXiv 2006.16971, section 3; Nado et al., arXiv 2006.10963 (alpha 1).
    """

    method: ClassVar[str] = "norm"

    def __init__(
        self, model: nn.Module, *, alpha: float | None = None, prior_n: int | None = None, check_finite: bool = True
    ) -> None:
        if alpha is not None and prior_n is not None:
            raise InputError(f"Norm: got alpha {alpha} and prior_n {prior_n}, expected at most one of them")
        if prior_n is not None and (type(prior_n) is not int or prior_n < 0):
            raise InputError(f"Norm: prior_n is {prior_n!r}, expected an integer >= 0, a number of images")
        alpha = 1.0 if alpha is None and prior_n is None else alpha
        if alpha is not None and (not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1):
            raise InputError(f"Norm: alpha is {alpha!r}, expected a number in [0, 1], the share of the batch")
        super().__init__(model, options={"alpha": alpha, "prior_n": prior_n}, check_finite=check_finite)
        layers = adaptive_batch_norms(self.model, "Norm")
        if not layers:
            raise InputError("Norm: the model has no batch norm, expected some; use 'tent' for layer and group norm")
        for name, layer in layers.items():
            if layer.running_mean is None and alpha != 1:
                raise InputError(f"Norm: {name} has no running statistics to mix with those of the batch; use alpha 1")
            layer.alpha, layer.prior_n = alpha, prior_n

    def step(self, x: Tensor) -> Tensor:
        """Logits with the statistics of this batch."""
        logits: Tensor = self.model(x)
        return logits
