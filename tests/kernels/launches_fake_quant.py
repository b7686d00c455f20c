"""fake_quantize: every way the channels lie, every direction."""

import torch
from kernel_launch import Launch
from torch import Tensor

from ttaq_kernels import fake_quant


def _fake_quantize(axis: int | None, layout: torch.memory_format, dtype: torch.dtype, lsq: bool | None) -> object:
    """The forward for lsq=None, else the backward."""
    x = torch.zeros(4, 64, 16, 16, dtype=dtype).contiguous(memory_format=layout)
    channels = 1 if axis is None else x.shape[axis]
    grid: tuple[Tensor, ...] = (torch.ones(channels), torch.zeros(channels, dtype=torch.int32))
    if lsq is None:
        return fake_quant._launch_forward(x, *grid, 0, 15, axis)
    return fake_quant._launch_backward(lsq, x, x, *grid, 0, 15, axis)


def _launches() -> list[Launch]:
    kinds = {
        "tensor": (None, torch.contiguous_format),
        "row": (0, torch.contiguous_format),
        "plane": (1, torch.contiguous_format),
        "col": (1, torch.channels_last),
    }
    directions = {"forward": None, "ste": False, "lsq": True}
    return [
        Launch(
            f"fake_quantize-{direction}-{kind}-{str(dtype).removeprefix('torch.')}",
            lambda where=where, dtype=dtype, lsq=lsq: _fake_quantize(*where, dtype, lsq),
            registers=64 if lsq is None else 96,
            rounds=True,
        )
        for kind, where in kinds.items()
        for direction, lsq in directions.items()
        for dtype in (torch.bfloat16, torch.float32)
        if dtype is torch.bfloat16 or kind == "tensor"
    ]


LAUNCHES = _launches()
