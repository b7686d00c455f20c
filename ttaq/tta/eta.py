"""ETA: entropy minimisation on samples that are reliable and not redundant."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttaq.errors import InputError
from ttaq.tta.norm_learner import NormLearner, NormOptions
from ttaq.tta.running import running_mean_
from ttaq_kernels import softmax_entropy

__all__ = ["ETA", "ETAOptions"]


@dataclass(frozen=True, kw_only=True)
class ETAOptions(NormOptions):
    """entropy_margin: E0 as a share of ln C. redundancy: eps, the |cosine| from which a sample counts as redundant."""

    entropy_margin: float = 0.4
    redundancy: float = 0.4


class ETA(NormLearner):
    """Tent on the samples worth it: those that are certain, unlike the ones before, and the more certain the more.

    With logits z [B, C], p = softmax(z), entropies H_i and E0 = entropy_margin ln C::

        S1 = {i : H_i < E0}                                                        reliable
        S2 = {i in S1 : |cos(m, p_i)| < redundancy},  S2 = S1 while there is no m  not redundant
        L  = 1/|S2| sum_{i in S2} exp(E0 - H_i) H_i                                the factor is a constant
        m  = mean of p over the first S1 that is not empty, then 0.9 m + 0.1 mean of p over S2

    Where S2 is empty nothing is learned. The logits returned are those of the forward before the update.

    Args:
        as in `ttaq.tta.norm_learner.NormOptions`, and
        entropy_margin: 0.4.
        redundancy: the literature uses 0.4 for 10 classes, 0.1 for 100, 0.05 for 1,000.

    Errors: `InputError` for options out of range, and for a model without norms or without a last linear layer.

    State: the norm parameters, optimizer, m, and how many samples were `reliable` and `chosen`.

    Differs from the paper: in nothing; the samples left out run through the backward with weight 0, which keeps every
    shape fixed.

    Source: Niu et al., "Efficient test-time model adaptation without forgetting", arXiv 2204.02610, equations 2 to 6.
    """

    method: ClassVar[str] = "eta"
    Options = ETAOptions
    settings: ETAOptions
    needs_classes = True
    tallies = ("reliable", "chosen")
    mean_prediction: Tensor

    def prepare(self, affine: dict[str, nn.Parameter], source_images: Tensor | None) -> None:  # noqa: ARG002
        for name in ("entropy_margin", "redundancy"):
            value = getattr(self.settings, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise InputError(f"{self._who}: {name} is {value!r}, expected a number above 0")
        some = next(iter(affine.values()))
        self.register_buffer("mean_prediction", some.new_zeros(self.classes, dtype=torch.float32))

    def step(self, x: Tensor) -> Tensor:
        """Logits, then one step on the weighted entropy of the chosen samples."""
        logits, features = self.see(x)
        answer = self.answered(logits)
        margin = self.settings.entropy_margin * math.log(self.classes)
        with torch.no_grad():
            p = logits.float().softmax(1)
            entropy = softmax_entropy(logits.detach())
            reliable = entropy < margin
            started = self.mean_prediction.any()
            similarity = functional.cosine_similarity(self.mean_prediction.unsqueeze(0), p, dim=1).abs()
            chosen = reliable & (~started | (similarity < self.settings.redundancy))
            count = chosen.sum()
            weights = torch.where(chosen, (margin - entropy).exp(), 0.0)
            self.tally(reliable=reliable.sum(), chosen=count)
        loss = softmax_entropy(logits, weights, self.offset).sum() / count.clamp(min=1)
        self.learn(loss + self.anchor(), logits, features, weights, when=count > 0)
        with torch.no_grad():
            mean = (p * chosen.unsqueeze(1)).sum(0) / count.clamp(min=1)
            running_mean_(self.mean_prediction, mean, torch.where(started, 0.9, 0.0), when=count > 0)
        return answer

    def anchor(self) -> Tensor:
        """What holds the parameters where they were: nothing here."""
        return self.mean_prediction.new_zeros(())
