"""Cross entropy between two softmaxes per sample, in one direction or both: a student and its teacher, or two views.

    p = softmax(a + offset),  r = softmax(b)
    l = w L(r, p),  symmetric: l = w/2 (L(r, p) + L(p, r))

    L(r, p) = -sum_c r_c ln p_c,  dL(r, p)/da = p - r,  dL(r, p)/db = -r (ln p + L(r, p))

Value and gradients, of the sides that need one, come from one launch, which walks over each row three times (see
`losses`): a pair of 2-byte logits costs 4 bytes, and 2 more for each gradient. ln p is used as a difference of logits;
what is common to a row is added last. Called by the teacher-student methods of `ttaq.tta`.
"""

from typing import Any

import torch
from torch import Tensor

from ttaq_kernels._launch import launch, tl, triton
from ttaq_kernels._library import register_op
from ttaq_kernels._softmax import (
    check_logits,
    check_vectors,
    dense,
    load_logits,
    needs_gradient,
    row_programs,
    softmax_sums,
)
from ttaq_kernels.errors import KernelError
from ttaq_kernels.reference import cross_entropy as reference

# Device functions stay without types: Triton has none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

__all__ = ["softmax_cross_entropy"]

_WHO = "softmax_cross_entropy"


@triton.jit
def _weighed(p, d):
    """p d, which is 0 at p = 0 whatever d is."""
    return tl.where(p == 0.0, 0.0, p * d)


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,
    target_ptr,
    weights_ptr,
    offset_ptr,
    loss_ptr,
    by_logits_ptr,
    by_target_ptr,
    rows,
    classes,
    strides,
    SYMMETRIC: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """loss = L(r, p), or half of L(r, p) + L(p, r); L(r, p) = ln sum e^d_a - mean_a, mean_a = sum r d_a"""
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < rows
    max_a, total_a = softmax_sums(logits_ptr, offset_ptr, offs_b, rows, classes, strides[0], BLOCK_B, BLOCK_C)
    max_b, total_b = softmax_sums(target_ptr, None, offs_b, rows, classes, strides[1], BLOCK_B, BLOCK_C)
    inverse_a = tl.div_rn(1.0, total_a)
    inverse_b = tl.div_rn(1.0, total_b)
    weight = tl.full((BLOCK_B, 1), 1.0, tl.float32)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + offs_b, mask=mask_b, other=0).to(tl.float32)[:, None]
    if SYMMETRIC:
        weight *= 0.5
    mean_a = tl.zeros((BLOCK_B, 1), tl.float32)
    mean_b = tl.zeros((BLOCK_B, 1), tl.float32)
    for first in range(0, classes, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        d_a = load_logits(logits_ptr, offset_ptr, offs_b, offs_c, rows, classes, strides[0]) - max_a
        d_b = load_logits(target_ptr, None, offs_b, offs_c, rows, classes, strides[1]) - max_b
        mean_a += tl.sum(_weighed(tl.exp(d_b) * inverse_b, d_a), axis=1)[:, None]
        if SYMMETRIC:
            mean_b += tl.sum(_weighed(tl.exp(d_a) * inverse_a, d_b), axis=1)[:, None]
    loss = tl.log(total_a) - mean_a
    if SYMMETRIC:
        loss += tl.log(total_b) - mean_b
    tl.store(loss_ptr + offs_b[:, None], weight * loss, mask=mask_b[:, None])
    if by_logits_ptr is not None or by_target_ptr is not None:
        for first in range(0, classes, BLOCK_C):
            offs_c = first + tl.arange(0, BLOCK_C)
            mask = mask_b[:, None] & (offs_c < classes)[None, :]
            d_a = load_logits(logits_ptr, offset_ptr, offs_b, offs_c, rows, classes, strides[0]) - max_a
            d_b = load_logits(target_ptr, None, offs_b, offs_c, rows, classes, strides[1]) - max_b
            p = tl.exp(d_a) * inverse_a
            r = tl.exp(d_b) * inverse_b
            if by_logits_ptr is not None:
                gradient = p - r
                if SYMMETRIC:
                    gradient += _weighed(p, mean_b - d_b)
                offs = offs_b[:, None] * strides[2][0] + offs_c[None, :].to(tl.int64) * strides[2][1]
                tl.store(by_logits_ptr + offs, weight * gradient, mask=mask)
            if by_target_ptr is not None:
                gradient = _weighed(r, mean_a - d_a)
                if SYMMETRIC:
                    gradient += r - p
                offs = offs_b[:, None] * strides[3][0] + offs_c[None, :].to(tl.int64) * strides[3][1]
                tl.store(by_target_ptr + offs, weight * gradient, mask=mask)


def _launch_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None,
    offset: Tensor | None,
    symmetric: bool,
    need_logits: bool,
    need_target: bool,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, classes = logits.shape
    programs, blocks = row_programs(rows, classes)
    loss = logits.new_empty(rows, dtype=torch.float32)
    by_logits = torch.empty_like(logits, dtype=out_dtype) if need_logits else None
    by_target = torch.empty_like(target, dtype=out_dtype) if need_target else None
    tensors = (logits, target, dense(weights), dense(offset), loss, by_logits, by_target)
    strides = tuple((0, 0) if t is None else t.stride() for t in (logits, target, by_logits, by_target))
    launch(_WHO, _cross_entropy_kernel, programs, *tensors, rows, classes, strides, SYMMETRIC=symmetric, **blocks)
    return (
        loss,
        logits.new_empty(0) if by_logits is None else by_logits,
        target.new_empty(0) if by_target is None else by_target,
    )


def _fake(
    logits: Tensor,
    target: Tensor,
    _weights: Tensor | None,
    _offset: Tensor | None,
    _symmetric: bool,
    need_logits: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = logits.new_empty(logits.shape[0], dtype=torch.float32)
    sides = ((logits, need_logits), (target, need_target))
    by_logits, by_target = (torch.empty_like(side) if needed else side.new_empty(0) for side, needed in sides)
    return loss, by_logits, by_target


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ARG001
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    by_logits, by_target = (
        (gradient * grad.unsqueeze(1)).to(gradient.dtype) if needed else None
        for gradient, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)
    )
    return by_logits, by_target, None, None, None, None, None


_softmax_cross_entropy = register_op(
    "softmax_cross_entropy(Tensor logits, Tensor target, Tensor? weights, Tensor? offset, bool symmetric,"
    " bool need_logits, bool need_target) -> (Tensor, Tensor, Tensor)",
    cpu=reference.softmax_cross_entropy,
    cuda=_launch_cross_entropy,
    fake=_fake,
    setup_context=_save,
    backward=_backward,
)


def softmax_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None = None,
    offset: Tensor | None = None,
    symmetric: bool = False,
) -> Tensor:
    """Cross entropy of the softmax of `logits` relative to that of `target`, for each row, in nats.

        p = softmax(logits + offset, 1),  r = softmax(target, 1)
        l_i = -w_i sum_c r_ic ln p_ic,    symmetric: -w_i/2 sum_c (r_ic ln p_ic + p_ic ln r_ic)

    Args:
        logits: float32, bfloat16 or float16, [B, C] with C >= 1, any layout: the student's.
        target: the type and shape of `logits`: logits of the teacher or of another view. A class that only one of the
            two holds impossible (-inf) makes the loss infinite; one that both do contributes 0. NaN, +inf, or a row of
            nothing but -inf gives NaN.
        weights: float32 or bool [B], taken as constants; None for 1. A weight of 0 leaves a row out but for its NaN.
        offset: float32 [C], a constant added to every row of `logits`, such as a multiple of the logarithm of a prior;
            None for 0.
        symmetric: the mean of both directions.

    Returns:
        l [B], float32.

    Gradients: of `logits` and of `target`, each only if it requires one; detach a teacher. Found together with the loss
    and kept in the type of the logits.

    Exactness: computed in float32 whatever the type of the logits, also for logits of 1e4 and beyond.

    Raises:
        KernelError: a type, shape or device that does not fit.

    Source: the consistency loss of CoTTA (arXiv 2203.13591); symmetric, that of RMT (arXiv 2211.13081) and ROID (arXiv
    2306.00650).
    """
    check_logits(_WHO, "logits", logits)
    check_logits(_WHO, "target", target)
    if target.shape != logits.shape or target.dtype != logits.dtype or target.device != logits.device:
        got, expected = (f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in (target, logits))
        raise KernelError(f"{_WHO}: target is {got}, expected {expected} like logits")
    check_vectors(_WHO, logits, weights, offset)
    need_logits, need_target = needs_gradient(logits), needs_gradient(target)
    loss: Tensor = _softmax_cross_entropy(logits, target, weights, offset, symmetric, need_logits, need_target)[0]
    return loss
