"""AdaRound: weights rounded down or up by as much as a variable v says, and the penalty that makes it decide.

    h(v)  = clamp(1.2 sigmoid(v) - 0.1, 0, 1)              hard: 1 where v >= 0, else 0
    w_hat = (codes + bottom + h(v)) * scale                bottom = qmin - zero_point, an integer per output channel
    R     = sum 1 - |2 h(v) - 1|^beta

    dw_hat / dv = scale J,  dR / dv = -2 beta |2h - 1|^(beta-1) sign(2h - 1) J
    J = 1.2 sigmoid(v) (1 - sigmoid(v)) where 0 <= 1.2 sigmoid(v) - 0.1 <= 1, else 0

`codes` are floor(w / scale) + zero_point - qmin, one byte each. They end one below the largest code, so that codes + h
stays on the grid: what lies outside it has a v that never moves (see `SoftRounding`).

Bytes per weight: forward 9, backward 12, penalty 4 and its gradient 8. Called where autograd is wanted; the training
loop of reconstruction updates all weights of a unit with `soft_round_step_`.
"""

from typing import Any

import torch
from torch import Tensor

from ttaq_kernels import _check
from ttaq_kernels._launch import tl, triton
from ttaq_kernels._library import register_op
from ttaq_kernels._math import log2_of_hardware, reciprocal
from ttaq_kernels._matrix import Matrix, dense, tile
from ttaq_kernels.errors import KernelError
from ttaq_kernels.reference import soft_round as reference

# Device functions stay without types: Triton has none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

__all__ = ["check_codes", "pull", "rounding", "rounding_penalty", "soft_round"]

_MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)


@triton.jit
def rounding(v):
    """h(v) and dh / dv"""
    s = reciprocal(1.0 + tl.exp2(v * _MINUS_LOG2_E))
    stretched = s * 1.2 - 0.1
    h = tl.maximum(stretched, 0.0, propagate_nan=tl.PropagateNan.ALL)
    h = tl.minimum(h, 1.0, propagate_nan=tl.PropagateNan.ALL)
    return h, tl.where(h == stretched, 1.2 * (s * (1.0 - s)), 0.0)


@triton.jit
def power(base, exponent):
    """base^exponent for a base from 0 to 1, off by 2^-22 of the exponent at most"""
    return tl.exp2(exponent * log2_of_hardware(base))


@triton.jit
def pull(h, beta):
    """d (1 - |2h - 1|^beta) / dh"""
    d = 2.0 * h - 1.0
    magnitude = 2.0 * beta * power(tl.abs(d), beta - 1.0)
    return tl.where(d > 0.0, -magnitude, magnitude)


@triton.jit
def _forward_kernel(
    v_ptr, codes_ptr, scale_ptr, bottom_ptr, out_ptr, channels, rows, cols, col_blocks,
    CHANNEL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """out = (codes + bottom + h(v)) * scale"""
    offs, mask, channel, exists = tile(channels, rows, cols, col_blocks, CHANNEL, BLOCK_ROWS, BLOCK_COLS)
    v = tl.load(v_ptr + offs, mask=mask, other=0.0)
    code = tl.load(codes_ptr + offs, mask=mask, other=0).to(tl.float32)
    if HARD:
        h = tl.where(v >= 0.0, 1.0, 0.0)
    else:
        h, _ = rounding(v)
    bottom = tl.load(bottom_ptr + channel, mask=exists, other=0.0)
    scale = tl.load(scale_ptr + channel, mask=exists, other=0.0)
    out = ((code + bottom) + h) * scale
    tl.store(out_ptr + offs, out, mask=mask)


@triton.jit
def _backward_kernel(
    v_ptr, grad_ptr, scale_ptr, dv_ptr, channels, rows, cols, col_blocks,
    CHANNEL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """dv = grad * scale * dh / dv"""
    offs, mask, channel, exists = tile(channels, rows, cols, col_blocks, CHANNEL, BLOCK_ROWS, BLOCK_COLS)
    _, slope = rounding(tl.load(v_ptr + offs, mask=mask, other=0.0))
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + channel, mask=exists, other=0.0)
    tl.store(dv_ptr + offs, slope * grad * scale, mask=mask)


@triton.jit
def _penalty_kernel(
    v_ptr, beta_ptr, partial_ptr, channels, rows, cols, col_blocks,
    CHANNEL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """partial = this tile's sum of 1 - |2h - 1|^beta"""
    offs, mask, _, _ = tile(channels, rows, cols, col_blocks, CHANNEL, BLOCK_ROWS, BLOCK_COLS)
    h, _ = rounding(tl.load(v_ptr + offs, mask=mask, other=0.0))
    terms = 1.0 - power(tl.abs(2.0 * h - 1.0), tl.load(beta_ptr))
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.where(mask, terms, 0.0)))


@triton.jit
def _penalty_backward_kernel(
    v_ptr, grad_ptr, beta_ptr, dv_ptr, channels, rows, cols, col_blocks,
    CHANNEL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """dv = grad * d (1 - |2h - 1|^beta) / dv"""
    offs, mask, _, _ = tile(channels, rows, cols, col_blocks, CHANNEL, BLOCK_ROWS, BLOCK_COLS)
    h, slope = rounding(tl.load(v_ptr + offs, mask=mask, other=0.0))
    tl.store(dv_ptr + offs, pull(h, tl.load(beta_ptr)) * slope * tl.load(grad_ptr), mask=mask)


def _launch_forward(v: Tensor, codes: Tensor, scale: Tensor, bottom: Tensor, hard: bool) -> Tensor:
    out = torch.empty_like(v)
    tensors = (dense(v, out), dense(codes, out), scale.contiguous(), bottom.contiguous(), out)
    Matrix.of(out, 0).launch("soft_round", _forward_kernel, tensors, HARD=hard)
    return out


def _launch_backward(grad: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    dv = torch.empty_like(v)
    tensors = (dense(v, dv), dense(grad, dv), scale.contiguous(), dv)
    Matrix.of(dv, 0).launch("soft_round", _backward_kernel, tensors)
    return dv


def _launch_penalty(v: Tensor, beta: Tensor) -> Tensor:
    v = dense(v, torch.empty_like(v))
    matrix = Matrix.of(v, None)
    partial = v.new_empty(matrix.col_blocks())
    matrix.launch("rounding_penalty", _penalty_kernel, (v, beta, partial))
    return partial.sum()


def _launch_penalty_backward(grad: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    dv = torch.empty_like(v)
    tensors = (dense(v, dv), grad, beta, dv)
    Matrix.of(dv, None).launch("rounding_penalty", _penalty_backward_kernel, tensors)
    return dv


_soft_round_backward = register_op(
    "soft_round_backward(Tensor grad, Tensor v, Tensor scale) -> Tensor",
    cpu=reference.soft_round_backward,
    cuda=_launch_backward,
    fake=lambda _, v, __: torch.empty_like(v),
)
_penalty_backward = register_op(
    "rounding_penalty_backward(Tensor grad, Tensor v, Tensor beta) -> Tensor",
    cpu=reference.penalty_backward,
    cuda=_launch_penalty_backward,
    fake=lambda _, v, __: torch.empty_like(v),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(inputs[0], inputs[2])
    ctx.hard = inputs[4]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dv = None if ctx.hard else _soft_round_backward(grad, *ctx.saved_tensors)
    return dv, None, None, None, None


def _save_penalty(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward_penalty(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _penalty_backward(grad, *ctx.saved_tensors), None


_soft_round = register_op(
    "soft_round(Tensor v, Tensor codes, Tensor scale, Tensor bottom, bool hard) -> Tensor",
    cpu=reference.soft_round,
    cuda=_launch_forward,
    fake=lambda v, *_: torch.empty_like(v),
    setup_context=_save,
    backward=_backward,
)
_rounding_penalty = register_op(
    "rounding_penalty(Tensor v, Tensor beta) -> Tensor",
    cpu=reference.penalty,
    cuda=_launch_penalty,
    fake=lambda v, _: v.new_empty(()),
    setup_context=_save_penalty,
    backward=_backward_penalty,
)


def check_codes(who: str, v: Tensor, codes: Tensor, scale: Tensor, bottom: Tensor) -> None:
    """The tensors of one soft-rounded weight fit together."""
    _check.check_input(who, "v", v, (torch.float32,))
    if v.ndim == 0:
        raise KernelError(f"{who}: v has shape (), expected a dimension of output channels; unsqueeze it")
    _check.check_parameter(who, "codes", codes, v, (tuple(v.shape),), "like v", torch.uint8)
    for name, tensor in (("scale", scale), ("bottom", bottom)):
        _check.check_parameter(who, name, tensor, v, ((v.shape[0],),), "= v.shape[axis=0]", torch.float32)


def soft_round(v: Tensor, codes: Tensor, scale: Tensor, bottom: Tensor, hard: bool = False) -> Tensor:
    """The weight that `v` says: each code, or the next, or what lies between.

        w_hat = (codes + bottom + h(v)) * scale,  h(v) = clamp(1.2 sigmoid(v) - 0.1, 0, 1)

    Args:
        v: float32, [C, ...], any layout. codes: uint8, the shape of `v`; the lower of the two codes, counted from qmin.
        scale, bottom: float32 [C], bottom = qmin - zero_point. `SoftRounding.of` makes all of these from a weight.
        hard: h(v) = 1 where v >= 0, else 0; no gradient.

    Returns:
        float32, the shape and layout of `v`.

    Gradients: of `v` only, g * scale * dh / dv, where dh / dv is 0 outside the clamp.

    Exactness: hard rounding is exact; soft rounding is good to 2e-7 of h and the rounding of codes + h to float32.

    Raises:
        KernelError: a type, shape or device that does not fit.

    Source: AdaRound (arXiv 2004.10568), eq. 21 to 23.
    """
    check_codes("soft_round", v, codes, scale, bottom)
    w_hat: Tensor = _soft_round(v, codes, scale, bottom, hard)
    return w_hat


def rounding_penalty(v: Tensor, beta: Tensor) -> Tensor:
    """How undecided `v` is: sum 1 - |2 h(v) - 1|^beta, from 0 to the number of weights.

    Args:
        v: float32, any shape and layout. beta: float32 > 1, shape (); a tensor, since it changes from step to step.

    Returns:
        float32, shape (); repeatable bit for bit.

    Gradients: of `v`, -2 beta |2h - 1|^(beta-1) sign(2h - 1) dh / dv.

    Raises:
        KernelError: a type, shape or device that does not fit.

    Source: AdaRound (arXiv 2004.10568), eq. 24.
    """
    _check.check_input("rounding_penalty", "v", v, (torch.float32,))
    _check.check_parameter("rounding_penalty", "beta", beta, v, ((),), "for one exponent", torch.float32)
    penalty: Tensor = _rounding_penalty(v, beta)
    return penalty
