"""QDrop: which elements keep their quantized value, drawn by counter and therefore never stored.

Philox4x32-10 with the seed as its key. Element e of a tensor in memory order takes `bits` bits of call
e // (128 / bits) and keeps the quantized value where this field is below a threshold: the draw depends on the seed and
the offset, not on how a kernel is tiled. A probability is rounded to a multiple of 1/256 and takes 8 bits, or 1 bit
where it is 1/2, which makes the random numbers eight times as cheap.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ttaq_kernels import _check
from ttaq_kernels._launch import tl, triton
from ttaq_kernels.errors import KernelError

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

__all__ = ["SMALLEST_BLOCK", "Drop", "check_drop", "kept"]

SMALLEST_BLOCK = 128  # elements of one call at 1 bit: programs start at multiples of it


class Drop(NamedTuple):
    """The quantized value is kept where a field of `bits` random bits is below `threshold`; always, for no bits."""

    bits: int
    threshold: int

    @classmethod
    def of(cls, keep_quantized: float) -> "Drop":
        if keep_quantized == 1:
            return cls(0, 1)
        threshold = round(256 * keep_quantized)
        return cls(1, 1) if threshold == 128 else cls(8, threshold)


def check_drop(who: str, keep_quantized: float, seed: Tensor | None, x: Tensor) -> None:
    """`keep_quantized` is a probability, and there is a seed beside `x` to draw with unless it is 1."""
    if not 0 <= keep_quantized <= 1:
        raise KernelError(f"{who}: keep_quantized is {keep_quantized}, expected a probability from 0 to 1")
    if seed is not None:
        _check.check_parameter(who, "seed", seed, x, ((), (1,)), "for one seed", torch.int64)
    elif keep_quantized < 1:
        raise KernelError(
            f"{who}: seed is missing, expected an int64 tensor of shape () or (1,) for keep_quantized={keep_quantized}"
        )


@triton.jit
def kept(seed_ptr, first, threshold, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK], whether the elements from `first` on, a multiple of 128, keep their quantized value."""
    PER_CALL: tl.constexpr = 128 // BITS
    PER_WORD: tl.constexpr = 32 // BITS
    calls = first.to(tl.int64) // PER_CALL + tl.arange(0, BLOCK // PER_CALL)
    word0, word1, word2, word3 = tl.randint4x(tl.load(seed_ptr), calls)
    words = tl.reshape(tl.join(tl.join(word0, word2), tl.join(word1, word3)), (BLOCK // PER_WORD, 1))
    fields = (words >> (BITS * tl.arange(0, PER_WORD)).to(tl.uint32)[None, :]) & ((1 << BITS) - 1)
    return tl.reshape(fields, (BLOCK,)).to(tl.int32) < threshold
