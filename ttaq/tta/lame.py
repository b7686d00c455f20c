"""LAME: the answers of a batch, drawn towards those of its neighbours."""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttaq.errors import InputError
from ttaq.nn.classifier import find_classifier, logits_and_features
from ttaq.tta.adapter import Adapter

__all__ = ["LAME"]

Kernel = Literal["rbf", "knn", "linear"]


class LAME(Adapter):
    """Probabilities of a batch that agree with the source model and with those of images near by; nothing is learned.

    With p [B, C] of the source model, its features h [B, d] of length 1 and a kernel K [B, B]::

        u = -ln(p + 1e-10),   Y = softmax(-u),   then `iterations` times   Y <- softmax(-u + K Y)

        "rbf"     K_ij = exp(-|h_i - h_j|^2 / 2 s^2),  s = mean distance to the `neighbours`-th nearest, oneself the 1st
        "knn"     K_ij = 1 where j is one of the `neighbours` nearest of i, without i; else 0
        "linear"  K_ij = h_i . h_j

    The answer is ln Y, float32: its softmax is Y.

    Args:
        kernel: as above. neighbours: 5 in the literature, fewer in a batch that has no more. symmetric: whether "knn"
            becomes (K + K^T) / 2; the others are symmetric.
        iterations: 100 in the paper.

    A batch of one image gets the answer of the source model. Meant for streams whose neighbouring images are of the
    same class; on others it makes things worse. Errors: `InputError` for options out of range, and for a model that
    does not end with a linear layer.

    State: counters only. Weights and statistics never change: batch norm keeps those of the source.

    Differs from the paper: it stops early where E = sum(u Y - (K Y_before) Y + Y ln Y) changes by no more than 1e-8 of
    itself. Here all `iterations` run, so that the host never waits for E: what they still change is within rounding.

    Source: Boudiaf et al., "Parameter-free online test-time adaptation", arXiv 2201.05718.
    """

    method: ClassVar[str] = "lame"

    def __init__(
        self,
        model: nn.Module,
        *,
        kernel: str = "rbf",
        neighbours: int = 5,
        symmetric: bool = False,
        iterations: int = 100,
        check_finite: bool = True,
    ) -> None:
        if kernel not in get_args(Kernel):
            raise InputError(f"LAME: kernel is {kernel!r}, expected one of {', '.join(get_args(Kernel))}")
        for name, count in (("neighbours", neighbours), ("iterations", iterations)):
            if type(count) is not int or count < 1:
                raise InputError(f"LAME: {name} is {count!r}, expected an integer >= 1")
        if not isinstance(symmetric, bool):
            raise InputError(f"LAME: symmetric is {symmetric!r}, expected True or False")
        options = {"kernel": kernel, "neighbours": neighbours, "symmetric": symmetric, "iterations": iterations}
        super().__init__(model, options=options, check_finite=check_finite)
        self._classifier = find_classifier(self.model, "LAME")

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """ln Y of this batch."""
        logits, features = logits_and_features(self.model, x, self._classifier, "LAME")
        if len(x) == 1:
            return logits.float().log_softmax(1)
        with torch.autocast(x.device.type, enabled=False):
            return self._settle(logits.float().softmax(1), self._kernel(features.float()))

    def answer(self, x: Tensor) -> Tensor:
        """The same: nothing is learned."""
        return self.step(x)

    def _settle(self, p: Tensor, kernel: Tensor) -> Tensor:
        u = -(p + 1e-10).log()
        log_y = (-u).log_softmax(1)
        for _ in range(self.options["iterations"]):
            log_y = (kernel @ log_y.exp() - u).log_softmax(1)
        return log_y

    def _kernel(self, features: Tensor) -> Tensor:
        h = functional.normalize(features, dim=1)
        if self.options["kernel"] == "linear":
            return h @ h.T
        neighbours: int = self.options["neighbours"]
        # Not by 2 - 2 cos, which leaves few digits to features that are near to each other.
        distance = torch.cdist(h, h, compute_mode="donot_use_mm_for_euclid_dist")
        if self.options["kernel"] == "rbf":
            width = distance.topk(min(neighbours, len(h)), dim=1, largest=False).values[:, -1].mean()
            return (-0.5 * (distance / width.clamp(min=1e-6)) ** 2).exp()
        nearest = distance.fill_diagonal_(torch.inf).topk(min(neighbours, len(h) - 1), dim=1, largest=False).indices
        kernel = torch.zeros_like(distance).scatter_(1, nearest, 1.0)
        return (kernel + kernel.T) / 2 if self.options["symmetric"] else kernel
