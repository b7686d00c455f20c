"""Softmax over the rows of a matrix of logits, a block of classes at a time: what the losses share."""

from typing import Any

import torch
from torch import Tensor

from ttaq_kernels import _check
from ttaq_kernels._launch import ceil_div, next_power_of_2, tl, triton
from ttaq_kernels.errors import KernelError

# Device functions stay without types: Triton has none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

__all__ = ["check_logits", "check_vectors", "dense", "load_logits", "needs_gradient", "row_programs", "softmax_sums"]

_FEW = 256  # logits of a program that takes several rows
_MANY = 4096  # logits of a program at a time


@triton.jit
def load_logits(logits_ptr, offset_ptr, offs_b, offs_c, rows, classes, strides):
    """logits + offset in fp32, [BLOCK_B, BLOCK_C]; -inf outside."""
    mask = (offs_b < rows)[:, None] & (offs_c < classes)[None, :]
    offs = offs_b[:, None] * strides[0] + offs_c[None, :].to(tl.int64) * strides[1]
    z = tl.load(logits_ptr + offs, mask=mask, other=float("-inf")).to(tl.float32)
    if offset_ptr is not None:
        z += tl.load(offset_ptr + offs_c, mask=offs_c < classes, other=0.0)[None, :]
    return z


@triton.jit
def softmax_sums(
    logits_ptr, offset_ptr, offs_b, rows, classes, strides, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """The maximum of each row and total = sum_c e^(z_c - maximum), [BLOCK_B, 1] each, in one pass."""
    maximum = tl.full((BLOCK_B,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_B,), tl.float32)
    for first in range(0, classes, BLOCK_C):
        z = load_logits(logits_ptr, offset_ptr, offs_b, first + tl.arange(0, BLOCK_C), rows, classes, strides)
        grown = tl.maximum(maximum, tl.max(z, axis=1))
        # Nothing but -inf so far: any finite shift keeps -inf - shift from becoming NaN.
        shift = tl.where(grown == float("-inf"), 0.0, grown)
        total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(z - shift[:, None]), axis=1)
        maximum = grown
    return maximum[:, None], total[:, None]


def row_programs(rows: int, classes: int) -> tuple[int, dict[str, Any]]:
    """Number of programs and their blocks: few classes share a program with other rows, many are walked over."""
    block_c = min(next_power_of_2(classes), _MANY)
    block_b = min(next_power_of_2(rows), max(1, _FEW // block_c))
    warps = 4 if block_c <= _MANY // 4 else 8
    return ceil_div(rows, block_b), {"BLOCK_B": block_b, "BLOCK_C": block_c, "num_warps": warps}


def dense(vector: Tensor | None) -> Tensor | None:
    """`vector` without gaps."""
    return None if vector is None else vector.contiguous()


def needs_gradient(tensor: Tensor) -> bool:
    """Whether a gradient will be asked for: then the launch that finds the loss finds it too."""
    return torch.is_grad_enabled() and tensor.requires_grad


def check_logits(who: str, name: str, logits: Tensor) -> None:
    """`logits` is a floating matrix with at least one class."""
    _check.check_input(who, name, logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise KernelError(f"{who}: {name} has shape {tuple(logits.shape)}, expected [B, C] with at least one class")


def check_vectors(who: str, logits: Tensor, weights: Tensor | None, offset: Tensor | None) -> None:
    """`weights` has one value for each row of the logits, `offset` one for each class."""
    rows, classes = logits.shape
    for name, vector, length, meaning, dtypes in (
        ("weights", weights, rows, "= (rows of logits,)", (torch.float32, torch.bool)),
        ("offset", offset, classes, "= (classes of logits,)", (torch.float32,)),
    ):
        if vector is None:
            continue
        _check.check_input(who, name, vector, dtypes)
        if tuple(vector.shape) != (length,):
            raise KernelError(f"{who}: {name} has shape {tuple(vector.shape)}, expected ({length},) {meaning}")
        if vector.device != logits.device:
            raise KernelError(
                f"{who}: {name} is on {vector.device}, expected {logits.device} like logits; "
                f"move it with {name}.to(logits.device)"
            )
