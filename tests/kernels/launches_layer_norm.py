"""layer_norm: rows of transformers and the longest, alone, with groups, on a grid and as codes; the smallest sizes."""

import torch
from kernel_launch import Launch

from ttaq_kernels import _layer_norm_kernels as kernels


def _step(
    shape: tuple[int, ...], dtype: torch.dtype, groups: int, by_index: bool, grid: tuple[int, int] | None
) -> None:
    x = torch.zeros(shape, dtype=dtype)
    weight = torch.ones(groups, shape[-1])
    index = torch.zeros(shape[0], dtype=torch.int32) if by_index else None
    quantizer = (None, None, 0, 255) if grid is None else (torch.ones(1), torch.zeros(1, dtype=torch.int32), *grid)
    for codes in (False,) if grid is None else (False, True):
        statistics = kernels.launch_forward(x, weight, weight, index, *quantizer, codes, 1e-6)[0]
    arguments = (x, x, weight, weight, statistics, index, *quantizer, groups)
    for needs in ((True, True), (True, False)):
        kernels.launch_backward(*arguments, *needs)


LAUNCHES = [
    Launch(f"layer_norm-{name}", lambda given=given: _step(*given), registers=registers, rounds=True)
    for name, registers, given in (
        ("384-bfloat16", 128, ((4, 197, 384), torch.bfloat16, 1, False, None)),
        ("768-bfloat16-groups-8_bits", 128, ((4, 197, 768), torch.bfloat16, 2, False, (0, 255))),
        ("768-float32-index-4_bits", 128, ((4, 50, 768), torch.float32, 2, True, (-8, 7))),
        ("8192-float32-8_bits", 128, ((2, 8192), torch.float32, 1, False, (0, 255))),
        ("one_value-1_bit", 128, ((1, 1), torch.float16, 1, False, (0, 1))),
    )
]
