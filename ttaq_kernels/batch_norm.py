"""Batch norm whose statistics are a mixture of the source's and the batch's.

    mean = (1 - alpha) source_mean + alpha batch_mean
    var  = (1 - alpha) source_var  + alpha batch_var        biased: over M elements of each channel (see `moments`)
    y    = (x - mean) (rstd weight) + bias                  rstd = 1 / sqrt(var + eps)

Gradients, through the batch's share of the statistics:

    dbias   = sum dy
    dweight = rstd sum dy (x - mean)
    dx      = rstd weight (dy - share dbias - (x - batch_mean) share rstd dweight)

with share = alpha / M for the samples that the statistics are taken from, 0 for others. Statistics and arithmetic are
fp32, sums deterministic. Bytes per element of a 2-byte tensor: forward 6 (x twice, y), at alpha 0 only 4; backward 10
(x and dy twice, dx), 4 if `x` needs no gradient or, without a gradient of the statistics, only `x` needs one. The
kernels are those of `norm_act_quant`, with what comes after the norm left out. Called by
`ttaq.nn.AdaptiveBatchNorm2d`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ttaq_kernels import _check
from ttaq_kernels._batch_norm_kernels import STATISTICS
from ttaq_kernels._batch_norm_launch import launch_backward, launch_forward
from ttaq_kernels._channels import check_channels, check_sample_mask
from ttaq_kernels._library import register_op
from ttaq_kernels.errors import KernelError
from ttaq_kernels.reference import batch_norm as reference

__all__ = ["batch_norm", "batch_norm_ema", "check_arguments"]


def _launch_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    y, statistics, _ = launch_forward(*arguments[:-1])
    return y, statistics


def _launch_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, statistics: Tensor, sample_mask: Tensor | None, alpha: float,
    need_x: bool, need_affine: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    needs = (need_x, need_affine, False)
    dx, affine, _ = launch_backward(grad, x, weight, None, statistics, sample_mask, alpha, *needs)
    return dx, affine


def _fake_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(STATISTICS, x.shape[1], dtype=torch.float32)


def _fake_backward(
    _grad: Tensor, x: Tensor, _weight: Any, statistics: Tensor, _mask: Any, _alpha: float, need_x: bool, affine: bool
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    return dx, statistics.new_empty((2, x.shape[1]) if affine else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, _, _, sample_mask, alpha, _, statistics_gradient = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1], sample_mask)
    ctx.alpha = alpha if statistics_gradient else 0.0


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, statistics, sample_mask = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    need_affine = need_weight or need_bias
    dx, sums = _batch_norm_backward(grad, x, weight, statistics, sample_mask, ctx.alpha, need_x, need_affine)
    dweight, dbias = sums if need_affine else (None, None)
    return dx if need_x else None, dweight if need_weight else None, dbias if need_bias else None, *[None] * 6


_batch_norm_backward = register_op(
    "batch_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor statistics, Tensor? sample_mask, float alpha,"
    " bool need_x, bool need_affine) -> (Tensor, Tensor)",
    cpu=reference.batch_norm_backward,
    cuda=_launch_backward,
    fake=_fake_backward,
)
_batch_norm = register_op(
    "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? source_mean, Tensor? source_var, Tensor? sample_mask,"
    " float alpha, float eps, bool statistics_gradient) -> (Tensor, Tensor)",
    cpu=reference.batch_norm_forward,
    cuda=_launch_forward,
    fake=_fake_forward,
    setup_context=_save,
    backward=_backward,
)


def check_arguments(
    who: str,
    x: Tensor,
    vectors: dict[str, Tensor | None],
    alpha: float,
    eps: float,
    sample_mask: Tensor | None,
) -> Tensor | None:
    """The arguments of a batch norm; the mask comes back as booleans."""
    _check.check_input(who, "x", x)
    check_channels(who, x)
    if not 0 <= alpha <= 1:
        raise KernelError(f"{who}: alpha is {alpha}, expected 0 (source statistics) to 1 (those of the batch)")
    if not 0 < eps < math.inf:
        raise KernelError(f"{who}: eps is {eps}, expected a positive number such as 1e-5")
    (mean_name, mean), (var_name, var) = list(vectors.items())[2:]
    if (mean is None) != (var is None):
        missing = mean_name if mean is None else var_name
        raise KernelError(f"{who}: {missing} is None, expected {mean_name} and {var_name} together, or neither")
    if mean is None and alpha < 1:
        raise KernelError(f"{who}: alpha is {alpha}, expected 1 without {mean_name} and {var_name}; give both of them")
    for name, vector in vectors.items():
        if vector is not None:
            _check.check_parameter(who, name, vector, x, [(x.shape[1],)], "= (x.shape[1],)", torch.float32)
    return check_sample_mask(who, sample_mask, x)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    source_mean: Tensor | None,
    source_var: Tensor | None,
    alpha: float = 1.0,
    eps: float = 1e-5,
    *,
    sample_mask: Tensor | None = None,
    statistics_gradient: bool = True,
) -> Tensor:
    """Batch norm with a mixture of source and batch statistics.

        mean = (1 - alpha) source_mean + alpha batch_mean,  var = (1 - alpha) source_var + alpha batch_var  (biased)
        y = (x - mean) / sqrt(var + eps) * weight + bias

    Args:
        x: float32, bfloat16 or float16, [N, C, *], any memory layout. A channel of one element has variance 0.
        weight, bias: float32 [C]; None for 1 and 0.
        source_mean, source_var: float32 [C], taken as constants; may be None at alpha 1.
        alpha: the batch's share, from 0 (its moments are not computed) to 1 (the source is not used).
        eps: added to the variance, > 0.
        sample_mask: [N], the samples that `batch_mean` and `batch_var` are taken from: bool, or floating with 0 for the
            others; None for all. Every sample is normalised. Where none is selected the batch has no share: the source
            statistics are used, or mean 0 and variance 1 if there are none.
        statistics_gradient: whether gradients go through the batch's share of the statistics; False treats them as
            constants.

    Returns:
        A tensor with the shape, type and memory layout of `x` (a tensor with gaps gives a dense one).

    Gradients: of `x`, also through the batch's share of the statistics (for selected samples), of `weight` and of
    `bias` (of all samples); none of the source.

    Exactness: arithmetic in float32, results rounded once; repeatable bit for bit.

    Raises:
        KernelError: a type, shape or device that does not fit, `alpha` outside [0, 1], `eps` not above 0.

    Source: alpha = 1 is test-time batch norm, alpha = B / (B + N) the prior of Schneider et al. (arXiv 2006.16971).
    """
    vectors = {"weight": weight, "bias": bias, "source_mean": source_mean, "source_var": source_var}
    mask = check_arguments("batch_norm", x, vectors, alpha, eps, sample_mask)
    y: Tensor = _batch_norm(*(x, *vectors.values()), mask, float(alpha), float(eps), statistics_gradient)[0]
    return y


def batch_norm_ema(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float = 0.05,
    eps: float = 1e-5,
    *,
    sample_mask: Tensor | None = None,
    statistics_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm with running statistics that take in this batch before they are used; nothing is changed in place.

        mean = (1 - momentum) running_mean + momentum batch_mean,  var the same  (biased)
        y = (x - mean) / sqrt(var + eps) * weight + bias

    Args: as for `batch_norm` with alpha = momentum. Without a selected sample the statistics stay what they were.

    Returns:
        y, and mean and var, float32 [C] without gradients. To keep them, `running_mean.copy_(mean)`; for many layers at
        once `torch._foreach_copy_`. All of it can be captured in a CUDA graph.

    Gradients and errors as for `batch_norm`.

    Source: the robust batch norm of RoTTA (Yuan et al., arXiv 2303.13899), momentum 0.05.
    """
    who = "batch_norm_ema"
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    mask = check_arguments(who, x, vectors, momentum, eps, sample_mask)
    arguments = (x, *vectors.values(), mask, float(momentum), float(eps), statistics_gradient)
    y, statistics = _batch_norm(*arguments)
    return y, statistics[0], statistics[4]
