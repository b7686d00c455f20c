"""Running means that one bad batch cannot spoil."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["running_mean_"]


@torch.no_grad()
def running_mean_(mean: Tensor, value: Tensor, momentum: float | Tensor, when: Tensor | None = None) -> None:
    """In place: `mean <- momentum mean + (1 - momentum) value`, where `value` is finite and `when`, a bool, is true.

    Decided on the device for the tensor as a whole; `value` has its shape and any floating type.
    """
    value = value.detach().to(mean.dtype)
    usable = value.isfinite().all()
    if when is not None:
        usable = usable & when
    mean.copy_(torch.where(usable, momentum * mean + (1 - momentum) * value, mean))
