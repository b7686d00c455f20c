"""Tensors of one shape laid out in memory in every way an op may meet."""

from collections.abc import Callable

import torch
from torch import Tensor


def _permuted(x: Tensor) -> Tensor:
    """Dense, with the dimensions in reverse order in memory."""
    order = list(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)


def _sliced(x: Tensor) -> Tensor:
    """Every second element of a larger tensor along its last dimension, from an odd address."""
    larger = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), 7.0)
    larger[..., 1::2] = x
    return larger[..., 1::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": _permuted,
    "sliced": _sliced,
}


def layouts_of(ndim: int) -> list[str]:
    """The names of the layouts that a tensor of `ndim` dimensions can have."""
    return [name for name in LAYOUTS if ndim == 4 or (name != "channels_last" and ndim > 0) or name == "contiguous"]


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Equal type, shape and bits; unlike torch.equal this tells -0 from 0 and finds NaN equal to itself."""
    integer = {2: torch.int16, 4: torch.int32}[first.element_size()]
    return first.dtype == second.dtype and torch.equal(first.cpu().view(integer), second.cpu().view(integer))
