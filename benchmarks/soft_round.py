"""soft_round of the weights of a convolution: the weight, and the gradient of the rounding variable."""

import math

import torch
from torch import Tensor

from benchmarks.networks import NETWORKS
from benchmarks.registry import Case, Op
from ttaq_kernels import SoftRounding, soft_round


def _cases(suite: str) -> list[Case]:
    return [
        Case("soft_round", network.name, shape, step=step)
        for network in NETWORKS[suite]
        for shape in network.weights
        for step in (False, True)
    ]


def _inputs(case: Case, draw: torch.Generator) -> tuple[Tensor, ...]:
    w = case.tensor(draw)
    channels = w.shape[0]
    scale = 0.2 + 0.1 * torch.rand(channels, generator=draw, device=draw.device)
    state = SoftRounding.of(w, scale, torch.full((channels,), 8, dtype=torch.int32, device=draw.device), 0, 15)
    return state.v.requires_grad_(case.step), state.codes, state.scale, state.bottom


def _composition(v: Tensor, codes: Tensor, scale: Tensor, bottom: Tensor) -> Tensor:
    shape = (-1,) + (1,) * (v.ndim - 1)
    h = (torch.sigmoid(v) * 1.2 - 0.1).clamp(0, 1)
    return (codes + bottom.view(shape) + h) * scale.view(shape)


OP = Op(
    name="soft_round",
    cases=_cases,
    inputs=_inputs,
    ours=soft_round,
    composition=_composition,
    # Forward: v, codes, w_hat. Backward: v, dw_hat, dv.
    bytes_moved=lambda case: math.prod(case.shape) * (21 if case.step else 9),
    tolerances=lambda _: [(1e-6, 2e-6), (1e-5, 1e-6)],
)
