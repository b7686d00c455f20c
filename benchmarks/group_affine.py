"""group_affine with one group for each copy of a batch, as forward-only adaptation runs it, of normalised tensors."""

import math

import torch
from torch import Tensor

from benchmarks.registry import Case, Op
from ttaq_kernels import group_affine

_GROUPS = 2
_SHAPES = {
    "tiny": {"tiny": [(4, 3, 6, 5)]},
    "cpu": {"ResNet-20 2xb64": [(128, 16, 32, 32), (128, 64, 8, 8)]},
    "cuda": {"ResNet-50 2xb64": [(128, 256, 56, 56), (128, 2048, 7, 7)], "WRN-28-10 2xb64": [(128, 320, 16, 16)]},
}


def _cases(suite: str) -> list[Case]:
    dtype = torch.bfloat16 if suite == "cuda" else torch.float32
    return [
        Case("group_affine", model, shape, dtype, "channels_last", step=step)
        for model, shapes in _SHAPES[suite].items()
        for shape in shapes
        for step in (False, True)
    ]


def parameters(groups: int, channels: int, draw: torch.Generator) -> Tensor:
    """weight and bias of groups that are not far from each other."""
    noise = 0.1 * torch.randn(2, groups, channels, generator=draw, device=draw.device)
    noise[0] += 1
    return noise


def _inputs(case: Case, draw: torch.Generator) -> tuple[Tensor, ...]:
    weight, bias = parameters(_GROUPS, case.shape[1], draw)
    return tuple(t.detach().requires_grad_(case.step) for t in (case.tensor(draw), weight, bias))


def _composition(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    weight, bias = (t.repeat_interleave(len(x) // len(t), 0)[..., None, None] for t in (weight, bias))
    return (x * weight + bias).to(x.dtype)


def _tolerances(case: Case) -> list[tuple[float, float]]:
    per_channel = math.prod(case.shape) // case.shape[1] // _GROUPS
    tensor, parameter = (torch.finfo(case.dtype).eps, 1e-6), (1e-5, 2e-6 * per_channel)
    return [tensor, tensor, parameter, parameter]


OP = Op(
    name="group_affine",
    cases=_cases,
    inputs=_inputs,
    ours=group_affine,
    composition=_composition,
    # Forward: x, y. Backward: x, dy, dx.
    bytes_moved=lambda case: math.prod(case.shape) * case.dtype.itemsize * (5 if case.step else 2),
    tolerances=_tolerances,
)
