"""The one door to Triton: kernel files take `triton` and `tl` from here, and launchers launch through `launch`.

Triton is optional: a CPU tensor never needs it, so kernel files must import where it is not installed.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ttaq_kernels.errors import KernelError

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise

    def _undecorated(function: Callable[..., Any] | None = None, **_options: Any) -> Any:
        return _undecorated if function is None else function

    triton = SimpleNamespace(jit=_undecorated)
    tl = SimpleNamespace(constexpr=_undecorated)

__all__ = ["ceil_div", "launch", "next_power_of_2", "tl", "triton"]


def ceil_div(number: int, divisor: int) -> int:
    """number / divisor, rounded up."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`: the only lengths of `tl.arange`."""
    return 1 << max(number - 1, 0).bit_length()


def launch(who: str, kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Run `programs` programs of the kernel on the device of its first argument; nothing is launched for 0 programs.

    Multiplication and addition stay separate (`enable_fp_fusion=False`): fused, `x * inv + magic` rounds ties unlike
    the reference.

    Raises:
        KernelError: Triton is not installed.
    """
    x: Tensor = arguments[0]
    if isinstance(triton, SimpleNamespace):
        raise KernelError(f"{who}: a tensor on {x.device} needs Triton, which is not installed; pip install triton")
    if programs:
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            kernel[(programs,)](*arguments, **options, enable_fp_fusion=False)
