"""search_scale: one sampled tensor, the channels of a layer, each list of zero points, and the smallest sizes."""

import torch
from kernel_launch import Launch

from ttaq_kernels import scale_search


def _search(shape: tuple[int, int], qmin: int, qmax: int, candidates: int) -> None:
    row = torch.ones(shape[0])
    scale_search._launch(torch.zeros(shape), -row, row, qmin, qmax, 2.4, candidates)


LAUNCHES = [
    Launch(f"search_scale-{name}", lambda given=given: _search(*given), registers=128)
    for name, given in {
        "tensor-4_bits": ((1, 65_536), 0, 15, 100),
        "tensor-8_bits": ((1, 65_536), 0, 255, 100),
        "channels-2_bits": ((64, 576), 0, 3, 100),
        "channels-symmetric": ((64, 576), -8, 7, 100),
        "channels-2_bits-symmetric": ((64, 9), -2, 1, 100),
        "one_value-one_candidate": ((3, 1), 0, 15, 1),
    }.items()
]
