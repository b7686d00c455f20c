"""batch_norm with batch statistics (alpha 1), as TENT and NORM run it, at layers of ResNets."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.networks import NETWORKS
from benchmarks.registry import Case, Op
from ttaq_kernels import batch_norm

_EPS = 1e-5


def _cases(suite: str) -> list[Case]:
    dtype = torch.bfloat16 if suite == "cuda" else torch.float32
    networks = [(network.label, network.tensors(4)) for network in NETWORKS[suite] if network.tensors(4)]
    cases = [
        Case("batch_norm", model, shape, dtype, "channels_last", step=step)
        for model, shapes in networks
        for shape in shapes
        for step in (False, True)
    ]
    # The layout that torch users start with, and the type that they start with, once per network.
    others = [(model, shapes[0]) for model, shapes in networks]
    cases += [Case("batch_norm", model, shape, dtype, step=step) for model, shape in others for step in (False, True)]
    if suite == "cuda":
        cases += [Case("batch_norm", model, shape, layout="channels_last", step=True) for model, shape in others]
    return cases


def _inputs(case: Case, draw: torch.Generator) -> tuple[Tensor, ...]:
    weight, bias = 1 + 0.1 * torch.randn(2, case.shape[1], generator=draw, device=draw.device)
    return tuple(t.detach().requires_grad_(case.step) for t in (case.tensor(draw), weight, bias))


def _composition(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    shape = (1, -1) + (1,) * (x.ndim - 2)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(wide, [dim for dim in range(x.ndim) if dim != 1], correction=0, keepdim=True)
    return ((wide - mean) * torch.rsqrt(var + _EPS) * weight.view(shape) + bias.view(shape)).to(x.dtype)


def _bytes(case: Case) -> int:
    """Forward: x twice, y. Backward: x and dy twice, dx."""
    return math.prod(case.shape) * case.dtype.itemsize * (8 if case.step else 3)


def _tolerances(case: Case) -> list[tuple[float, float]]:
    per_channel = math.prod(case.shape) // case.shape[1]
    tensor, parameter = (torch.finfo(case.dtype).eps, 2e-5), (1e-5, 2e-6 * per_channel)
    return [tensor, tensor, parameter, parameter]


OP = Op(
    name="batch_norm",
    cases=_cases,
    inputs=_inputs,
    ours=lambda x, weight, bias: batch_norm(x, weight, bias, None, None, 1.0, _EPS),
    composition=_composition,
    single=lambda x, weight, bias: F.batch_norm(x, None, None, weight, bias, True, 0.0, _EPS),
    bytes_moved=_bytes,
    tolerances=_tolerances,
)
