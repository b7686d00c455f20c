"""reconstruction_loss with all it can fuse and with nothing, and gather_mix of floats and codes."""

import importlib

import torch
from kernel_launch import Launch

# The package exports functions of the same names.
reconstruction = importlib.import_module("ttaq_kernels.reconstruction")
gather_mix = importlib.import_module("ttaq_kernels.gather_mix")


def _loss(dtype: torch.dtype, keep_quantized: float, plain: bool) -> object:
    h = torch.zeros(4, 64, 16, 16, dtype=dtype).to(memory_format=torch.channels_last)
    if plain:
        return reconstruction._launch(h, h, None, None, None, 0, 0, False, 1.0, None)
    grid = (torch.ones(1), torch.zeros(1, dtype=torch.int32), 0, 15)
    seed = torch.zeros((), dtype=torch.int64)
    return reconstruction._launch(h, h, h, *grid, True, keep_quantized, seed)


def _mix(dtype: torch.dtype, codes: bool, keep_quantized: float) -> object:
    floating = torch.zeros(8, 64, 16, 16, dtype=dtype)
    quantized = torch.zeros_like(floating, dtype=torch.uint8) if codes else floating
    grid = (torch.ones(()), torch.zeros((), dtype=torch.int32)) if codes else (None, None)
    index, seed = torch.zeros(4, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    return gather_mix._launch(quantized, floating, index, keep_quantized, seed, *grid)


LAUNCHES = [
    *(
        Launch(f"reconstruction-{name}", lambda given=given: _loss(*given), registers=128, rounds=True)
        for name, given in {
            "bfloat16-drop": (torch.bfloat16, 0.5, False),
            "float32-drop": (torch.float32, 0.5, False),
            "bfloat16-drop_8_bits": (torch.bfloat16, 0.25, False),
            "float16": (torch.float16, 1.0, False),
            "bfloat16-plain": (torch.bfloat16, 1.0, True),
        }.items()
    ),
    *(
        Launch(f"gather_mix-{name}", lambda given=given: _mix(*given), registers=64, rounds=True)
        for name, given in {
            "bfloat16": (torch.bfloat16, False, 0.5),
            "bfloat16-8_bits": (torch.bfloat16, False, 0.25),
            "bfloat16-codes": (torch.bfloat16, True, 0.5),
            "float32-codes": (torch.float32, True, 0.5),
        }.items()
    ),
]
