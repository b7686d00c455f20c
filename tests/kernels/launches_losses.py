"""softmax_entropy: few classes, many, more than a block."""

import torch
from kernel_launch import Launch

from ttaq_kernels import losses


def _softmax_entropy(classes: int, dtype: torch.dtype) -> None:
    logits, row = torch.zeros(64, classes, dtype=dtype), torch.zeros(64)
    losses._launch_value(logits)
    losses._launch_gradient(row, logits, row, row, row)


def _launches() -> list[Launch]:
    return [
        Launch(
            f"softmax_entropy-{classes}-{str(dtype).removeprefix('torch.')}",
            lambda classes=classes, dtype=dtype: _softmax_entropy(classes, dtype),
            registers=64,
        )
        for classes, dtype in ((10, torch.bfloat16), (1000, torch.bfloat16), (22_000, torch.float32))
    ]


LAUNCHES = _launches()
