"""batch_norm with its moments: planes and rows, with and without aligned rows, with and without a sample mask."""

import torch
from kernel_launch import Launch
from torch import Tensor

from ttaq_kernels import _batch_norm_launch as launcher


def _batch_norm(x: Tensor, alpha: float, masked: bool) -> None:
    """Moments (unless alpha is 0), forward and backward."""
    channel = torch.ones(x.shape[1])
    mask = torch.ones(x.shape[0], dtype=torch.bool) if masked else None
    launcher.launch_forward(x, channel, channel, channel, channel, mask, alpha, 1e-5)
    launcher.launch_backward(x, x, channel, None, torch.ones(5, x.shape[1]), mask, alpha, True, True, False)


def _launches() -> list[Launch]:
    # Planes with and without aligned rows; with alpha 0 the moments and their gradients fall away.
    bf16, nchw, nhwc = torch.bfloat16, torch.contiguous_format, torch.channels_last
    kinds: dict[str, tuple[tuple[int, ...], torch.memory_format, torch.dtype, float]] = {
        "56x56-nchw-bfloat16": ((4, 64, 56, 56), nchw, bf16, 0.5),
        "56x56-channels_last-bfloat16": ((4, 64, 56, 56), nhwc, bf16, 0.5),
        "56x56-channels_last-bfloat16-alpha_0": ((4, 64, 56, 56), nhwc, bf16, 0.0),
        "14x14-nchw-bfloat16": ((64, 256, 14, 14), nchw, bf16, 0.5),
        "7x7-nchw-float32": ((64, 512, 7, 7), nchw, torch.float32, 0.5),
        "7x7-channels_last-float32": ((64, 512, 7, 7), nhwc, torch.float32, 0.5),
    }
    return [
        Launch(
            f"batch_norm-{name}{'-masked' * masked}",
            lambda shape=shape, layout=layout, dtype=dtype, alpha=alpha, masked=masked: _batch_norm(
                torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout), alpha, masked
            ),
            registers=128,
            rounds=True,
        )
        for name, (shape, layout, dtype, alpha) in kinds.items()
        for masked in (False, True)
        if not masked or name.startswith("14x14") or name.endswith("channels_last-bfloat16")
    ]


LAUNCHES = _launches()
