"""Channel moments in plain PyTorch: what the kernels are tested against, and the CPU path.

Statistics are float32 (float64 for float64 inputs). Every pass walks over the batch in pieces that stay in a CPU's
cache, so it reads memory once and needs no temporary of the size of the input; the sums of the pieces are added in
float64.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["along_channels", "batch_norm_moments", "channel_moments", "pieces"]

_PIECE = 1 << 18  # elements: 1 MiB of float32


def pieces(x: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The same runs of samples of each tensor, about `_PIECE` elements of `x` at a time; None stays None."""
    tensors = (x, *others)
    samples, elements = x.shape[0], x.numel()
    if elements <= _PIECE:
        yield tensors
        return
    run = max(1, _PIECE * samples // elements)
    for start in range(0, samples, run):
        yield tuple(None if tensor is None else tensor[start : start + run] for tensor in tensors)


def along_channels(vector: Tensor, x: Tensor) -> Tensor:
    """A vector [C], shaped to broadcast over `x` [N, C, *]."""
    return vector.view(1, -1, *[1] * (x.ndim - 2))


def _channel_means(terms: Iterable[Tensor], count: int, dtype: torch.dtype) -> Tensor:
    """The means of the channels of all terms, `count` elements each."""
    sums = [term.sum([dim for dim in range(term.ndim) if dim != 1], dtype=dtype) for term in terms]
    total = sums[0] if len(sums) == 1 else torch.stack(sums).sum(0, dtype=torch.float64)
    return (total / max(1, count)).to(dtype)


def channel_moments(x: Tensor, sample_mask: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of each channel, both 0 without elements, and the number of elements per channel.

    The variance is taken around the mean, never as E[x^2] - E[x]^2, which would lose its digits far from 0.
    """
    if sample_mask is not None:
        x = x[sample_mask]
    dtype = torch.promote_types(x.dtype, torch.float32)
    count = x.numel() // max(1, x.shape[1])
    mean = _channel_means((piece for (piece,) in pieces(x)), count, dtype)
    centre = along_channels(mean, x)
    var = _channel_means(((piece - centre).square_() for (piece,) in pieces(x)), count, dtype)
    return mean, var, count


def batch_norm_moments(x: Tensor, sample_mask: Tensor | None) -> Tensor:
    """[3, C]: mean, variance and number of elements."""
    mean, var, count = channel_moments(x, sample_mask)
    return torch.stack((mean, var, torch.full_like(mean, count)))
