"""Channel moments in plain PyTorch: what the kernels are tested against, and the CPU path.

Statistics are float32 (float64 for float64 inputs), summed in float64. Every pass walks over the batch in pieces that
stay in a CPU's cache, so it reads memory once and needs no temporary of the size of the input.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["add_channel_sums", "along_channels", "batch_norm_moments", "elements_per_channel", "pieces"]

_PIECE = 1 << 18  # elements: 1 MiB of float32


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same runs of samples of each tensor, about `_PIECE` elements at a time."""
    samples, elements = tensors[0].shape[0], tensors[0].numel()
    run = max(1, _PIECE * samples // elements) if elements else 1
    for first in range(0, samples, run):
        yield tuple(tensor[first : first + run] for tensor in tensors)


def along_channels(vector: Tensor, x: Tensor) -> Tensor:
    """A vector [C], shaped to broadcast over `x` [N, C, *]."""
    return vector.view(1, -1, *[1] * (x.ndim - 2))


def add_channel_sums(total: Tensor, piece: Tensor) -> None:
    """total [C] += the sums of the channels of `piece`."""
    total += piece.sum([dim for dim in range(piece.ndim) if dim != 1])


def elements_per_channel(x: Tensor) -> int:
    """N * S, but at least 1: what sums are divided by."""
    return max(1, x.numel() // max(1, x.shape[1]))


def batch_norm_moments(x: Tensor) -> Tensor:
    """[2, C]: mean and biased variance of each channel; 0 and 0 for a channel without elements.

    The variance is taken around the mean, never as E[x^2] - E[x]^2, which would lose its digits far from 0.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    sums = torch.zeros(2, x.shape[1], dtype=torch.float64, device=x.device)
    count = elements_per_channel(x)
    for (piece,) in pieces(x):
        add_channel_sums(sums[0], piece.to(dtype))
    mean = (sums[0] / count).to(dtype)
    for (piece,) in pieces(x):
        add_channel_sums(sums[1], (piece - along_channels(mean, x)).square_())
    return (sums / count).to(dtype)
