"""The draws of `ttaq_kernels._philox` on a CPU: the same bits.

A few dozen passes over integers of 64 bits, shared by the 16 or 128 elements of a call. They are so short that most of
the time is that of calling them, hence NumPy, whose calls take a fifth of those of torch.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ttaq_kernels._philox import Drop

__all__ = ["draw", "philox", "unite_", "where_dropped", "where_kept"]

_LOW = (1 << 32) - 1
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_KEY_STEPS = 0xBB67AE85, 0x9E3779B9
_ROUNDS = 10
# A byte times the first is in all bytes of an int64; of each copy the second keeps another bit.
_COPIES = 0x0101010101010101
_DIAGONAL = 0x8040201008040201 - (1 << 64)


def philox(seed: Tensor, calls: int) -> Tensor:
    """int64 [calls, 2]: as int32 the four words of Philox4x32-10 with counter (i, 0, 0, 0), i < calls < 2^32."""
    number = int(seed.item())
    keys: npt.NDArray[Any] = np.array([number >> 32 & _LOW, number & _LOW], dtype=np.uint64).reshape(2, 1)
    steps = np.array(_KEY_STEPS, dtype=np.uint64).reshape(2, 1)
    multipliers = _MULTIPLIERS
    # Rows: the counters 0 and 2, and the counters 1 and 3. They change places every round. What lies above 32 bits is
    # only cleared where it would get into a product.
    even, odd, product = np.zeros((3, 2, calls), dtype=np.uint64)
    even[0] = np.arange(calls, dtype=np.uint64)
    for _ in range(_ROUNDS):
        np.multiply(even, multipliers, out=product)
        np.right_shift(product, 32, out=even)
        even ^= odd[::-1]
        even ^= keys
        even &= _LOW
        odd, product = product, odd
        keys, steps, multipliers = ((keys + steps) & _LOW)[::-1], steps[::-1], multipliers[::-1]
    words = torch.empty(calls, 2, dtype=torch.int64)
    words.numpy().view(np.uint64)[...] = (odd << 32 | even).T
    return words


def draw(seed: Tensor, elements: int, drop: Drop) -> Tensor:
    """uint8 [elements]: the quantized value is kept where it lies below `drop.threshold`."""
    if drop.bits == 0:
        return torch.zeros(elements, dtype=torch.uint8)
    drawn = philox(seed, -(-elements * drop.bits // 128)).view(torch.uint8).flatten()
    if drop.bits == 1:
        drawn = drawn.to(torch.int64).mul_(_COPIES).bitwise_and_(_DIAGONAL).view(torch.uint8)
    return drawn[:elements]


def where_kept(drawn: Tensor, drop: Drop, x: Tensor, out: Tensor | None = None) -> Tensor:
    """fp32 `x` where the quantized value is kept, else 0; `out` may be `x`."""
    return _between(-1.0, drop.threshold - 0.5, drawn, x, out)


def where_dropped(drawn: Tensor, drop: Drop, x: Tensor, out: Tensor | None = None) -> Tensor:
    """fp32 `x` where the quantized value is not kept, else 0; `out` may be `x`."""
    return _between(drop.threshold - 0.5, 256.0, drawn, x, out)


def _between(low: float, high: float, drawn: Tensor, x: Tensor, out: Tensor | None) -> Tensor:
    # The gradient of hardtanh is where(low < drawn < high, x, 0) in one vectorised pass: a sixth of the time of
    # torch.where.
    clip = torch.ops.aten.hardtanh_backward.grad_input
    result: Tensor = clip(x, drawn.float(), low, high, grad_input=torch.empty_like(x) if out is None else out)
    return result


def unite_(x: Tensor, other: Tensor) -> Tensor:
    """Into fp32 `x` the values of `other`; one of the two is 0 everywhere."""
    # A zero has no bits.
    x.view(torch.int32).bitwise_or_(other.view(torch.int32))
    return x
