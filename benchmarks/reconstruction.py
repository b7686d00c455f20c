"""reconstruction_loss of a residual block, value and gradients in one, and gather_mix of the input of a block."""

import math

import torch
from torch import Tensor

from benchmarks.fake_quantize import composition as quantized
from benchmarks.lsq_drop import KEEP, QMAX, cases, grid, kept_like
from benchmarks.registry import Case, Op
from ttaq_kernels import gather_mix, reconstruction_loss

_ROWS = 2  # in a cache, for each row of a batch


def _loss_inputs(case: Case, draw: torch.Generator) -> tuple[Tensor, ...]:
    h, target, residual = (case.tensor(draw) for _ in range(3))
    parameters = grid(draw.device, case.step)
    return h.requires_grad_(case.step), target, residual, *parameters, kept_like(h, parameters[2])


def _loss(
    h: Tensor, target: Tensor, residual: Tensor, scale: Tensor, zero_point: Tensor, seed: Tensor, _: Tensor
) -> Tensor:
    drop = {"keep_quantized": KEEP, "seed": seed}
    return reconstruction_loss(h, target, scale, zero_point, 0, QMAX, residual=residual, relu=True, **drop)


def _loss_composition(
    h: Tensor, target: Tensor, residual: Tensor, scale: Tensor, zero_point: Tensor, _: Tensor, kept: Tensor
) -> Tensor:
    a = (h.float() + residual.float()).relu()
    x_hat = torch.where(kept, quantized(a, scale, zero_point), a)
    return (x_hat - target.float()).square().sum(1).mean()


def kept_rows(x: Tensor, seed: Tensor) -> Tensor:
    """The elements of a gathered batch like `x` that come from the first cache."""
    # Every row starts at a multiple of 128 of the draw.
    per_row = math.prod(x.shape[1:])
    padded = kept_like(torch.empty(x.shape[0], -(-per_row // 128) * 128, device=x.device), seed)
    return padded[:, :per_row].contiguous().as_strided(x.shape, x.stride())


def _mix_inputs(case: Case, draw: torch.Generator) -> tuple[Tensor, ...]:
    rows = Case(case.op, case.model, (_ROWS * case.shape[0], *case.shape[1:]), case.dtype, case.layout)
    index = torch.randint(0, rows.shape[0], (case.shape[0],), generator=draw, device=draw.device)
    seed = torch.tensor(7, device=draw.device)
    kept = kept_rows(case.tensor(draw), seed)
    return rows.tensor(draw), rows.tensor(draw), index, seed, kept


def _mix(first: Tensor, second: Tensor, index: Tensor, seed: Tensor, _: Tensor) -> Tensor:
    return gather_mix(first, second, index, KEEP, seed)


LOSS = Op(
    name="reconstruction_loss",
    cases=lambda suite: cases("reconstruction_loss", suite),
    inputs=_loss_inputs,
    ours=_loss,
    composition=_loss_composition,
    # h, target, residual, dh; the backward pass reads dh again and writes it scaled.
    bytes_moved=lambda case: math.prod(case.shape) * case.dtype.itemsize * (6 if case.step else 4),
    # dscale is a sum of terms of both signs.
    tolerances=lambda case: [(1e-5, 0.0), (4 * torch.finfo(case.dtype).eps, 1e-9), (1e-3, 1e-3)],
    check_dtype=torch.float32,
)
GATHER_MIX = Op(
    name="gather_mix",
    cases=lambda suite: cases("gather_mix", suite, step=(False,)),
    inputs=_mix_inputs,
    ours=_mix,
    composition=lambda first, second, index, _, kept: torch.where(kept, first[index], second[index]),
    bytes_moved=lambda case: math.prod(case.shape) * case.dtype.itemsize * 3,
    tolerances=lambda _: [(0.0, 0.0)],
    check_dtype=torch.float32,
)
