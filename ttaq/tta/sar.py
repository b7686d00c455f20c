"""SAR: reliable entropy minimisation towards flat minima, with a way back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ttaq.errors import InputError
from ttaq.tta.norm_learner import NormLearner, NormOptions
from ttaq.tta.running import running_mean_
from ttaq_kernels import softmax_entropy

__all__ = ["SAR"]


@dataclass(frozen=True, kw_only=True)
class SAROptions(NormOptions):
    """entropy_margin: E0 as a share of ln C. radius: rho of the ascent. reset_below: e_m, in nats. skip_last: share of
    the norm layers, counted from the last, that stay as they are."""

    optimizer: str = "sgd"
    entropy_margin: float = 0.4
    radius: float = 0.05
    reset_below: float = 0.2
    skip_last: float = 0.25


class SAR(NormLearner):
    """Entropy of the reliable samples, minimised with sharpness-aware steps, and a reset when it falls too low::

        S1     = {i : H_i(theta) < E0},                       g  = grad mean_{S1} H(theta),   E0 = entropy_margin ln C
        theta' = theta + radius g / (||g|| + 1e-12)           one norm over all parameters
        S2     = {i in S1 : H_i(theta') < E0},                g' = grad mean_{S2} H(theta')
        theta  <- SGD step from theta with g'
        e      <- 0.9 e + 0.1 mean_{S2} H(theta')             beginning with the first value
        if e < reset_below: parameters and optimizer return to the source, and e is forgotten

    Nothing is learned from a batch whose S1 or S2 is empty. The logits returned are those of the first forward.

    Args:
        as in `ttaq.tta.norm_learner.NormOptions`, with SGD. lr: the literature uses 1e-3 for CIFAR-C and ViTs, 2.5e-4
            for ResNet-50 on ImageNet-C.
        entropy_margin, radius, reset_below: 0.4, 0.05 and 0.2 in the paper.
        skip_last: the paper leaves out the last stage of a ResNet and the last blocks of a ViT, by their names; here it
            is a share of the layers, 0.25 by default, whatever their names. 0 adapts all.

    Errors: `InputError` for options out of range, and for a model without norms or without a last linear layer.

    State: the norm parameters, momentum, e, and how many samples were `reliable`, how often it `reset`.

    Differs from the paper: its code steps on momentum alone where S1 or S2 is empty, and writes the old e back after a
    reset; neither is done here.

    Source: Niu et al., "Towards stable test-time adaptation in dynamic wild world", arXiv 2302.12400, algorithm 1.
    """

    method: ClassVar[str] = "sar"
    Options = SAROptions
    settings: SAROptions
    needs_classes = True
    tallies = ("reliable", "resets")
    entropy_mean: Tensor

    def choose(self, affine: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        share = self.settings.skip_last
        if not isinstance(share, int | float) or not 0 <= share < 1:
            raise InputError(f"{self._who}: skip_last is {share!r}, expected a share in [0, 1)")
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in affine))
        kept = set(layers[: len(layers) - int(share * len(layers))])
        return {name: parameter for name, parameter in affine.items() if name.rpartition(".")[0] in kept}

    def prepare(self, affine: dict[str, nn.Parameter], source_images: Tensor | None) -> None:  # noqa: ARG002
        for name in ("entropy_margin", "radius", "reset_below"):
            value = getattr(self.settings, name)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise InputError(f"{self._who}: {name} is {value!r}, expected a number >= 0")
        self.register_buffer("entropy_mean", next(iter(affine.values())).new_full((), -1.0, dtype=torch.float32))

    def step(self, x: Tensor) -> Tensor:
        """Logits, then one sharpness-aware step."""
        logits, _ = self.see(x)
        answer = self.answered(logits)
        margin = self.settings.entropy_margin * math.log(self.classes)
        reliable = softmax_entropy(logits.detach()) < margin
        self.tally(reliable=reliable.sum())
        loss = softmax_entropy(logits, reliable, self.offset).sum() / reliable.sum().clamp(min=1)
        if self.balance is not None:
            loss = loss + self.balance.correction(logits, reliable)
        parameters = [parameter for _, parameter in self.parameters_adapted()]
        here = [parameter.detach().clone() for parameter in parameters]
        try:
            self._ascend(loss, parameters)
            second, features = self.see(x)
            with torch.no_grad():
                entropy = softmax_entropy(second.detach())
                chosen = reliable & (entropy < margin)
                count = chosen.sum()
            loss = softmax_entropy(second, chosen, self.offset).sum() / count.clamp(min=1)
            self.learn(loss, second, features, chosen, when=count > 0, start=here)
        except BaseException:
            self.put(here)
            raise
        self._look_back((entropy * chosen).sum() / count.clamp(min=1), count > 0)
        return answer

    def _ascend(self, loss: Tensor, parameters: list[nn.Parameter]) -> None:
        """theta' = theta + radius g / (||g|| + 1e-12)"""
        with torch.autocast(loss.device.type, enabled=False):
            gradients = torch.autograd.grad(loss, parameters)
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        with torch.no_grad():
            step = torch._foreach_mul(gradients, self.settings.radius / (norm + 1e-12))
            torch._foreach_add_([parameter.detach() for parameter in parameters], step)

    @torch.no_grad()
    def _look_back(self, entropy: Tensor, when: Tensor) -> None:
        """The running entropy with that of this batch, and the reset when it is too low. Negative stands for none."""
        running_mean_(self.entropy_mean, entropy, torch.where(self.entropy_mean < 0, 0.0, 0.9), when)
        low = when & (self.entropy_mean >= 0) & (self.entropy_mean < self.settings.reset_below)
        self.restore(low)
        self.entropy_mean.copy_(torch.where(low, -1.0, self.entropy_mean))
        self.tally(resets=low)
