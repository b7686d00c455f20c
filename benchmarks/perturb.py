"""perturb of the norm parameters that ZOA adapts, beside one torch.randn of the same size."""

import torch
from torch import Tensor

from benchmarks.networks import NETWORKS
from benchmarks.registry import Case, Op
from ttaq_kernels import perturb
from ttaq_kernels.reference import perturb as reference


def _cases(suite: str) -> list[Case]:
    return [Case("perturb", network.name, network.norms) for network in NETWORKS[suite] if network.norms is not None]


def _inputs(case: Case, draw: torch.Generator) -> tuple[Tensor, ...]:
    one = torch.tensor(0.02, device=draw.device)
    return case.tensor(draw), one, torch.tensor([7], device=draw.device)


def _ours(flat: Tensor, c: Tensor, seeds: Tensor) -> Tensor:
    # The parts are views of one tensor: this is where it begins.
    first = perturb(list(flat.unbind()), c, seeds, "normal")[0]
    return first.as_strided((1, flat.numel()), (flat.numel(), 1))


OP = Op(
    name="perturb",
    cases=_cases,
    inputs=_inputs,
    ours=_ours,
    composition=lambda flat, c, seeds: reference.perturb(flat.unbind(), c, seeds, "normal", False),
    # Without a seed for each group, and another normal distribution.
    single=lambda flat, c, _: (flat + c * torch.randn_like(flat)).view(1, -1),
    bytes_moved=lambda case: 8 * case.shape[0] * case.shape[1],
    tolerances=lambda _: [(1e-6, 1e-6)],
)
