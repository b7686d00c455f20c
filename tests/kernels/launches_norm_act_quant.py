"""norm_act_quant: every output, forward and backward, as the layers of a ResNet use them."""

import torch
from kernel_launch import Launch
from torch import Tensor

from ttaq_kernels import _batch_norm_launch as launcher
from ttaq_kernels.reference.norm_act_quant import Epilogue


def _after(x: Tensor, act: str, residual: bool) -> Epilogue:
    grid = (torch.ones(1), torch.zeros(1, dtype=torch.int32), 0, 15)
    return Epilogue(torch.zeros_like(x) if residual else None, *grid, act)


def _forward(x: Tensor, output: str, act: str, residual: bool) -> None:
    channel = torch.ones(x.shape[1])
    after = _after(x, act, residual)
    launcher.launch_forward(x, *[channel] * 4, None, 0.5, 1e-5, after=after, output=output)


def _backward(x: Tensor, act: str, residual: bool) -> None:
    channel, after = torch.ones(x.shape[1]), _after(x, act, residual)
    needs = (True, True, residual)
    launcher.launch_backward(x, x, channel, channel, torch.ones(5, x.shape[1]), None, 0.5, *needs, after=after)


def _launches() -> list[Launch]:
    bf16, nchw, nhwc = torch.bfloat16, torch.contiguous_format, torch.channels_last
    layers = {
        "56x56-channels_last-bfloat16-relu": ((4, 64, 56, 56), nhwc, bf16, "relu", False),
        "56x56-channels_last-bfloat16-residual-relu": ((4, 256, 56, 56), nhwc, bf16, "relu", True),
        "7x7-nchw-float32-relu6": ((64, 512, 7, 7), nchw, torch.float32, "relu6", False),
    }
    launches = []
    for name, (shape, layout, dtype, act, residual) in layers.items():
        x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout)
        for output in ("values", "codes", "packed"):
            launches.append(
                Launch(
                    f"norm_act_quant-{output}-{name}",
                    lambda x=x, output=output, act=act, residual=residual: _forward(x, output, act, residual),
                    registers=128,
                    rounds=True,
                )
            )
        launches.append(
            Launch(
                f"norm_act_quant-backward-{name}",
                lambda x=x, act=act, residual=residual: _backward(x, act, residual),
                registers=128,
                rounds=True,
            )
        )
    return launches


LAUNCHES = _launches()
