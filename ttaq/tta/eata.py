"""EATA: ETA with parameters that matter to the source data held near where they were."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttaq.errors import InputError
from ttaq.tta.eta import ETA, ETAOptions
from ttaq.tta.images import check_source_images

__all__ = ["EATA"]

_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class EATAOptions(ETAOptions):
    """fisher_weight: of the term that holds the parameters."""

    fisher_weight: float = 1.0


class EATA(ETA):
    """ETA with a quadratic penalty on leaving the source parameters, weighted by their Fisher information::

        L   = L_ETA + fisher_weight sum_k F_k (theta_k - theta0_k)^2
        F_k = mean over mini-batches of (d/d theta_k mean_i CE(z_i, argmax z_i))^2

    F is taken once, from `source_images` in mini-batches of 64 with batch norm on their own statistics.

    Args:
        source_images: [N, 3, H, W] of the data that the model was trained on, without labels; the literature uses
            2,000.
        fisher_weight: the literature uses 1 for CIFAR and 2,000 for ImageNet.
        the others as in `ETA`.

    Errors: those of `ETA`, and `InputError` without source images.

    State: that of `ETA`, and F.

    Differs from the paper: in nothing.

    Source: Niu et al., arXiv 2204.02610, equations 7 to 9.
    """

    method: ClassVar[str] = "eata"
    Options = EATAOptions
    settings: EATAOptions
    source_images = 2000

    def prepare(self, affine: dict[str, nn.Parameter], source_images: Tensor | None) -> None:
        super().prepare(affine, source_images)
        weight = self.settings.fisher_weight
        if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise InputError(f"{self._who}: fisher_weight is {weight!r}, expected a number >= 0")
        images = check_source_images(self._who, source_images, "eta")
        self._fisher_names = [f"fisher/{name.replace('.', '/')}" for name in affine]
        for name, fisher in zip(self._fisher_names, self._fisher(affine, images), strict=True):
            self.register_buffer(name, fisher)

    @torch.enable_grad()
    def _fisher(self, affine: dict[str, nn.Parameter], images: Tensor) -> list[Tensor]:
        parameters = list(affine.values())
        fisher = [torch.zeros_like(parameter) for parameter in parameters]
        for parameter in parameters:
            parameter.requires_grad_(True)
        batches = torch.split(images.detach(), _BATCH)
        for batch in batches:
            logits = self.model(batch.to(parameters[0].device))
            loss = functional.cross_entropy(logits, logits.argmax(1))
            for total, gradient in zip(fisher, torch.autograd.grad(loss, parameters), strict=True):
                total += gradient**2 / len(batches)
        return fisher

    def anchor(self) -> Tensor:
        """fisher_weight sum F (theta - theta0)^2"""
        total = self.mean_prediction.new_zeros(())
        fisher = [self.get_buffer(name) for name in self._fisher_names]
        parameters = [parameter for _, parameter in self.parameters_adapted()]
        for weight, parameter, source in zip(fisher, parameters, self.source_values, strict=True):
            total = total + (weight * (parameter - source) ** 2).sum()
        return self.settings.fisher_weight * total
