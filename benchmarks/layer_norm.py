"""layer_norm of the tokens of vision transformers: alone, beside torch's, and with two groups on a grid of 8 bits."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.group_affine import parameters
from benchmarks.registry import Case, Op
from ttaq_kernels import layer_norm

_EPS = 1e-6
_QMAX = 255
_RANGE = 20.0
_SHAPES = {
    "tiny": {"tiny": [(2, 5, 12)]},
    "cpu": {"ViT-B/16 b4": [(4, 197, 768)]},
    "cuda": {"ViT-B/16 b64": [(64, 197, 768)], "DeiT-Ti b64": [(64, 197, 192)]},
}


def _cases(suite: str) -> list[Case]:
    dtype = torch.bfloat16 if suite == "cuda" else torch.float32
    return [
        Case("layer_norm", model, shape, dtype, variant=variant, step=step)
        for model, shapes in _SHAPES[suite].items()
        for shape in shapes
        for variant in ("", "groups 8 bit")
        for step in (False, True)
    ]


def _inputs(case: Case, draw: torch.Generator) -> tuple[Tensor, ...]:
    weight, bias = parameters(2 if case.variant else 1, case.shape[-1], draw)
    given = [t.detach().requires_grad_(case.step) for t in (case.tensor(draw), weight, bias)]
    if not case.variant:
        return tuple(given)
    # Wide enough that nothing clips: beside the end of a grid the last bit decides whether a gradient passes.
    scale = torch.tensor([_RANGE / _QMAX], device=draw.device)
    return *given, scale, torch.tensor([_QMAX // 2], dtype=torch.int32, device=draw.device)


def _ours(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None
) -> Tensor:
    return layer_norm(x, weight, bias, _EPS, scale=scale, zero_point=zero_point, qmin=0, qmax=_QMAX)


def _composition(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None
) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
    weight, bias = (t.repeat_interleave(len(x) // len(t), 0)[:, None] for t in (weight, bias))
    y = (wide - mean) * torch.rsqrt(var + _EPS) * weight + bias
    if scale is not None and zero_point is not None:
        v = y / scale
        u = v.detach().round() + zero_point
        v = torch.where((u >= 0) & (u <= _QMAX), v + (u - zero_point - v).detach(), u.clamp(0, _QMAX) - zero_point)
        y = v * scale
    return y.to(x.dtype)


def _tolerances(case: Case) -> list[tuple[float, float]]:
    rows = math.prod(case.shape) // case.shape[-1]
    # A value beside a tie may fall on the other side.
    step = 1.01 * _RANGE / _QMAX if case.variant else 2e-5
    tensor, parameter = (2 * torch.finfo(case.dtype).eps, 2e-5), (1e-5, 2e-6 * rows)
    return [(tensor[0], step), tensor, parameter, parameter]


OP = Op(
    name="layer_norm",
    cases=_cases,
    inputs=_inputs,
    ours=_ours,
    composition=_composition,
    single=lambda x, weight, bias: F.layer_norm(x, (x.shape[-1],), weight[0], bias[0], _EPS),
    single_fits=lambda case: not case.variant,
    # Forward: x, y. Backward: x, dy, dx.
    bytes_moved=lambda case: math.prod(case.shape) * case.dtype.itemsize * (5 if case.step else 2),
    tolerances=_tolerances,
)
