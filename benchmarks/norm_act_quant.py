"""Batch norm (alpha 1), residual, ReLU and 4-bit grid in one pass, at layers of ResNets: values and packed codes.

Where the rounding of the statistics could change a code, the input is drawn again: so the codes of all implementations
are the same, and what is clipped, too.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.fake_quantize import composition as quantized
from benchmarks.networks import NETWORKS
from benchmarks.registry import Case, Op
from ttaq_kernels import norm_act_codes, norm_act_quant

_EPS, _QMAX = 1e-5, 15
_SCALE = 0.25
_MARGIN = 1e-3  # in steps of the grid


def _cases(op: str, suite: str, ways: tuple[bool, ...]) -> list[Case]:
    dtype = torch.bfloat16 if suite == "cuda" else torch.float32
    return [
        Case(op, network.label, shape, dtype, "channels_last", "residual" if joined else "plain", step)
        for network in NETWORKS[suite]
        for shape, joined in ((shape, shape[1:] in network.joined) for shape in network.tensors(4))
        for step in ways
    ]


def _added(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    shape = (1, -1, 1, 1)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0, keepdim=True)
    z = (wide - mean) * torch.rsqrt(var + _EPS) * weight.view(shape) + bias.view(shape)
    return z if residual is None else z + residual


def _inputs(case: Case, draw: torch.Generator) -> tuple[Tensor, ...]:
    weight, bias = 1 + 0.1 * torch.randn(2, case.shape[1], generator=draw, device=draw.device)
    scale = torch.tensor([_SCALE], device=draw.device)
    zero_point = torch.zeros(1, dtype=torch.int32, device=draw.device)
    x, residual = case.tensor(draw), case.tensor(draw) if case.variant == "residual" else None
    while True:
        z = _added(x.double(), weight, bias, residual) / _SCALE
        near = ((z - z.floor() - 0.5).abs() < _MARGIN) | (z.abs() < _MARGIN)
        if not near.any():
            break
        x = torch.where(near, case.tensor(draw), x)
    tensors = (x, weight, bias) if residual is None else (x, weight, bias, residual)
    made = [tensor.detach().requires_grad_(case.step) for tensor in tensors]
    return *made[:3], scale, zero_point, *made[3:]


def _ours(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, zero_point: Tensor, residual: Tensor | None = None
) -> Tensor:
    grid = {"scale": scale, "zero_point": zero_point, "qmin": 0, "qmax": _QMAX}
    return norm_act_quant(x, weight, bias, None, None, 1.0, _EPS, residual=residual, act="relu", **grid)


def _composition(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, zero_point: Tensor, residual: Tensor | None = None
) -> Tensor:
    return quantized(_added(x, weight, bias, residual).relu(), scale, zero_point).to(x.dtype)


def _our_codes(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, zero_point: Tensor, residual: Tensor | None = None
) -> Tensor:
    options = {"residual": residual, "act": "relu", "packed": True}
    return norm_act_codes(x, weight, bias, None, None, scale, zero_point, 0, _QMAX, 1.0, _EPS, **options)[0]


def _packed(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, zero_point: Tensor, residual: Tensor | None = None
) -> Tensor:
    a = _added(x, weight, bias, residual).relu()
    q = ((a / scale).round() + zero_point).clamp(0, _QMAX).to(torch.uint8)
    rows = F.pad(q.permute(0, 2, 3, 1).reshape(-1, q.shape[1]), (0, -q.shape[1] % 64))
    halves = rows.view(len(rows), -1, 2, 32)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)


def _bytes(case: Case) -> int:
    """Forward: x twice, residual, y. Backward: x and dy twice, dx; with a residual also that and its gradient."""
    tensors = 3 + (case.variant == "residual")
    if case.step:
        tensors += 5 + 2 * (case.variant == "residual")
    return math.prod(case.shape) * case.dtype.itemsize * tensors


def _bytes_of_codes(case: Case) -> int:
    """x twice, residual, half a byte for each code."""
    elements = math.prod(case.shape)
    return elements * case.dtype.itemsize * (2 + (case.variant == "residual")) + elements // 2


def _tolerances(case: Case) -> list[tuple[float, float]]:
    per_channel = math.prod(case.shape) // case.shape[1]
    tensor, parameter = (torch.finfo(case.dtype).eps, 2e-5), (1e-5, 2e-6 * per_channel)
    return [tensor, tensor, parameter, parameter, (0.0, 0.0)]


OP = Op(
    name="norm_act_quant",
    cases=lambda suite: _cases("norm_act_quant", suite, (False, True)),
    inputs=_inputs,
    ours=_ours,
    composition=_composition,
    bytes_moved=_bytes,
    tolerances=_tolerances,
)
CODES = Op(
    name="norm_act_codes",
    cases=lambda suite: _cases("norm_act_codes", suite, (False,)),
    inputs=_inputs,
    ours=_our_codes,
    composition=_packed,
    bytes_moved=_bytes_of_codes,
    tolerances=lambda _: [(0.0, 0.0)],
)
