"""The losses: few classes, many, more than a block; alone, and with weights, offset and every gradient."""

import torch
from kernel_launch import Launch

from ttaq_kernels import cross_entropy, losses


def _loss(kind: str, classes: int, dtype: torch.dtype, options: bool) -> None:
    logits = torch.zeros(64, classes, dtype=dtype)
    given = (torch.zeros(64), torch.zeros(classes)) if options else (None, None)
    losses._launch_loss(logits, *given, kind, options)


def _cross_entropy(symmetric: bool, classes: int, dtype: torch.dtype, options: bool) -> None:
    logits = torch.zeros(64, classes, dtype=dtype)
    given = (torch.zeros(64, dtype=torch.bool), torch.zeros(classes)) if options else (None, None)
    cross_entropy._launch_cross_entropy(logits, logits, *given, symmetric, True, options)


def _launches() -> list[Launch]:
    sizes = ((10, torch.bfloat16, False), (1000, torch.bfloat16, True), (22_000, torch.float32, True))
    kinds = {
        "softmax_entropy": lambda *case: _loss("entropy", *case),
        "soft_likelihood_ratio": lambda *case: _loss("likelihood_ratio", *case),
        "softmax_cross_entropy": lambda *case: _cross_entropy(False, *case),
        "softmax_cross_entropy-symmetric": lambda *case: _cross_entropy(True, *case),
    }
    return [
        Launch(
            f"{name}-{size[0]}-{str(size[1]).removeprefix('torch.')}",
            lambda call=call, size=size: call(*size),
            registers=128,
        )
        for name, call in kinds.items()
        for size in sizes
    ]


LAUNCHES = _launches()
