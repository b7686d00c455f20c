"""Every kernel, with the configurations it ships, compiled for sm_80, sm_89, sm_90 and sm_100 without a GPU."""

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ttaq_kernels import fake_quant, losses

pytestmark = pytest.mark.aot

# The package exports a function of the same name.
batch_norm = importlib.import_module("ttaq_kernels.batch_norm")


@dataclass(frozen=True)
class Launch:
    """A launcher call on small CPU tensors and what its kernels may use.

    `rounds`: the kernel rounds by adding and subtracting a constant, or must equal its reference bit for bit.
    """

    name: str
    call: Callable[[], object]
    registers: int
    rounds: bool = False


def _fake_quantize(axis: int | None, layout: torch.memory_format, dtype: torch.dtype, lsq: bool | None) -> object:
    """The forward for lsq=None, else the backward."""
    x = torch.zeros(4, 64, 16, 16, dtype=dtype).contiguous(memory_format=layout)
    channels = 1 if axis is None else x.shape[axis]
    grid: tuple[Tensor, ...] = (torch.ones(channels), torch.zeros(channels, dtype=torch.int32))
    if lsq is None:
        return fake_quant._launch_forward(x, *grid, 0, 15, axis)
    return fake_quant._launch_backward(lsq, x, x, *grid, 0, 15, axis)


def _fake_quantize_launches() -> list[Launch]:
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


def _batch_norm(x: Tensor, alpha: float) -> None:
    """Moments (unless alpha is 0), forward and backward."""
    channel = torch.ones(x.shape[1])
    batch_norm._launch_forward(x, channel, channel, channel, channel, alpha, 1e-5)
    batch_norm._launch_backward(x, x, channel, torch.ones(3, x.shape[1]), alpha, True, True)


def _batch_norm_launches() -> list[Launch]:
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
            f"batch_norm-{name}",
            lambda shape=shape, layout=layout, dtype=dtype, alpha=alpha: _batch_norm(
                torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout), alpha
            ),
            registers=128,
            rounds=True,
        )
        for name, (shape, layout, dtype, alpha) in kinds.items()
    ]


def _softmax_entropy(classes: int, dtype: torch.dtype) -> None:
    logits, row = torch.zeros(64, classes, dtype=dtype), torch.zeros(64)
    losses._launch_value(logits)
    losses._launch_gradient(row, logits, row, row, row)


def _softmax_entropy_launches() -> list[Launch]:
    return [
        Launch(
            f"softmax_entropy-{classes}-{str(dtype).removeprefix('torch.')}",
            lambda classes=classes, dtype=dtype: _softmax_entropy(classes, dtype),
            registers=64,
        )
        for classes, dtype in ((10, torch.bfloat16), (1000, torch.bfloat16), (22_000, torch.float32))
    ]


LAUNCHES = [
    *_fake_quantize_launches(),
    *_batch_norm_launches(),
    *_softmax_entropy_launches(),
]


@pytest.mark.parametrize("capability", [80, 89, 90, 100], ids="sm_{}".format)
@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: launch.name)
def test_compiled_kernel(launch: Launch, capability: int) -> None:
    # Not importable without Triton, where this test is skipped.
    from kernel_aot import SHARED_LIMIT, compile_launches

    kernels = compile_launches(capability, launch.call)
    assert kernels, f"{launch.name} launches nothing"
    for kernel in kernels:
        assert re.search(rf"^\.target sm_{capability}", kernel.ptx, re.MULTILINE), f"{kernel.name} is for another GPU"
        assert kernel.usage["REG"] <= launch.registers, f"{kernel.name} uses {kernel.usage['REG']} registers"
        assert kernel.usage["LOCAL"] == kernel.usage["STACK"] == 0, f"{kernel.name} spills: {kernel.usage}"
        assert kernel.shared <= SHARED_LIMIT[capability], f"{kernel.name} uses {kernel.shared} bytes of shared memory"
        if launch.rounds:
            assert "div.full" not in kernel.ptx, f"{kernel.name} divides with an error of 2 ulp"
            assert "fma.rn" not in kernel.ptx, f"{kernel.name} fuses a multiplication and an addition"
        # Disassembling takes longer than compiling, so it is done for one GPU.
        if launch.rounds and capability == 90:
            fused = re.search(r"\bFFMA\b.*\b12582912\b", kernel.sass)
            assert not fused, f"{kernel.name} rounds after a fused addition: {fused}"
