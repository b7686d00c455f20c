"""search_scale of activations (sampled, one grid) and of the channels of weights, beside a loop over all candidates."""

import math

import torch
from torch import Tensor

from benchmarks.registry import Case, Op
from ttaq_kernels import search_scale

_P, _CANDIDATES = 2.4, 100
_SHAPES = {
    "tiny": {"tiny": [("channels 2 bit", (3, 2, 3, 3))]},
    "cpu": {"ResNet-20": [("channels 4 bit", (64, 64, 3, 3)), ("tensor 4 bit", (4, 16, 32, 32))]},
    "cuda": {
        "ResNet-50": [
            ("channels 4 bit", (512, 512, 3, 3)),
            ("channels 8 bit", (512, 512, 3, 3)),
            ("tensor 4 bit", (64, 256, 56, 56)),
            ("channels 2 bit", (64, 64, 3, 3)),
        ]
    },
}


def _cases(suite: str) -> list[Case]:
    return [
        Case("search_scale", model, shape, variant=variant)
        for model, cases in _SHAPES[suite].items()
        for variant, shape in cases
    ]


def _inputs(case: Case, draw: torch.Generator) -> tuple[Tensor, ...]:
    """The tensor, and as numbers beside it the bits and whether there is one grid."""
    bits, single = int(case.variant.split()[1]), case.variant.startswith("tensor")
    return case.tensor(draw), torch.tensor([bits, single])


def _error(rows: Tensor, scale: Tensor, zero_point: Tensor, qmax: int) -> Tensor:
    """(mean |x - x_hat|^p)^(1/p) of each row."""
    offset = zero_point[:, None]
    q = ((rows * (1 / scale)[:, None]).round() + offset).clamp(0, qmax)
    return (rows - (q - offset) * scale[:, None]).abs().pow(_P).mean(1).pow(1 / _P)


def _rows(x: Tensor, single: bool) -> Tensor:
    """What is scored: of a tensor as many values as `search_scale` takes."""
    if not single:
        return x.flatten(1)
    return x.reshape(1, -1)[:, :: max(1, math.ceil(x.numel() / 65_536) | 1)]


# Unrolled into one graph, the loop would take minutes to compile: only the error of a candidate is compiled.
@torch.compiler.disable(recursive=False)
def _composition(x: Tensor, which: Tensor) -> Tensor:
    """The error of the best grid, found one grid after the other."""
    bits, single = which.tolist()
    rows, qmax = _rows(x, bool(single)), 2**bits - 1
    every = x.reshape(1, -1) if single else rows
    lo, hi = every.amin(1).clamp(max=0), every.amax(1).clamp(min=0)
    full = (hi - lo) / qmax
    best = torch.full_like(full, torch.inf)
    for number in range(_CANDIDATES, 0, -1):
        scale = full * (number / _CANDIDATES)
        if bits <= 4:
            tried = [torch.full_like(full, zero_point) for zero_point in range(qmax + 1)]
        else:
            tried = [((-lo / full).round() + step).clamp(0, qmax) for step in range(-2, 3)]
            tried += [(-lo / scale).round().clamp(0, qmax), qmax - (hi / scale).round().clamp(0, qmax)]
        for zero_point in tried:
            best = torch.minimum(best, _error(rows, scale, zero_point, qmax))
    return best


def _ours(x: Tensor, which: Tensor) -> Tensor:
    bits, single = which.tolist()
    scale, zero_point = search_scale(x, bits, axis=None if single else 0, p=_P, candidates=_CANDIDATES)
    return _error(_rows(x, bool(single)), scale, zero_point, 2**bits - 1)


OP = Op(
    name="search_scale",
    cases=_cases,
    inputs=_inputs,
    ours=_ours,
    composition=_composition,
    bytes_moved=lambda case: math.prod(case.shape) * case.dtype.itemsize,
    tolerances=lambda _: [(1e-5, 0.0)],
)
