"""Losses of test-time adaptation per sample from its logits: the entropy of the softmax and the soft likelihood ratio.

    p = softmax(z + offset),  l = w sum_c f(p_c),  dl / dz_c = w p_c (f'(p_c) - sum_k p_k f'(p_k))

    entropy            f(p) = -p ln p
    likelihood ratio   f(p) = -c ln(c / (1 - c) + 1e-5),  c = min(p, 0.99)

Value and gradient come from one launch, which walks over each row three times: for the maximum and the sum of the
exponentials, for the loss and the mean slope, and for the gradient. Only the first time comes from memory (a row is at
most 88 KB), so a 2-byte logit costs 2 bytes, 4 with the gradient and 8 with the product in the backward. p is taken
from differences of logits, so that large logits keep their digits. Called by the entropy-like methods of `ttaq.tta`.
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
from ttaq_kernels.reference import losses as reference

# Device functions stay without types: Triton has none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

__all__ = ["soft_likelihood_ratio", "softmax_entropy"]

_CLIP = tl.constexpr(0.99)
_TINY = tl.constexpr(1e-5)


@triton.jit
def _terms(z, maximum, log_sum, inverse, KIND: tl.constexpr):
    """p, f(p) and f'(p) but for a constant, of a block of logits."""
    d = z - maximum
    p = tl.exp(d) * inverse
    if KIND == "entropy":
        # exp(-inf) * -inf is NaN, but the limit of p ln p at p = 0 is 0.
        slope = tl.where(p == 0.0, 0.0, log_sum - d)
        term = p * slope
    else:
        # A minimum would drop NaN.
        clipped = tl.where(p > _CLIP, _CLIP, p)
        rest = 1.0 - clipped
        log_ratio = tl.log(tl.div_rn(clipped, rest) + _TINY)
        slope = -(log_ratio + tl.div_rn(clipped, rest * (clipped + _TINY * rest)))
        slope = tl.where(p >= _CLIP, 0.0, slope)
        term = -clipped * log_ratio
    return p, term, slope


@triton.jit
def _loss_kernel(
    logits_ptr,
    weights_ptr,
    offset_ptr,
    loss_ptr,
    gradient_ptr,
    rows,
    classes,
    strides,
    gradient_strides,
    KIND: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """loss = w sum f(p); gradient = w p (f'(p) - sum p f'(p))"""
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < rows
    maximum, total = softmax_sums(logits_ptr, offset_ptr, offs_b, rows, classes, strides, BLOCK_B, BLOCK_C)
    log_sum = tl.log(total)
    inverse = tl.div_rn(1.0, total)
    weight = tl.full((BLOCK_B,), 1.0, tl.float32)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + offs_b, mask=mask_b, other=0).to(tl.float32)
    loss = tl.zeros((BLOCK_B,), tl.float32)
    mean = tl.zeros((BLOCK_B,), tl.float32)
    for first in range(0, classes, BLOCK_C):
        z = load_logits(logits_ptr, offset_ptr, offs_b, first + tl.arange(0, BLOCK_C), rows, classes, strides)
        p, term, slope = _terms(z, maximum, log_sum, inverse, KIND)
        loss += tl.sum(term, axis=1)
        mean += tl.sum(p * slope, axis=1)
    tl.store(loss_ptr + offs_b, weight * loss, mask=mask_b)
    if gradient_ptr is not None:
        for first in range(0, classes, BLOCK_C):
            offs_c = first + tl.arange(0, BLOCK_C)
            z = load_logits(logits_ptr, offset_ptr, offs_b, offs_c, rows, classes, strides)
            p, term, slope = _terms(z, maximum, log_sum, inverse, KIND)
            gradient = weight[:, None] * (p * (slope - mean[:, None]))
            offs = offs_b[:, None] * gradient_strides[0] + offs_c[None, :].to(tl.int64) * gradient_strides[1]
            tl.store(gradient_ptr + offs, gradient, mask=mask_b[:, None] & (offs_c < classes)[None, :])


def _launch_loss(
    logits: Tensor,
    weights: Tensor | None,
    offset: Tensor | None,
    kind: str,
    need_gradient: bool,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    rows, classes = logits.shape
    programs, blocks = row_programs(rows, classes)
    loss = logits.new_empty(rows, dtype=torch.float32)
    gradient = torch.empty_like(logits, dtype=out_dtype) if need_gradient else None
    tensors = (logits, dense(weights), dense(offset), loss, gradient)
    strides = (logits.stride(), None if gradient is None else gradient.stride())
    launch(f"softmax_{kind}", _loss_kernel, programs, *tensors, rows, classes, *strides, KIND=kind, **blocks)
    return loss, logits.new_empty(0) if gradient is None else gradient


def _fake(
    logits: Tensor, _weights: Tensor | None, _offset: Tensor | None, _kind: str, need_gradient: bool
) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return loss, torch.empty_like(logits) if need_gradient else logits.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ARG001
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return (gradient * grad.unsqueeze(1)).to(gradient.dtype), None, None, None, None


_softmax_loss = register_op(
    "softmax_loss(Tensor logits, Tensor? weights, Tensor? offset, str kind, bool need_gradient) -> (Tensor, Tensor)",
    cpu=reference.softmax_loss,
    cuda=_launch_loss,
    fake=_fake,
    setup_context=_save,
    backward=_backward,
)


def _loss(who: str, kind: str, logits: Tensor, weights: Tensor | None, offset: Tensor | None) -> Tensor:
    check_logits(who, "logits", logits)
    check_vectors(who, logits, weights, offset)
    loss: Tensor = _softmax_loss(logits, weights, offset, kind, needs_gradient(logits))[0]
    return loss


def softmax_entropy(logits: Tensor, weights: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    """Entropy of the softmax of each row, in nats.

        l_i = -w_i sum_c p_ic ln p_ic,  p = softmax(logits + offset, 1)

    Args:
        logits: float32, bfloat16 or float16, [B, C] with C >= 1, any layout. A logit of -inf is a class of probability
            0 and contributes 0; NaN, +inf, or a row of nothing but -inf gives NaN.
        weights: float32 or bool [B], taken as constants; None for 1. A weight of 0 leaves a row out but for its NaN.
        offset: float32 [C], a constant added to every row, such as a multiple of the logarithm of a prior; None for 0.

    Returns:
        l [B], float32, between 0 and w ln C.

    Gradients: dl_i / dz_ic = -w_i p_ic (ln p_ic + H_i), H the entropy without weight; 0 where p_ic = 0. It is found
    together with the loss and kept in the type of the logits.

    Exactness: computed in float32 whatever the type of the logits, also for logits of 1e4 and beyond.

    Raises:
        KernelError: a type, shape or device that does not fit.

    Source: the loss of TENT (arXiv 2006.10726) before its mean over the batch; weighted, of EATA (arXiv 2204.02610).
    """
    return _loss("softmax_entropy", "entropy", logits, weights, offset)


def soft_likelihood_ratio(logits: Tensor, weights: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    """Soft likelihood ratio of each row: like the entropy, but with a gradient that does not vanish where p nears 1.

        l_i = -w_i sum_c q_ic ln(q_ic / (1 - q_ic) + 1e-5),  q = min(p, 0.99),  p = softmax(logits + offset, 1)

    Args:
        logits, weights, offset: as in `softmax_entropy`, with the same rules for NaN and infinities.

    Returns:
        l [B], float32. It is negative where one class has most of the probability.

    Gradients: of the logits; a class with p_ic >= 0.99 counts as constant.

    Exactness: computed in float32; p that rounds to the other side of 0.99 than in float64 has the gradient of that
    side.

    Raises:
        KernelError: a type, shape or device that does not fit.

    Source: ROID (Marsden et al., arXiv 2306.00650), equation 4 with the clipping of its code.
    """
    return _loss("soft_likelihood_ratio", "likelihood_ratio", logits, weights, offset)
