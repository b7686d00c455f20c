"""Student's t interval of a mean, without SciPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ttaq.errors import InputError

__all__ = ["Interval", "t_cdf", "t_interval", "t_quantile"]


def t_cdf(t: float, dof: int) -> float:
    """`P(T <= t)` for Student's t with an integer number of degrees of freedom, by the finite series.

    With `a = atan(t / sqrt(dof))`, `P(|T| <= t)` is
    odd dof: `2/pi (a + sin a (cos a + 2/3 cos^3 a + ... + (2 4 ... (dof-3)) / (3 5 ... (dof-2)) cos^(dof-2) a))`,
    even dof: `sin a (1 + 1/2 cos^2 a + ... + (1 3 ... (dof-3)) / (2 4 ... (dof-2)) cos^(dof-2) a)`.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    if dof < 1:
        raise InputError(f"t_cdf: dof is {dof}, expected at least 1")
    angle = math.atan(t / math.sqrt(dof))
    cosine = math.cos(angle)
    odd = dof % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(2 + odd, dof + 1, 2):
        total += term
        term *= cosine * cosine * (k - 1) / k
    two_sided = math.sin(angle) * total
    if odd:
        two_sided = 2 / math.pi * (angle + two_sided)
    return 0.5 + 0.5 * two_sided


def t_quantile(probability: float, dof: int) -> float:
    """The t with `P(T <= t) = probability`, by bisection to the last bits of the cumulative distribution."""
    if not 0.0 < probability < 1.0:
        raise InputError(f"t_quantile: probability is {probability}, expected a number between 0 and 1")
    if probability < 0.5:
        return -t_quantile(1.0 - probability, dof)
    low, high = 0.0, 1.0
    while t_cdf(high, dof) < probability:
        low, high = high, 2 * high
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if t_cdf(middle, dof) < probability else (low, middle)
    return 0.5 * (low + high)


@dataclass(frozen=True)
class Interval:
    """Mean of n values and the half width of its t interval; `half` is None for n = 1, where there is none."""

    mean: float
    half: float | None
    n: int

    def text(self, signed: bool = False) -> str:
        """Such as `12.34 ± 0.56`, or `12.34` for n = 1."""
        mean = f"{self.mean:+.2f}" if signed else f"{self.mean:.2f}"
        return mean if self.half is None else f"{mean} ± {self.half:.2f}"


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """`mean ± t s / sqrt(n)`, s with n - 1 in the denominator, t the (1 + level) / 2 quantile with n - 1 degrees."""
    n = len(values)
    if n == 0:
        raise InputError("t_interval: got 0 values, expected at least 1")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, 1)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return Interval(mean, t_quantile(0.5 + level / 2, n - 1) * spread / math.sqrt(n), n)
