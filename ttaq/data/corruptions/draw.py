"""Random numbers for a batch of images: from the caller's generator, on the images' device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Draw"]


class Draw:
    """Draws on the generator's device and moves the numbers to `device` where that is another one.

    So a CPU generator gives the same numbers whatever device the images are on. All floating numbers are fp32.
    """

    def __init__(self, generator: torch.Generator, device: torch.device) -> None:
        self.generator = generator
        self.device = device

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        values = torch.randn(shape, generator=self.generator, device=self.generator.device, dtype=torch.float32)
        return values.to(self.device)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Numbers uniform in [low, high)."""
        values = torch.rand(shape, generator=self.generator, device=self.generator.device, dtype=torch.float32)
        return values.mul_(high - low).add_(low).to(self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 numbers uniform in low, ..., high - 1."""
        return torch.randint(low, high, shape, generator=self.generator, device=self.generator.device).to(self.device)

    def poisson(self, rate: Tensor) -> Tensor:
        """One Poisson count per entry of `rate`."""
        return torch.poisson(rate.to(self.generator.device), generator=self.generator).to(self.device)
