"""What the tests of ahead-of-time compilation compile; `launches_*.py` hold one table `LAUNCHES` for each op."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """A launcher call on small CPU tensors and what its kernels may use.

    `rounds`: the kernel rounds by adding and subtracting a constant, or must equal its reference bit for bit.
    """

    name: str
    call: Callable[[], object]
    registers: int
    rounds: bool = False
