"""softmax_entropy of the logits of ImageNet, CIFAR and ImageNet-21k classifiers."""

import math

from torch import Tensor

from benchmarks.registry import Case, Op
from ttaq_kernels import softmax_entropy

_SHAPES = {
    "tiny": {"tiny": [(4, 10)]},
    "cpu": {"CIFAR-10 b200": [(200, 10)], "ImageNet b64": [(64, 1000)]},
    "cuda": {"ImageNet b64": [(64, 1000)], "CIFAR-10 b200": [(200, 10)], "ImageNet-21k b64": [(64, 21_841)]},
}


def _cases(suite: str) -> list[Case]:
    return [
        Case("softmax_entropy", model, shape, step=step)
        for model, shapes in _SHAPES[suite].items()
        for shape in shapes
        for step in (False, True)
    ]


def _composition(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


def _bytes(case: Case) -> int:
    """Forward: the logits. Backward: the logits and their gradient."""
    return math.prod(case.shape) * case.dtype.itemsize * (3 if case.step else 1)


OP = Op(
    name="softmax_entropy",
    cases=_cases,
    inputs=lambda case, draw: ((3 * case.tensor(draw)).requires_grad_(case.step),),
    ours=softmax_entropy,
    composition=_composition,
    bytes_moved=_bytes,
    tolerances=lambda _: [(1e-6, 5e-6), (1e-5, 5e-6)],
)
