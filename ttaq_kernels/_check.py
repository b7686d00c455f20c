"""Checks of arguments, shared by the public functions. They read shapes and types, never values: no device sync."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ttaq_kernels.errors import KernelError

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda", "meta")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_input(who: str, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype] = FLOAT_TYPES) -> None:
    """`tensor` is a tensor of one of `dtypes` on a device that has kernels."""
    if not isinstance(tensor, Tensor):
        raise KernelError(f"{who}: {name} is a {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dtype not in dtypes:
        got = str(tensor.dtype).removeprefix("torch.")
        raise KernelError(f"{who}: {name} has dtype {got}, expected {_names(dtypes)}; convert it with {name}.to(...)")
    if tensor.device.type not in _DEVICES:
        raise KernelError(f"{who}: {name} is on {tensor.device}, expected cpu or cuda; move it with {name}.to(...)")


def check_parameter(
    who: str, name: str, tensor: Tensor, x: Tensor, shapes: Sequence[tuple[int, ...]], meaning: str, dtype: torch.dtype
) -> None:
    """`tensor` has the given type, one of the given shapes (`meaning` says why that one), and lies beside `x`."""
    check_input(who, name, tensor, (dtype,))
    if tuple(tensor.shape) not in shapes:
        expected = " or ".join(str(shape) for shape in shapes)
        raise KernelError(f"{who}: {name} has shape {tuple(tensor.shape)}, expected {expected} {meaning}")
    if tensor.device != x.device:
        raise KernelError(
            f"{who}: {name} is on {tensor.device}, expected {x.device} like x; move it with {name}.to(x.device)"
        )


def check_axis(who: str, axis: int, x: Tensor) -> int:
    """`axis` as a non-negative dimension of `x`."""
    if not -x.ndim <= axis < x.ndim:
        raise KernelError(
            f"{who}: axis is {axis}, expected {-x.ndim} <= axis < {x.ndim} for x of shape {tuple(x.shape)}; "
            "leave it out for one scale per tensor"
        )
    return axis % x.ndim
