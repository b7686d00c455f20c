"""soft_likelihood_ratio with the weights of ROID, of the same logits as softmax_entropy."""

import torch
from torch import Tensor

from benchmarks.registry import Case, Op
from benchmarks.softmax_entropy import bytes_moved, cases
from ttaq_kernels import soft_likelihood_ratio


def _inputs(case: Case, draw: torch.Generator) -> tuple[Tensor, ...]:
    weights = torch.rand(case.shape[0], generator=draw, device=draw.device)
    return (3 * case.tensor(draw)).requires_grad_(case.step), weights


def _composition(logits: Tensor, weights: Tensor) -> Tensor:
    p = logits.softmax(1).clamp(max=0.99)
    return -weights * (p * (p / (1 - p) + 1e-5).log()).sum(1)


OP = Op(
    name="soft_likelihood_ratio",
    cases=lambda suite: cases("soft_likelihood_ratio", suite),
    inputs=_inputs,
    ours=soft_likelihood_ratio,
    composition=_composition,
    bytes_moved=bytes_moved,
    tolerances=lambda _: [(1e-5, 1e-5), (1e-4, 1e-5)],
)
