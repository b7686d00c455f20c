"""Losses of test-time adaptation per sample, from logits: the entropy of the softmax.

    p = softmax(z),  H = -sum_c p_c ln p_c = ln(sum_c e^d_c) - sum_c p_c d_c,  d = z - max z
    dH / dz_c = -p_c (ln p_c + H)

One pass over the logits for the value (running maximum, sum and weighted sum, rescaled when the maximum grows) and one
for the gradient: 2 and 4 bytes per 2-byte logit. The maximum and ln sum e^d are kept apart for the gradient: added up,
they would round away the digits of ln p at large logits. Called by the entropy-like methods of `ttaq.tta`.
"""

from typing import Any

import torch
from torch import Tensor

from ttaq_kernels import _check
from ttaq_kernels._launch import ceil_div, launch, next_power_of_2, tl, triton
from ttaq_kernels._library import register_op
from ttaq_kernels.errors import KernelError
from ttaq_kernels.reference import losses as reference

# Device functions stay without types: Triton has none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

__all__ = ["softmax_entropy"]

_WHO = "softmax_entropy"
_TILE = 1024  # logits of one program at a time
_WARPS = 4


@triton.jit
def _value_kernel(
    logits_ptr,
    entropy_ptr,
    maximum_ptr,
    log_sum_ptr,
    rows,
    classes,
    strides,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """entropy = log_sum - moment / total, total = sum e^d, moment = sum e^d d"""
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < rows
    maximum = tl.full((BLOCK_B,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_B,), tl.float32)
    moment = tl.zeros((BLOCK_B,), tl.float32)
    for first in range(0, classes, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        offs = offs_b[:, None] * strides[0] + offs_c[None, :].to(tl.int64) * strides[1]
        mask = mask_b[:, None] & (offs_c < classes)[None, :]
        z = tl.load(logits_ptr + offs, mask=mask, other=float("-inf")).to(tl.float32)
        grown = tl.maximum(maximum, tl.max(z, axis=1))
        # Nothing but -inf so far: any finite shift keeps -inf - shift from becoming NaN.
        shift = tl.where(grown == float("-inf"), 0.0, grown)
        # The sums so far hold e^(z - maximum); multiplying by e^gap makes them hold e^(z - grown).
        gap = tl.where(maximum == float("-inf"), 0.0, maximum - shift)
        d = z - shift[:, None]
        weights = tl.exp(d)
        # exp(-inf) * -inf is NaN, but the limit of p ln p at p = 0 is 0.
        moment = tl.exp(gap) * (moment + gap * total) + tl.sum(tl.where(weights > 0.0, weights * d, 0.0), axis=1)
        total = tl.exp(gap) * total + tl.sum(weights, axis=1)
        maximum = grown
    log_sum = tl.log(total)
    tl.store(entropy_ptr + offs_b, log_sum - tl.div_rn(moment, total), mask=mask_b)
    tl.store(maximum_ptr + offs_b, maximum, mask=mask_b)
    tl.store(log_sum_ptr + offs_b, log_sum, mask=mask_b)


@triton.jit
def _gradient_kernel(
    logits_ptr,
    grad_ptr,
    entropy_ptr,
    maximum_ptr,
    log_sum_ptr,
    out_ptr,
    rows,
    classes,
    strides,
    out_strides,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = -grad p (ln p + entropy), ln p = (z - maximum) - log_sum"""
    program = tl.program_id(0).to(tl.int64)
    class_blocks = tl.cdiv(classes, BLOCK_C)
    offs_b = (program // class_blocks) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    offs_c = (program % class_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask_b = offs_b < rows
    mask = mask_b & (offs_c < classes)
    grad = tl.load(grad_ptr + offs_b, mask=mask_b, other=0.0)
    entropy = tl.load(entropy_ptr + offs_b, mask=mask_b, other=0.0)
    maximum = tl.load(maximum_ptr + offs_b, mask=mask_b, other=0.0)
    log_sum = tl.load(log_sum_ptr + offs_b, mask=mask_b, other=0.0)
    z = tl.load(logits_ptr + offs_b * strides[0] + offs_c * strides[1], mask=mask, other=0.0).to(tl.float32)
    log_p = (z - maximum) - log_sum
    p = tl.exp(log_p)
    slope = p * (tl.where(p == 0.0, 0.0, log_p) + entropy)
    tl.store(out_ptr + offs_b * out_strides[0] + offs_c * out_strides[1], -grad * slope, mask=mask)


def _blocks(rows: int, classes: int) -> dict[str, int]:
    """Few classes share a program with other rows; many are walked over in blocks."""
    block_c = min(next_power_of_2(classes), _TILE)
    return {"BLOCK_B": min(next_power_of_2(rows), max(1, _TILE // (4 * block_c))), "BLOCK_C": block_c}


def _launch_value(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, classes = logits.shape
    blocks = _blocks(rows, classes)
    entropy, maximum, log_sum = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    arguments = (logits, entropy, maximum, log_sum, rows, classes, logits.stride())
    launch(_WHO, _value_kernel, ceil_div(rows, blocks["BLOCK_B"]), *arguments, **blocks, num_warps=_WARPS)
    return entropy, maximum, log_sum


def _launch_gradient(
    grad: Tensor,
    logits: Tensor,
    entropy: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    rows, classes = logits.shape
    blocks = _blocks(rows, classes)
    out = torch.empty_like(logits, dtype=out_dtype)
    tensors = (logits, grad.contiguous(), entropy, maximum, log_sum, out)
    programs = ceil_div(rows, blocks["BLOCK_B"]) * ceil_div(classes, blocks["BLOCK_C"])
    arguments = (*tensors, rows, classes, logits.stride(), out.stride())
    launch(_WHO, _gradient_kernel, programs, *arguments, **blocks, num_warps=_WARPS)
    return out


def _fake_value(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    entropy, maximum, log_sum = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(3))
    return entropy, maximum, log_sum


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], *output)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> Tensor:
    dlogits: Tensor = _softmax_entropy_backward(grad, *ctx.saved_tensors)
    return dlogits


_softmax_entropy_backward = register_op(
    "softmax_entropy_backward(Tensor grad, Tensor logits, Tensor entropy, Tensor maximum, Tensor log_sum) -> Tensor",
    cpu=reference.softmax_entropy_backward,
    cuda=_launch_gradient,
    fake=lambda _, logits, *__: torch.empty_like(logits),
)
_softmax_entropy = register_op(
    "softmax_entropy(Tensor logits) -> (Tensor, Tensor, Tensor)",
    cpu=reference.softmax_entropy_forward,
    cuda=_launch_value,
    fake=_fake_value,
    setup_context=_save,
    backward=_backward,
)


def softmax_entropy(logits: Tensor) -> Tensor:
    """Entropy of the softmax of each row, in nats.

        H_i = -sum_c p_ic ln p_ic,  p = softmax(logits, 1)

    Args:
        logits: float32, bfloat16 or float16, [B, C] with C >= 1, any layout. A logit of -inf is a class of probability
            0 and contributes 0; NaN, +inf, or a row of nothing but -inf gives NaN.

    Returns:
        H [B], float32, between 0 and ln C.

    Gradients: dH_i / dz_ic = -p_ic (ln p_ic + H_i), 0 where p_ic = 0.

    Exactness: computed in float32 whatever the type of the logits, also for logits of 1e4 and beyond.

    Raises:
        KernelError: `logits` is no floating matrix with at least one class.

    Source: the loss of TENT (arXiv 2006.10726) before its mean over the batch.
    """
    _check.check_input(_WHO, "logits", logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise KernelError(f"{_WHO}: logits have shape {tuple(logits.shape)}, expected [B, C] with at least one class")
    entropy: Tensor = _softmax_entropy(logits)[0]
    return entropy
