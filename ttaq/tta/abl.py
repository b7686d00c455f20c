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

The floor keeps ln pi finite for classes that have not come yet. Unless it is given, the momentum remembers as many
images as let each class come five times, and ten batches at least::

    m = max(0.9, 1 - B / (5 C))                                            0.9 for 10 classes, 0.99 for 1,000, B = 50

The answer may follow the classes of the batch, where they are not those of the stream so far: where a stream comes in
bursts. With the shares of the batch v = mean_i p_i, those of the stream u (a running mean of v, floored like pi), and
one image in u's shares added to the B of the batch::

    answer   z + a s ln( (B v + u) / ((B + 1) u) )                    a = 0 leaves it
    s        = max(0, 1 - (C - 1) / chi2),      chi2 = B sum_c (v_c - u_c)^2 / u_c

chi2 is about C - 1 at most where the batch is a fair draw from the stream: then s is 0, and the answer as it was. The
shrinkage is that of James and Stein (1961) with the statistic of Pearson. Statistics of the batch take out of the
features part of what tells the classes of the batch, so that v is flatter than they are: hence a above 1.

Differs from the paper (arXiv 2412.09899, section 3.4): its numbered equations are not public, so these are readings of
its text with the two works that it builds on, logit adjustment (Menon et al., arXiv 2007.07314) and class gradients
(He and Zhu, arXiv 2402.18528); the answer is not in it. The entropy of q itself would push further into the frequent
classes and is left out.
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
    """The prior of a stream and what it adds to a loss. State: buffers `pi`, `phi`, `shares`, float32 [classes].

    Raises `InputError` for a prior, loss, weight or momentum that does not exist or is out of range.
    """

    pi: Tensor
    phi: Tensor
    shares: Tensor

    def __init__(
        self, classes: int, *, prior: str, loss: str, weight: float, momentum: float | None, answer: float = 0.0
    ) -> None:
        super().__init__()
        for name, got, known in (("abl", prior, get_args(Prior)), ("abl_loss", loss, get_args(Loss))):
            if got not in known:
                raise InputError(f"Balance: {name} is {got!r}, expected one of {', '.join(known)}, or abl None")
        for name, number in (("abl_weight", weight), ("abl_answer", answer)):
            if not isinstance(number, int | float) or not 0 <= number < float("inf"):
                raise InputError(f"Balance: {name} is {number!r}, expected a number >= 0")
        if momentum is not None and (not isinstance(momentum, int | float) or not 0 <= momentum < 1):
            raise InputError(f"Balance: abl_momentum is {momentum!r}, expected a number in [0, 1), or None")
        self.prior, self.loss, self.weight, self.momentum = prior, loss, float(weight), momentum
        self.answer = float(answer)
        self.register_buffer("pi", torch.full((classes,), 1 / classes))
        self.register_buffer("phi", torch.zeros(classes))
        self.register_buffer("shares", torch.full((classes,), 1 / classes))

    @torch.no_grad()
    def forget(self) -> None:
        """Back to the beginning."""
        self.pi.fill_(1 / len(self.pi))
        self.phi.zero_()
        self.shares.fill_(1 / len(self.shares))

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

    @torch.no_grad()
    def answered(self, logits: Tensor) -> Tensor:
        """The logits of the answer, see above."""
        if not self.answer:
            return logits
        images, classes = logits.shape
        batch, stream = logits.float().softmax(1).mean(0), self.shares.float()
        chi2 = images * ((batch - stream).square() / stream).sum()
        certain = (1 - (classes - 1) / chi2.clamp(min=1e-30)).clamp(min=0)
        lift = ((images * batch + stream) / ((images + 1) * stream)).log()
        return logits + (self.answer * certain * lift).to(logits.dtype)

    @torch.no_grad()
    def observe(self, logits: Tensor, features: Tensor | None, weights: Tensor | None) -> None:
        """Take a batch into the prior: all of its samples; `weights` tell whose gradient counts."""
        classes = len(self.pi)
        momentum = max(0.9, 1 - len(logits) / (5 * classes)) if self.momentum is None else self.momentum
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
                running_mean_(self.phi, norms, momentum)
            else:
                running_mean_(self.phi, self.phi + norms, 0.0)
            phi = self.phi.float().clamp(min=1e-30)
            ratio = phi.min() / phi if self.prior == "inverse" else phi / phi.mean()
        for buffer, value in ((self.pi, frequency * ratio), (self.shares, p.mean(0))):
            running_mean_(buffer, value, momentum)
            floored = buffer.clamp(min=_FLOOR / classes)
            buffer.copy_(floored / floored.sum())
