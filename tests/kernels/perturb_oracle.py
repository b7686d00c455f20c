"""The draws of perturb written a second time, with Python's integers and fractions, one element at a time."""

from fractions import Fraction

import numpy as np

_LOW = (1 << 32) - 1


def philox(seed: int, counter: int) -> list[int]:
    """Philox4x32-10 (Salmon et al. 2011): four words at counter (low, high, 0, 0) for key (low, high) of the seed."""
    x = [counter & _LOW, counter >> 32, 0, 0]
    key = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(10):
        first, second = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(second >> 32) ^ x[1] ^ key[0], second & _LOW, (first >> 32) ^ x[3] ^ key[1], first & _LOW]
        key = [(key[0] + 0x9E3779B9) & _LOW, (key[1] + 0xBB67AE85) & _LOW]
    return x


def z(seed: int, element: int, distribution: str) -> np.float32:
    """Exact but for one rounding in "normal"."""
    words = philox(seed, element)
    sign = -1 if words[0] >> 31 else 1
    if distribution == "signs":
        return np.float32(sign)
    if distribution == "half_to_one":
        return np.float32(sign * (Fraction(1, 2) + Fraction(words[0] % (1 << 23), 1 << 24)))
    total = sum(byte for word in words for byte in word.to_bytes(4, "little"))
    return np.float32(total - 2040) * np.float32(1 / np.sqrt(np.float64(87380)))
