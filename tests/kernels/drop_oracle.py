"""Philox4x32-10 with Python's integers, and which elements QDrop keeps quantized according to it."""

import torch
from torch import Tensor

_LOW = (1 << 32) - 1


def philox(seed: int, counter: int) -> list[int]:
    """The four words of one call."""
    c0, c1, c2, c3 = counter & _LOW, counter >> 32, 0, 0
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return [c0, c1, c2, c3]


def kept(seed: int, elements: int, keep_quantized: float) -> Tensor:
    """bool [elements], in the order of memory."""
    if keep_quantized == 1:
        return torch.ones(elements, dtype=torch.bool)
    bits, threshold = (1, 1) if round(256 * keep_quantized) == 128 else (8, round(256 * keep_quantized))
    drawn = []
    for call in range(-(-elements * bits // 128)):
        for word in philox(seed, call):
            drawn += [(word >> shift) & ((1 << bits) - 1) for shift in range(0, 32, bits)]
    return torch.tensor(drawn[:elements], dtype=torch.int32).lt(threshold)


def kept_like(seed: int, x: Tensor, keep_quantized: float) -> Tensor:
    """bool, with the shape of `x`: the draw follows the memory of the dense tensor."""
    layout = torch.empty_like(x.cpu(), dtype=torch.bool)
    return kept(seed, x.numel(), keep_quantized).as_strided(x.shape, layout.stride())
