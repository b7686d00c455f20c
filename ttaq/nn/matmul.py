"""The product of two activations on grids, as in attention: the integer expression of `ttaq.nn.integer` without weight.

    acc[..., m, n] = sum_k q_a[..., m, k] q_b[..., k, n]          q: integers, x = q * scale
    y              = fp32(acc) * (scale_a * scale_b)              then the type of the input

In float32 the sum is exact while K * max |q_a| * max |q_b| < 2^24 (K 258 at 8 bits). Where it may not be, the wider
operand is cut into two digits whose products are, added in float64; else all of it runs in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ttaq.nn import integer

__all__ = ["QuantMatmul"]


def exact_product(a: Tensor, b: Tensor, limits: tuple[int, int]) -> Tensor:
    """fp32(a @ b) of integers in float32, at most `limits` in size."""
    length = a.shape[-1]
    if length * limits[0] * limits[1] < integer.EXACT:
        return torch.matmul(a, b)
    wide = limits[0] >= limits[1]
    digits = integer.Digits.of(max(limits))
    if length * digits.limit * min(limits) >= integer.EXACT:
        return torch.matmul(a.double(), b.double()).float()
    return digits.sum(a if wide else b, lambda part: torch.matmul(part, b) if wide else torch.matmul(a, part))


class _GridProduct(torch.autograd.Function):
    """fp32(acc) * (scale_a * scale_b), with the gradients of the product of a and b."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, limits: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(a if ctx.needs_input_grad[1] else None, b if ctx.needs_input_grad[0] else None)
        ctx.shapes, ctx.types = (a.shape, b.shape), (a.dtype, b.dtype)
        q_a, q_b = ((x.float() * scale.reciprocal()).round_() for x, scale in ((a, a_scale), (b, b_scale)))
        return exact_product(q_a, q_b, limits).mul_(a_scale * b_scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        da = None if b is None else (grad @ b.float().mT).sum_to_size(ctx.shapes[0]).to(ctx.types[0])
        db = None if a is None else (a.float().mT @ grad).sum_to_size(ctx.shapes[1]).to(ctx.types[1])
        return da, db, None, None, None


class QuantMatmul(nn.Module):
    """`torch.matmul(input, other)`, which with scales is the integer product of two tensors on grids.

    `forward(input, other)`: the float product. `forward(input, other, input_scale, other_scale)`: for tensors on grids
    `k * input_scale` and `k * other_scale` (fp32 [1]), the expression of this file, equal to integer arithmetic bit for
    bit; a scale of None is `forward(input, other)`.

    limits: the largest |k| of input and other, 255 for 8 bits with a zero point. Gradients: straight-through, those of
    the float product. The module has no state.
    """

    def __init__(self, limits: tuple[int, int] = (255, 255)) -> None:
        super().__init__()
        self.limits = limits

    def forward(
        self, input: Tensor, other: Tensor, input_scale: Tensor | None = None, other_scale: Tensor | None = None
    ) -> Tensor:
        if input_scale is None or other_scale is None:
            return torch.matmul(input, other)
        row, column = input.ndim == 1, other.ndim == 1
        a, b = input[None] if row else input, other[:, None] if column else other
        with torch.autocast(input.device.type, enabled=False):
            y: Tensor = _GridProduct.apply(a, b, input_scale, other_scale, self.limits)  # type: ignore[no-untyped-call]
        y = y.squeeze(-1) if column else y
        return (y.squeeze(-1 if column else -2) if row else y).to(input.dtype)

    def extra_repr(self) -> str:
        return f"limits={self.limits}"
