"""The check of a quantization grid, shared by the ops that round to one."""

import torch
from torch import Tensor

from ttaq_kernels import _check
from ttaq_kernels.errors import KernelError

__all__ = ["check_grid"]

_CODE_LIMIT = 1 << 16  # far inside the 2**22 to which the rounding is exact


def check_grid(
    who: str, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None
) -> int | None:
    """The grid fits `x`; `axis` as a non-negative dimension."""
    shapes: tuple[tuple[int, ...], ...] = ((), (1,))
    meaning = "for one scale per tensor (axis=None)"
    if axis is not None:
        meaning = f"= x.shape[axis={axis}]"
        axis = _check.check_axis(who, axis, x)
        shapes = ((x.shape[axis],),)
    _check.check_parameter(who, "scale", scale, x, shapes, meaning, torch.float32)
    _check.check_parameter(who, "zero_point", zero_point, x, (tuple(scale.shape),), "like scale", torch.int32)
    if not -_CODE_LIMIT <= qmin < qmax <= _CODE_LIMIT:
        raise KernelError(
            f"{who}: codes go from qmin={qmin} to qmax={qmax}, expected {-_CODE_LIMIT} <= qmin < qmax <= {_CODE_LIMIT}"
        )
    return axis
