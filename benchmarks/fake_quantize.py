"""fake_quantize of activations (4 bits, one grid per tensor) and of weights (one grid per output channel, with LSQ)."""

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.networks import NETWORKS
from benchmarks.registry import Case, Op
from ttaq_kernels import fake_quantize

_QMAX = 15


def _cases(suite: str) -> list[Case]:
    dtype = torch.bfloat16 if suite == "cuda" else torch.float32
    cases = []
    for network in NETWORKS[suite]:
        for step in (False, True):
            for shape in network.tensors():
                layout = "channels_last" if len(shape) == 4 else "contiguous"
                cases.append(Case("fake_quantize", network.label, shape, dtype, layout, "tensor", step))
            for shape in network.weights:
                cases.append(Case("fake_quantize", network.label, shape, variant="channel", step=step))
    return cases


def _inputs(case: Case, draw: torch.Generator) -> tuple[Tensor, ...]:
    """Per channel the scale is learned, too; per tensor only the straight-through gradient is taken."""
    channels = case.shape[0] if case.variant == "channel" else 1
    scale = 0.2 + 0.1 * torch.rand(channels, generator=draw, device=draw.device)
    zero_point = torch.randint(0, _QMAX + 1, (channels,), generator=draw, device=draw.device, dtype=torch.int32)
    x = case.tensor(draw).requires_grad_(case.step)
    return x, scale.requires_grad_(case.step and case.variant == "channel"), zero_point


def _ours(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return fake_quantize(x, scale, zero_point, 0, _QMAX, axis=0 if scale.numel() > 1 else None)


class _StraightThrough(torch.autograd.Function):
    """rint with the gradient of the identity."""

    @staticmethod
    def forward(_ctx: Any, v: Tensor) -> Tensor:
        return v.round()

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        return grad


def composition(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    shape = (-1,) + (1,) * (x.ndim - 1)
    scale, offset = scale.view(shape), zero_point.view(shape)
    rounded: Tensor = _StraightThrough.apply(x.float() * (1 / scale))  # type: ignore[no-untyped-call]
    q = (rounded + offset).clamp(0, _QMAX)
    return ((q - offset) * scale).to(x.dtype)


def _single(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    if scale.numel() > 1:
        return torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, 0, _QMAX)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, _QMAX)


def _bytes(case: Case) -> int:
    """Forward: x, y. Backward: x, dy, dx."""
    return math.prod(case.shape) * case.dtype.itemsize * (5 if case.step else 2)


def _tolerances(case: Case) -> list[tuple[float, float]]:
    """The result and dx are exact but for the gradient of a product, g * scale * (1 / scale), in the composition."""
    per_scale = math.prod(case.shape) // case.shape[0]
    return [(0.0, 0.0), (torch.finfo(case.dtype).eps, 0.0), (1e-5, 1e-5 * per_scale)]


OP = Op(
    name="fake_quantize",
    cases=_cases,
    inputs=_inputs,
    ours=_ours,
    composition=composition,
    single=_single,
    # With a learned scale torch has only ops that wait for the device.
    single_fits=lambda case: not (case.step and case.variant == "channel"),
    bytes_moved=_bytes,
    tolerances=_tolerances,
    check_dtype=torch.float32,
)
