"""group_affine: feature maps in both layouts, tokens, vectors, by index and in equal parts, and the smallest sizes."""

import importlib

import torch
from kernel_launch import Launch

# The package exports a function of the same name.
group_affine = importlib.import_module("ttaq_kernels.group_affine")


def _step(shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype, groups: int, by_index: bool) -> None:
    x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout)
    weight = torch.ones(groups, shape[1])
    index = torch.zeros(shape[0], dtype=torch.int32) if by_index else None
    group_affine._launch_forward(x, weight, weight, index)
    group_affine._launch_forward(x, weight, None, index)
    for needs in ((True, True), (True, False), (False, True)):
        group_affine._launch_backward(x, x, weight, index, *needs)


_NCHW, _NHWC = torch.contiguous_format, torch.channels_last
LAUNCHES = [
    Launch(f"group_affine-{name}", lambda given=given: _step(*given), registers=128)
    for name, given in {
        "56x56-channels_last-bfloat16": ((4, 256, 56, 56), _NHWC, torch.bfloat16, 2, False),
        "7x7-nchw-float32-index": ((4, 512, 7, 7), _NCHW, torch.float32, 2, True),
        "vectors-float16": ((8, 768), _NCHW, torch.float16, 4, True),
        "one_value": ((1, 1), _NCHW, torch.float32, 1, False),
    }.items()
]
