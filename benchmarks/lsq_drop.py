"""fake_quantize of activations with a learned scale and QDrop, as in reconstruction: forward, and both gradients."""

import math

import torch
from torch import Tensor

from benchmarks.fake_quantize import composition as quantized
from benchmarks.networks import NETWORKS
from benchmarks.registry import Case, Op
from ttaq_kernels import fake_quantize
from ttaq_kernels._philox import Drop
from ttaq_kernels.reference.philox import draw as draw_fields

QMAX, KEEP = 15, 0.5
BATCH = 32  # of reconstruction


def cases(op: str, suite: str, step: tuple[bool, ...] = (False, True)) -> list[Case]:
    dtype = torch.bfloat16 if suite == "cuda" else torch.float32
    return [
        Case(op, network.label, shape, dtype, "channels_last" if len(shape) == 4 else "contiguous", step=way)
        for network in (given if suite == "tiny" else given.at(BATCH) for given in NETWORKS[suite])
        for shape in network.tensors()
        for way in step
    ]


def grid(device: torch.device, learned: bool) -> tuple[Tensor, Tensor, Tensor]:
    """scale, zero point and seed."""
    scale = torch.tensor([0.2], device=device, requires_grad=learned)
    return scale, torch.tensor([3], dtype=torch.int32, device=device), torch.tensor(7, device=device)


def kept_like(x: Tensor, seed: Tensor) -> Tensor:
    """The elements that the seed keeps quantized: the plain compositions get them for nothing."""
    drop = Drop.of(KEEP)
    drawn = draw_fields(seed.cpu(), x.numel(), drop).float().lt(drop.threshold)
    return drawn.as_strided(x.shape, x.stride()).to(x.device)


def _inputs(case: Case, draw: torch.Generator) -> tuple[Tensor, ...]:
    x = case.tensor(draw).requires_grad_(case.step)
    parameters = grid(draw.device, case.step)
    return x, *parameters, kept_like(x, parameters[2])


def _ours(x: Tensor, scale: Tensor, zero_point: Tensor, seed: Tensor, _: Tensor) -> Tensor:
    return fake_quantize(x, scale, zero_point, 0, QMAX, keep_quantized=KEEP, seed=seed)


def _composition(x: Tensor, scale: Tensor, zero_point: Tensor, _: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, quantized(x, scale, zero_point), x)


def _drawn_by_torch(x: Tensor, scale: Tensor, zero_point: Tensor, _: Tensor, __: Tensor) -> Tensor:
    """As published code does it; it draws other elements."""
    return torch.where(torch.rand_like(x) < KEEP, quantized(x, scale, zero_point), x)


OP = Op(
    name="lsq_drop",
    cases=lambda suite: cases("lsq_drop", suite),
    inputs=_inputs,
    ours=_ours,
    composition=_composition,
    single=_drawn_by_torch,
    # Forward: x, y. Backward: x, dy, dx.
    bytes_moved=lambda case: math.prod(case.shape) * case.dtype.itemsize * (5 if case.step else 2),
    # dx as in fake_quantize; dscale is a sum of terms of size QMAX, as many as there are elements.
    tolerances=lambda case: [
        (0.0, 0.0),
        (torch.finfo(case.dtype).eps, 0.0),
        (1e-5, 1e-5 * math.sqrt(math.prod(case.shape)) * QMAX),
    ],
    check_dtype=torch.float32,
)
