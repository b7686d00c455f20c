"""softmax_entropy of the logits of ImageNet, CIFAR and ImageNet-21k classifiers."""

import math

from torch import Tensor

from benchmarks.networks import NETWORKS
from benchmarks.registry import Case, Op
from ttaq_kernels import softmax_entropy

# Classifiers with many more classes than the networks of the table.
_MORE = {"cuda": [("ImageNet-21k b64", (64, 21_841))]}


def cases(op: str, suite: str) -> list[Case]:
    """Forward and step of a loss at the logits of each classifier."""
    shapes: dict[tuple[int, ...], str] = {}
    for network in NETWORKS[suite]:
        if network.classes is not None:
            shapes.setdefault((network.batch, network.classes), network.label)
    logits = [*((model, shape) for shape, model in shapes.items()), *_MORE.get(suite, [])]
    return [Case(op, model, shape, step=step) for model, shape in logits for step in (False, True)]


def _composition(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


def bytes_moved(case: Case) -> int:
    """Forward: the logits. Backward: the logits and their gradient."""
    return math.prod(case.shape) * case.dtype.itemsize * (3 if case.step else 1)


OP = Op(
    name="softmax_entropy",
    cases=lambda suite: cases("softmax_entropy", suite),
    inputs=lambda case, draw: ((3 * case.tensor(draw)).requires_grad_(case.step),),
    ours=softmax_entropy,
    composition=_composition,
    bytes_moved=bytes_moved,
    tolerances=lambda _: [(1e-6, 5e-6), (1e-5, 5e-6)],
)
