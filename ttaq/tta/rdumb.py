"""RDumb: ETA that starts anew at fixed intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ttaq.errors import InputError
from ttaq.tta.eta import ETA, ETAOptions

__all__ = ["RDumb"]


@dataclass(frozen=True, kw_only=True)
class RDumbOptions(ETAOptions):
    """reset_every: batches after which everything learned is forgotten."""

    reset_every: int = 1000


class RDumb(ETA):
    """ETA whose parameters, optimizer, mean prediction and balance of the classes, where it is on, return to the source
    after every `reset_every` batches.

    Args:
        reset_every: 1,000 in the paper.
        the others as in `ETA`.

    State: that of `ETA`; the number of batches, which is a counter of every method, says when.

    Differs from the paper: in nothing.

    Source: Press et al., "RDumb: a simple approach that questions our progress in continual test-time adaptation",
    arXiv 2306.05401.
    """

    method: ClassVar[str] = "rdumb"
    Options = RDumbOptions
    settings: RDumbOptions

    def prepare(self, affine: dict[str, nn.Parameter], source_images: Tensor | None) -> None:
        super().prepare(affine, source_images)
        every = self.settings.reset_every
        if type(every) is not int or every < 1:
            raise InputError(f"{self._who}: reset_every is {every!r}, expected a number of batches from 1")

    def step(self, x: Tensor) -> Tensor:
        """As ETA; the last batch of an interval is the last that is remembered."""
        logits = super().step(x)
        if (self._seen["batches"] + 1) % self.settings.reset_every == 0:
            self.restore(torch.ones((), dtype=torch.bool, device=logits.device))
            self.mean_prediction.zero_()
            if self.balance is not None:
                self.balance.forget()
        return logits
