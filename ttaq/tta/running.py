"""Running means that one bad batch cannot spoil."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["running_mean_", "running_means_"]


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


@torch.no_grad()
def running_means_(means: Sequence[Tensor], values: Sequence[Tensor], momentum: float | Tensor) -> None:
    """`running_mean_` of many vectors, decided for all of them together, with a handful of kernels."""
    together = torch.cat(list(means))
    running_mean_(together, torch.cat(list(values)), momentum)
    torch._foreach_copy_(list(means), torch.split(together, [len(mean) for mean in means]))
