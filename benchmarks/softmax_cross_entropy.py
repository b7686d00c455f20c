"""Symmetric softmax_cross_entropy with gradients of both sides, as ROID runs it, of the logits of softmax_entropy."""

from torch import Tensor

from benchmarks.registry import Op
from benchmarks.softmax_entropy import bytes_moved, cases
from ttaq_kernels import softmax_cross_entropy


def _composition(logits: Tensor, target: Tensor) -> Tensor:
    log_p, log_r = logits.log_softmax(1), target.log_softmax(1)
    return -0.5 * (log_r.exp() * log_p).sum(1) - 0.5 * (log_p.exp() * log_r).sum(1)


OP = Op(
    name="softmax_cross_entropy",
    cases=lambda suite: cases("softmax_cross_entropy", suite),
    inputs=lambda case, draw: tuple((3 * case.tensor(draw)).requires_grad_(case.step) for _ in range(2)),
    ours=lambda logits, target: softmax_cross_entropy(logits, target, symmetric=True),
    composition=_composition,
    bytes_moved=lambda case: 2 * bytes_moved(case),
    tolerances=lambda _: [(1e-6, 1e-5), (1e-5, 5e-6), (1e-5, 5e-6)],
)
