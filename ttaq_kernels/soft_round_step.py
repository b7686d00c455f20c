"""One optimiser step on all soft-rounded weights of a unit, in one launch.

    g      = (dL / dw_hat * scale + lambda dR / dh) dh / dv           h, R: see `soft_round`
    m      = beta1 m + (1 - beta1) g,  n = beta2 n + (1 - beta2) g^2
    v      = v - lr / (1 - beta1^step) m / (sqrt(n / (1 - beta2^step)) + eps)
    w_hat  = (codes + bottom + h(v)) * scale

In place: v, m, n and w_hat. Bytes per weight: 33 (g, v, m, n, codes; v, m, n, w_hat), against 38 for a step and a
forward of their own. What changes from step to step is read from a small tensor, so a CUDA graph can hold the step.
Called by the training loop of reconstruction.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ttaq_kernels import _check
from ttaq_kernels._launch import ceil_div, launch, tl, triton
from ttaq_kernels._library import register_op
from ttaq_kernels._matrix import dense, rows_are_dense
from ttaq_kernels.errors import KernelError
from ttaq_kernels.reference import soft_round as reference
from ttaq_kernels.soft_round import check_codes, pull, rounding, soft_round

# Device functions stay without types: Triton has none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

__all__ = ["SoftRounding", "soft_round_step_"]

_WHO = "soft_round_step_"
_TILE = 1024  # weights of one program
_DECIDED = 30.0  # h(v) = 1 there, h(-v) = 0, and the gradient is 0: such a v stays where it is


@triton.jit
def _step_tile(
    v_ptr, w_hat_ptr, m_ptr, n_ptr, grad_ptr, codes_ptr, scale_ptr, bottom_ptr, weights, per_channel, tile, knobs_ptr,
    BETA1: tl.constexpr, BETA2: tl.constexpr, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of one weight."""
    first = tile.to(tl.int64) * BLOCK
    offs = first + tl.arange(0, BLOCK)
    mask = offs < weights
    # Element by element the division is 32 bits wide, which is several times quicker.
    within = (first % per_channel).to(tl.int32) + tl.arange(0, BLOCK)
    channel = tl.minimum(first // per_channel + within // per_channel, weights // per_channel - 1)
    lr, beta = tl.load(knobs_ptr), tl.load(knobs_ptr + 1)
    penalty, step = tl.load(knobs_ptr + 2), tl.load(knobs_ptr + 3).to(tl.float64)
    # In fp64, since 1 - beta2 loses four digits.
    size = tl.div_rn(lr, (1.0 - tl.exp(step * LOG_BETA1)).to(tl.float32))
    correction = tl.sqrt_rn((1.0 - tl.exp(step * LOG_BETA2)).to(tl.float32))
    scale, bottom = tl.load(scale_ptr + channel), tl.load(bottom_ptr + channel)
    v = tl.load(v_ptr + offs, mask=mask, other=0.0)
    h, slope = rounding(v)
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    g = (grad * scale + penalty * pull(h, beta)) * slope
    m = BETA1 * tl.load(m_ptr + offs, mask=mask, other=0.0) + (1.0 - BETA1) * g
    n = BETA2 * tl.load(n_ptr + offs, mask=mask, other=0.0) + (1.0 - BETA2) * (g * g)
    v -= size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(n), correction) + EPS)
    h, _ = rounding(v)
    code = tl.load(codes_ptr + offs, mask=mask, other=0).to(tl.float32)
    tl.store(v_ptr + offs, v, mask=mask)
    tl.store(m_ptr + offs, m, mask=mask)
    tl.store(n_ptr + offs, n, mask=mask)
    tl.store(w_hat_ptr + offs, ((code + bottom) + h) * scale, mask=mask)


@triton.jit
def _step_kernel(
    knobs_ptr, v_ptrs, w_hat_ptrs, m_ptrs, n_ptrs, grad_ptrs, codes_ptrs, scale_ptrs, bottom_ptrs,
    weights, per_channel, starts,
    BETA1: tl.constexpr, BETA2: tl.constexpr, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The programs from starts[i] up to starts[i + 1] walk over weight i."""
    program = tl.program_id(0)
    for i in tl.static_range(len(v_ptrs)):
        if (program >= starts[i]) & (program < starts[i + 1]):
            _step_tile(
                v_ptrs[i], w_hat_ptrs[i], m_ptrs[i], n_ptrs[i], grad_ptrs[i], codes_ptrs[i], scale_ptrs[i],
                bottom_ptrs[i], weights[i], per_channel[i], program - starts[i], knobs_ptr,
                BETA1, BETA2, LOG_BETA1, LOG_BETA2, EPS, BLOCK,
            )  # fmt: skip


def _launch_step(
    vs: Sequence[Tensor],
    w_hats: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grads: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    bottoms: Sequence[Tensor],
    knobs: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    grads = [dense(grad, v) for grad, v in zip(grads, vs, strict=True)]
    lists = (vs, w_hats, exp_avgs, exp_avg_sqs, grads, codes, scales, bottoms)
    sizes = tuple(v.numel() for v in vs)
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + ceil_div(size, _TILE))
    per_channel = tuple(max(1, v.numel() // max(1, len(v))) for v in vs)
    options = {"BETA1": beta1, "BETA2": beta2, "LOG_BETA1": math.log(beta1), "LOG_BETA2": math.log(beta2), "EPS": eps}
    tensors = (knobs, *map(tuple, lists))
    launch(_WHO, _step_kernel, starts[-1], *tensors, sizes, per_channel, tuple(starts), **options, BLOCK=_TILE)


_step = register_op(
    "soft_round_step_(Tensor(a!)[] v, Tensor(b!)[] w_hat, Tensor(c!)[] exp_avg, Tensor(d!)[] exp_avg_sq, "
    "Tensor[] grad, Tensor[] codes, Tensor[] scale, Tensor[] bottom, Tensor knobs, "
    "float beta1, float beta2, float eps) -> ()",
    cpu=reference.step_,
    cuda=_launch_step,
    fake=lambda *_: None,
)


class SoftRounding(NamedTuple):
    """A weight in training: what it rounds to, the variable that decides, and the moments of Adam.

    v, w_hat, exp_avg and exp_avg_sq are float32 and codes uint8, all [C, ...] and dense with C outermost in memory;
    scale and bottom = qmin - zero_point are float32 [C].
    """

    v: Tensor
    w_hat: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    codes: Tensor
    scale: Tensor
    bottom: Tensor

    @classmethod
    def of(cls, w: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> "SoftRounding":
        """The state that rounds to `w` itself inside the grid, and to the nearest end of the grid outside.

            codes = floor(w / scale) + zero_point - qmin,  h(v) = w / scale - floor(w / scale)

        A weight outside the grid, or on its largest code, would be clamped to the same code whatever h: its v is -30 or
        30 and stays there.

        Args:
            w: float32, bfloat16 or float16, [C, ...], finite. scale: float32 [C]. zero_point: int32 [C].
            qmin, qmax: smallest and largest code, at most 255 apart.

        Raises:
            KernelError: a type, shape, device or grid that does not fit.
        """
        who = "SoftRounding.of"
        _check.check_input(who, "w", w)
        if w.ndim == 0:
            raise KernelError(f"{who}: w has shape (), expected a dimension of output channels; unsqueeze it")
        _check.check_parameter(who, "scale", scale, w, ((w.shape[0],),), "= w.shape[axis=0]", torch.float32)
        _check.check_parameter(who, "zero_point", zero_point, w, ((w.shape[0],),), "like scale", torch.int32)
        if not 0 < qmax - qmin <= 255:
            raise KernelError(f"{who}: codes go from qmin={qmin} to qmax={qmax}, expected 2 to 256 codes")
        w = w.detach().float()
        w = w if rows_are_dense(w) else w.contiguous()
        scale, bottom = scale.detach().clone(), (qmin - zero_point).float()
        shape = (-1, *(1,) * (w.ndim - 1))
        place = w * scale.reciprocal().view(shape)
        floor = place.floor()
        codes = floor - bottom.view(shape)
        v = (1.2 / (place - floor + 0.1) - 1).log().neg()
        most = qmax - qmin - 1
        v = v.masked_fill_(codes < 0, -_DECIDED).masked_fill_(codes > most, _DECIDED)
        codes = codes.clamp_(0, most).to(torch.uint8)
        moments = torch.zeros_like(v), torch.zeros_like(v)
        return cls(v, soft_round(v, codes, scale, bottom), *moments, codes, scale, bottom)

    def rounded(self) -> Tensor:
        """The weight on the grid: up where v >= 0, down elsewhere."""
        return soft_round(self.v, self.codes, self.scale, self.bottom, hard=True)


def soft_round_step_(
    weights: Sequence[SoftRounding],
    grads: Sequence[Tensor],
    knobs: Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    """A step of Adam on the `v` of every weight against L + lambda R, in place; `w_hat` follows.

    Args:
        weights: the weights of a unit. v, w_hat, exp_avg and exp_avg_sq change.
        grads: of each weight dL / dw_hat, its shape, float32, bfloat16 or float16, any layout.
        knobs: float32 [4] on the device of the weights: learning rate, beta > 1, lambda, and the number of this step,
            counted from 1. Write new values into the same tensor, and a captured CUDA graph takes them. R is summed
            over all weights, so lambda is small; 0 leaves it out.
        betas, eps: of Adam.

    Exactness: against Adam in float64, 1e-5 of a step.

    Raises:
        KernelError: a type, shape, layout or device that does not fit.
    """
    _check.check_input(_WHO, "knobs", knobs, (torch.float32,))
    if tuple(knobs.shape) != (4,):
        raise KernelError(f"{_WHO}: knobs has shape {tuple(knobs.shape)}, expected (4,): lr, beta, lambda, step")
    if len(weights) != len(grads):
        raise KernelError(f"{_WHO}: got {len(grads)} gradients for {len(weights)} weights, expected one for each")
    if not all(0 < beta < 1 for beta in betas):
        raise KernelError(f"{_WHO}: betas is {betas}, expected two numbers between 0 and 1")
    for weight, grad in zip(weights, grads, strict=True):
        v = weight.v
        check_codes(_WHO, v, weight.codes, weight.scale, weight.bottom)
        for name in ("w_hat", "exp_avg", "exp_avg_sq"):
            tensor = getattr(weight, name)
            _check.check_parameter(_WHO, name, tensor, v, (tuple(v.shape),), "like v", torch.float32)
        if not (rows_are_dense(v) and all(tensor.stride() == v.stride() for tensor in weight[1:5])):
            raise KernelError(
                f"{_WHO}: v has strides {v.stride()}, expected dense channels, and the same strides in codes, w_hat "
                "and the moments; make them with SoftRounding.of"
            )
        _check.check_input(_WHO, "grad", grad)
        if grad.shape != v.shape or grad.device != v.device or knobs.device != v.device:
            raise KernelError(
                f"{_WHO}: got a gradient {tuple(grad.shape)} on {grad.device} and knobs on {knobs.device}, "
                f"expected {tuple(v.shape)} on {v.device} like v"
            )
    lists = list(zip(*weights, strict=True)) if weights else []
    if lists:
        mutated, fixed = lists[:4], lists[4:]
        with torch.no_grad():
            _step(*mutated, list(grads), *fixed, knobs, *betas, eps)
