"""ROID: robust on streams of any kind, by weighting, ensembling with the source, and a correction of the prior."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttaq.data.augment import augment
from ttaq.errors import InputError
from ttaq.tta.norm_learner import NormLearner, NormOptions
from ttaq.tta.running import running_mean_
from ttaq_kernels import soft_likelihood_ratio, softmax_cross_entropy, softmax_entropy

__all__ = ["ROID"]


@dataclass(frozen=True, kw_only=True)
class ROIDOptions(NormOptions):
    """temperature: tau of the weights. source_share: of the source parameters after each step. consistency: the term
    with the augmented images. prior_correction: of the answer."""

    temperature: float = 1 / 3
    source_share: float = 0.01
    consistency: bool = True
    prior_correction: bool = True


class ROID(NormLearner):
    """Soft likelihood ratio and consistency on certain and diverse samples, never far from the source.

    With logits z [B, C], p = softmax(z), q a running mean of the predictions, z' the logits of augmented images::

        d_i = minmax(1 - cos(q, p_i)),   c_i = minmax(-H_i)                          minmax: to [0, 1] over the batch
        w_i = exp(d_i c_i / temperature)  if d_i >= mean d, else 0
        L   = 1/B sum_i w_i (SLR(z_i) + SCE(z'_i, z_i))                              gradient through both z and z'
        theta <- 0.99 (theta after the step) + 0.01 theta0
        q     <- 0.9 q + 0.1 mean_i p_i                                              beginning with 1 / C

    and the answer, with v the mean of p over the batch, smoothed by s = max(1/B, 1/C) / max v::

        z_ic C (v_c + s) / (1 + s C)

    Args:
        as in `ttaq.tta.norm_learner.NormOptions`. lr: the literature uses 1e-3 with Adam for CIFAR-C, and with SGD
            2.5e-4 for ImageNet-C.
        temperature: 1/3. source_share: 0.01; 0 is no ensembling.
        consistency, prior_correction: whether these parts are there.

    Where all samples are alike (a batch of one) minmax is 0 and every weight is 1. Errors: `InputError` for options
    out of range, and for a model without norms or without a last linear layer.

    State: the norm parameters, optimizer, q, and how many samples were `chosen`.

    Differs from the paper: the factor of the answer is C times its, so that a uniform v leaves the logits, and with
    them the confidence, as they are; the sums are divided by the size of the batch, not by a configured one; the
    consistency term also forwards the samples whose weight is 0, which keeps every shape fixed.

    Source: Marsden et al., "Universal test-time adaptation through weight ensembling, diversity weighting, and prior
    correction", arXiv 2306.00650, section 3.
    """

    method: ClassVar[str] = "roid"
    Options = ROIDOptions
    settings: ROIDOptions
    needs_classes = True
    tallies = ("chosen",)
    mean_prediction: Tensor

    def prepare(self, affine: dict[str, nn.Parameter], source_images: Tensor | None) -> None:  # noqa: ARG002
        temperature, share = self.settings.temperature, self.settings.source_share
        if not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
            raise InputError(f"ROID: temperature is {temperature!r}, expected a number above 0")
        if not isinstance(share, int | float) or not 0 <= share <= 1:
            raise InputError(f"ROID: source_share is {share!r}, expected a share in [0, 1]")
        some = next(iter(affine.values()))
        mean = some.new_full((self.classes,), 1 / self.classes, dtype=torch.float32)
        self.register_buffer("mean_prediction", mean)

    @property
    def augments(self) -> bool:
        return self.settings.consistency

    def step(self, x: Tensor) -> Tensor:
        """The corrected logits, then one step."""
        logits, features = self.see(x)
        answer = self.answered(logits)
        p = logits.detach().float().softmax(1)
        weights = self._weights(p, softmax_entropy(logits.detach()))
        self.tally(chosen=(weights > 0).sum())
        loss = soft_likelihood_ratio(logits, weights, self.offset)
        if self.settings.consistency:
            view: Tensor = self.model(augment(x, self.generator(), padding="reflect", blur=False, noise=0.0))
            loss = loss + softmax_cross_entropy(view, logits, weights, symmetric=True)
        self.learn(loss.sum() / len(x), logits, features, weights)
        self._ensemble()
        running_mean_(self.mean_prediction, p.mean(0), 0.9)
        return answer

    def answered(self, logits: Tensor) -> Tensor:
        """With the correction of the prior, and what the balance of the classes makes of it."""
        return super().answered(self._corrected(logits))

    def _weights(self, p: Tensor, entropy: Tensor) -> Tensor:
        similarity = functional.cosine_similarity(self.mean_prediction.to(p.dtype).unsqueeze(0), p, dim=1)
        diversity, certainty = _minmax(1 - similarity), _minmax(-entropy)
        weights = (diversity * certainty / self.settings.temperature).exp()
        return torch.where(diversity >= diversity.mean(), weights, 0.0)

    @torch.no_grad()
    def _ensemble(self) -> None:
        parameters = [parameter.detach() for _, parameter in self.parameters_adapted()]
        torch._foreach_lerp_(parameters, self.source_values, self.settings.source_share)

    def _corrected(self, logits: Tensor) -> Tensor:
        if not self.settings.prior_correction:
            return logits
        batch, classes = logits.shape
        mean = logits.detach().float().softmax(1).mean(0)
        smoothing = max(1 / batch, 1 / classes) / mean.max()
        return logits * (classes * (mean + smoothing) / (1 + smoothing * classes)).to(logits.dtype)


def _minmax(values: Tensor) -> Tensor:
    """To [0, 1]; all 0 where all are equal."""
    low, high = values.min(), values.max()
    return (values - low) / torch.where(high > low, high - low, 1.0)
