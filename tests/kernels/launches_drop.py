"""fake_quantize with QDrop: 1 and 8 random bits for each element, forward and backward."""

import torch
from kernel_launch import Launch

from ttaq_kernels import fake_quant
from ttaq_kernels._philox import Drop


def _fake_quantize(keep_quantized: float, dtype: torch.dtype, backward: bool) -> object:
    x = torch.zeros(4, 64, 16, 16, dtype=dtype)
    grid = (torch.ones(1), torch.zeros(1, dtype=torch.int32), 0, 15, None)
    drawn = {"drop": Drop.of(keep_quantized), "seed": torch.zeros((), dtype=torch.int64)}
    if backward:
        return fake_quant._launch_backward(True, x, x, *grid, **drawn)
    return fake_quant._launch_forward(x, *grid, **drawn)


def _launches() -> list[Launch]:
    return [
        Launch(
            f"fake_quantize_drop-{'backward' if backward else 'forward'}-{keep_quantized}-{str(dtype)[6:]}",
            lambda keep=keep_quantized, dtype=dtype, backward=backward: _fake_quantize(keep, dtype, backward),
            registers=96,
            rounds=True,
        )
        for keep_quantized in (0.5, 0.25)
        for dtype in (torch.bfloat16, torch.float32)
        for backward in (False, True)
    ]


LAUNCHES = _launches()
