"""DELTA: entropy minimisation with rarely predicted classes weighted up and batch norm renormalised."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from ttaq.errors import InputError
from ttaq.nn.adapt_norms import adaptive_batch_norms
from ttaq.nn.batch_norm import AdaptiveBatchNorm2d
from ttaq.tta.norm_learner import NormLearner, NormOptions
from ttaq.tta.running import running_mean_, running_means_
from ttaq_kernels import softmax_cross_entropy, softmax_entropy

__all__ = ["DELTA"]

Loss = Literal["entropy", "weighted", "pseudo_label"]

_ENTROPY_MARGIN = 0.5  # of ln C
_CONFIDENT = 0.4
_RAREST = 1e-12


@dataclass(frozen=True, kw_only=True)
class DELTAOptions(NormOptions):
    """loss: "entropy", "weighted" or "pseudo_label". renormalise: TBR. reweight: DOT. prior_momentum: of the class
    frequencies. statistics_momentum: of the moving mean and standard deviation."""

    loss: str = "entropy"
    renormalise: bool = True
    reweight: bool = True
    prior_momentum: float = 0.95
    statistics_momentum: float = 0.95


class DELTA(NormLearner):
    """Tent and its relatives with two corrections for streams whose classes come unevenly, DOT and TBR.

    With logits z [B, C], p = softmax(z), entropies H_i and class frequencies q [C], 1/C in the beginning::

        w_i = B (1/q_yi) / sum_j (1/q_yj),   y_i = argmax p_i                         DOT, dynamic online re-weighting
        L   = mean over the samples used of w_i e_i l_i                              w and e are constants
        q   <- prior_momentum q + (1 - prior_momentum) mean_i p_i                     after the step, with p before it

        "entropy"       l = H,      e = 1,                     all are used
        "weighted"      l = H,      e = exp(0.5 ln C - H),     used where e > 1
        "pseudo_label"  l = -ln p_iyi,  e = 1,                 used where p_iyi > 0.4

    TBR, test-time batch renormalisation: with moving statistics m, s of the batches' mean and standard deviation
    sqrt(var + eps), and gradients that see those of the batch (sg[] is constant to them)::

        y = ((x - mean) / std * sg[std / s] + sg[(mean - m) / s]) * weight + bias  =  (x - m) / s * weight + bias
        m <- statistics_momentum m + (1 - statistics_momentum) mean                   after use; s the same with std

    m and s begin with the statistics of the first batch, which is normalised with them.

    Where no sample is used, nothing is learned. The logits returned are those of the forward before the update.

    Args:
        as in `ttaq.tta.norm_learner.NormOptions`; the paper uses SGD with lr 2.5e-4 for ResNet-50 in batches of 64.
        loss: as above. prior_momentum, statistics_momentum: as above, 0.95 both in the paper.
        renormalise: whether there is TBR; else batch norm runs on the statistics of the batch. Layer and group norm
            stay as they are.
        reweight: whether there is DOT; else w is 1.

    Errors: `InputError` for options out of range, and for a model without norms or without a last linear layer.

    State: the norm parameters, optimizer, q, the moving statistics, and how many samples were `used`.

    Differs from the paper: in nothing; the samples left out run through the backward with weight 0, and frequencies
    count as 1e-12 at least.

    Source: Zhao et al., "DELTA: degradation-free fully test-time adaptation", arXiv 2301.13018.
    """

    method: ClassVar[str] = "delta"
    Options = DELTAOptions
    settings: DELTAOptions
    needs_classes = True
    tallies = ("used",)
    frequency: Tensor

    def set_norms(self) -> None:
        super().set_norms()
        self._renormalised: dict[str, AdaptiveBatchNorm2d] = {}
        if self.settings.renormalise:
            self._renormalised = adaptive_batch_norms(self.model, self._who)
        for layer in self._renormalised.values():
            layer.start_renormalising()

    def prepare(self, affine: dict[str, nn.Parameter], source_images: Tensor | None) -> None:  # noqa: ARG002
        if self.settings.loss not in get_args(Loss):
            raise InputError(
                f"{self._who}: loss is {self.settings.loss!r}, expected one of {', '.join(get_args(Loss))}"
            )
        for name in ("renormalise", "reweight"):
            if not isinstance(getattr(self.settings, name), bool):
                raise InputError(f"{self._who}: {name} is {getattr(self.settings, name)!r}, expected True or False")
        for name in ("prior_momentum", "statistics_momentum"):
            value = getattr(self.settings, name)
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise InputError(f"{self._who}: {name} is {value!r}, expected a number in [0, 1)")
        some = next(iter(affine.values()))
        self.register_buffer("frequency", some.new_full((self.classes,), 1 / self.classes, dtype=torch.float32))

    def changing_buffers(self) -> list[str]:
        names = (dict(layer.named_buffers(prefix=name, recurse=False)) for name, layer in self._renormalised.items())
        return [key for keys in names for key in keys if key.endswith(("moving_mean", "moving_std"))]

    def step(self, x: Tensor) -> Tensor:
        """Logits, then one step on the weighted loss of the samples used."""
        logits, features = self.see(x)
        answer = self.answered(logits)
        with torch.no_grad():
            p = logits.float().softmax(1)
            confidence, label = p.max(1)
            weights = self._class_weights(label) if self.settings.reweight else torch.ones_like(confidence)
            used = torch.ones_like(label, dtype=torch.bool)
            if self.settings.loss == "weighted":
                certainty = (_ENTROPY_MARGIN * math.log(self.classes) - softmax_entropy(logits.detach())).exp()
                used, weights = certainty > 1, weights * certainty
            elif self.settings.loss == "pseudo_label":
                used = confidence > _CONFIDENT
            weights, count = torch.where(used, weights, 0.0), used.sum()
            self.tally(used=count)
        if self.settings.loss == "pseudo_label":
            # As logits: e^-1e4 is 0, and unlike -inf it makes no loss infinite.
            certain = torch.full_like(logits, -1e4).scatter_(1, label.unsqueeze(1), 0.0)
            loss = softmax_cross_entropy(logits, certain, weights, self.offset)
        else:
            loss = softmax_entropy(logits, weights, self.offset)
        self.learn(loss.sum() / count.clamp(min=1), logits, features, weights, when=count > 0)
        running_mean_(self.frequency, p.mean(0), self.settings.prior_momentum)
        self._move_statistics()
        return answer

    def _class_weights(self, label: Tensor) -> Tensor:
        """w_i, with mean 1 over the batch."""
        inverse = (1 / self.frequency.clamp(min=_RAREST))[label]
        return inverse / inverse.mean()

    @torch.no_grad()
    def _move_statistics(self) -> None:
        moved = [layer for layer in self._renormalised.values() if layer.statistics is not None]
        if not moved:
            return
        means = [vector for layer in moved for vector in (layer.moving_mean, layer.moving_std)]
        batch = [vector for layer in moved for vector in layer.statistics or ()]
        started = torch.cat([layer.moving_std for layer in moved]).any()
        running_means_(means, batch, torch.where(started, self.settings.statistics_momentum, 0.0))
        for layer in moved:
            layer.statistics = None
