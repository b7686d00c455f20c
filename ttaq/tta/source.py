"""Source: no adaptation."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ttaq.tta.adapter import Adapter

__all__ = ["Source"]


class Source(Adapter):
    """The model as it came, in eval mode with its running statistics: `z = model(x)`.

    State: counters only.
    """

    method: ClassVar[str] = "source"

    def __init__(self, model: nn.Module, *, check_finite: bool = True) -> None:
        super().__init__(model, options={}, check_finite=check_finite)

    def step(self, x: Tensor) -> Tensor:
        """Logits of the source model."""
        logits: Tensor = self.model(x)
        return logits
