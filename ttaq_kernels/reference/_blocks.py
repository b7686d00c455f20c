"""Long tensors piece by piece, so that a chain of passes asks for little memory of its own.

Memory that the system has not handed out before takes longer to touch than a pass takes to compute. Much shorter pieces
would fit into nearer caches, but their calls take longer than that saves.
"""

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from ttaq_kernels._matrix import dense

__all__ = ["block_size", "blocks", "vector"]

_PER_THREAD = 1 << 17  # elements, 512 KiB in fp32


def block_size() -> int:
    return _PER_THREAD * torch.get_num_threads()


def vector(x: Tensor, layout: Tensor) -> Tensor:
    """The elements of `x` in the memory order of the dense tensor `layout`; no copy where the strides are the same."""
    return dense(x, layout).as_strided((x.numel(),), (1,))


def blocks(*vectors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The same piece of each vector, one piece after the other."""
    size = block_size()
    return zip(*(repeat(None) if v is None else torch.split(v, size) for v in vectors), strict=False)
