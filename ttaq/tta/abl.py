"""ABL, the adaptive balance loss of TTAQ: classes that adaptation has favoured so far are held back, the others lifted.

With the prior pi [C] of what the model has favoured, p = softmax(z), and q = softmax(z + ln pi)::

    soft     L = L_method + w mean_i( -sum_c sg[p_ic] ln q_ic )        its gradient is w (q - p) per sample
    hard     L = L_method + w mean_i( -ln q_i,argmax z_i )             Menon et al. with pseudo-labels
    offset   the method's own loss, on z - ln pi                       the adjustment after the fact

The mean is over the samples that the method learns from, with its weights. A uniform pi has q = p: then "soft" and
"offset" are the method itself. The prior, from pseudo-labels and from the gradient of the classifier W that the
entropy would cause, g_ic = -p_ic (ln p_ic + H_i) / B::

    frequency_c = share of argmax z_i = c in the batch            Phi_c <- Phi_c + || sum_i g_ic h_i ||_2
    pi_c        <- m pi_c + (1 - m) frequency_c r_c,              then at least 0.1 / C, and sum 1
    r_c         =  1 ("frequency"),  Phi_c / mean Phi ("gradient"),  min Phi / Phi_c ("inverse"),
                   and "soft": frequency from p, Phi a running mean with momentum m, r = Phi / mean Phi

The floor keeps ln pi finite for classes that have not come yet. The answer may follow the classes of the batch, which
is what a stream that comes in bursts rewards, with the same batch v [C] = mean_i p_i::

    answer   z + a ln v                                               a = 0 leaves it; uniform v changes nothing

Differs from the paper (arXiv 2412.09899, section 3.4): its numbered equations are not public, so these are readings of
its text with the two works that it builds on, logit adjustment (Menon et al., arXiv 2007.07314) and class gradients
(He and Zhu, arXiv 2402.18528). The entropy of q itself would push further into the frequent classes and is left out.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttaq.errors import InputError
from ttaq.tta.running import running_mean_
from ttaq_kernels import softmax_cross_entropy

__all__ = ["Balance"]

Prior = Literal["frequency", "gradient", "inverse", "soft"]
Loss = Literal["soft", "hard", "offset"]

_FLOOR = 0.1  # of 1 / C


class Balance(nn.Module):
    """The prior of a stream and what it adds to a loss. State: buffers `pi` and `phi`, float32 [classes].

    Raises `InputError` for a prior, loss, weight or momentum that does not exist or is out of range.
    """

    pi: Tensor
    phi: Tensor

    def __init__(
        self, classes: int, *, prior: str, loss: str, weight: float, momentum: float, answer: float = 0.0
    ) -> None:
        super().__init__()
        for name, got, known in (("abl", prior, get_args(Prior)), ("abl_loss", loss, get_args(Loss))):
            if got not in known:
                raise InputError(f"Balance: {name} is {got!r}, expected one of {', '.join(known)}, or abl None")
        for name, number in (("abl_weight", weight), ("abl_answer", answer)):
            if not isinstance(number, int | float) or not 0 <= number < float("inf"):
                raise InputError(f"Balance: {name} is {number!r}, expected a number >= 0")
        if not isinstance(momentum, int | float) or not 0 <= momentum < 1:
            raise InputError(f"Balance: abl_momentum is {momentum!r}, expected a number in [0, 1)")
        self.prior, self.loss, self.weight, self.momentum = prior, loss, float(weight), float(momentum)
        self.answer = float(answer)
        self.register_buffer("pi", torch.full((classes,), 1 / classes))
        self.register_buffer("phi", torch.zeros(classes))

    @property
    def needs_features(self) -> bool:
        return self.prior != "frequency"

    @property
    def offset(self) -> Tensor | None:
        """-w ln pi for the loss "offset", else None."""
        return -self.weight * self.pi.float().log() if self.loss == "offset" else None

    def correction(self, logits: Tensor, weights: Tensor | None) -> Tensor:
        """The term that is added to the loss of the method: a scalar, 0 for "offset"."""
        if self.loss == "offset":
            return logits.new_zeros(())
        log_prior = self.pi.float().log()
        if self.loss == "soft":
            per_sample = softmax_cross_entropy(logits, logits.detach(), weights, log_prior)
        else:
            z = logits.float()
            per_sample = functional.cross_entropy(z + log_prior, z.argmax(1), reduction="none")
            per_sample = per_sample if weights is None else weights * per_sample
        count = len(logits) if weights is None else weights.float().sum().clamp(min=1e-6)
        return self.weight * per_sample.sum() / count

    def answered(self, logits: Tensor) -> Tensor:
        """The logits of the answer: z + a ln v."""
        if not self.answer:
            return logits
        mean = logits.detach().float().softmax(1).mean(0)
        return logits + (self.answer * mean.clamp(min=1e-30).log()).to(logits.dtype)

    @torch.no_grad()
    def observe(self, logits: Tensor, features: Tensor | None, weights: Tensor | None) -> None:
        """Take a batch into the prior: all of its samples; `weights` tell whose gradient counts."""
        classes = len(self.pi)
        p = logits.float().softmax(1)
        if self.prior == "soft":
            frequency = p.mean(0)
        else:
            frequency = torch.zeros_like(p).scatter_(1, p.argmax(1, keepdim=True), 1.0).mean(0)
        ratio = torch.ones_like(frequency)
        if features is not None:
            log_p = p.clamp(min=1e-30).log()
            gradient = -p * (log_p - (p * log_p).sum(1, keepdim=True)) / len(p)
            if weights is not None:
                gradient = gradient * weights.float().unsqueeze(1)
            norms = (gradient.T @ features.float()).norm(dim=1)
            if self.prior == "soft":
                running_mean_(self.phi, norms, self.momentum)
            else:
                running_mean_(self.phi, self.phi + norms, 0.0)
            phi = self.phi.float().clamp(min=1e-30)
            ratio = phi.min() / phi if self.prior == "inverse" else phi / phi.mean()
        running_mean_(self.pi, frequency * ratio, self.momentum)
        floored = self.pi.clamp(min=_FLOOR / classes)
        self.pi.copy_(floored / floored.sum())
