"""How a product with a packed weight is cut into tiles: as tuned for the GPU, else by shape, types and processors."""

from typing import NamedTuple

import torch
from torch import Tensor

from ttaq_kernels._config import tuned
from ttaq_kernels._launch import ceil_div, next_power_of_2
from ttaq_kernels.pack import BLOCK_BYTES

__all__ = ["gemm_config"]

_SLICE_BYTES = 128  # of x per row and step: the width of a swizzled row of shared memory
_SHARED_BYTES = 96 << 10  # what fits on every GPU since sm_80, and twice on the large ones
_MULTIPROCESSORS = 132  # assumed where there is no GPU
_FLOAT32_TILE = 2048  # float32 is multiplied outside of the tensor cores, from registers


class _Tile(NamedTuple):
    """`efficiency` compares what the tensor cores reach with that of the largest tile: a model, not a measurement."""

    rows: int
    outputs: int
    warps: int
    efficiency: float


_TILES = (
    _Tile(128, 128, 8, 1.0),
    _Tile(128, 64, 4, 0.9),
    _Tile(64, 128, 4, 0.9),
    _Tile(64, 64, 4, 0.7),
    _Tile(32, 64, 4, 0.5),
    _Tile(16, 64, 4, 0.35),
)


def _tile(rows: int, outputs: int, item_bytes: int, multiprocessors: int) -> _Tile:
    """The tile whose waves over the whole GPU take the least time."""
    fitting = [tile for tile in _TILES if item_bytes < 4 or tile.rows * tile.outputs <= _FLOAT32_TILE]

    def time(tile: _Tile) -> float:
        waves = ceil_div(ceil_div(rows, tile.rows) * ceil_div(outputs, tile.outputs), multiprocessors)
        return waves * tile.rows * tile.outputs / tile.efficiency

    return min(fitting, key=time)


def gemm_config(rows: int, outputs: int, width: int, bits: int, x: Tensor) -> dict[str, int]:
    """Blocks, warps and stages of a product, by its shape, its types and the size of the GPU."""
    multiprocessors = _MULTIPROCESSORS
    if x.is_cuda:
        multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
    tile = _tile(rows, outputs, x.itemsize, multiprocessors)
    # The step along K is not tuned: it decides the order of floating sums.
    step = max(BLOCK_BYTES, _SLICE_BYTES // x.itemsize * bits // 8)
    step = min(step, next_power_of_2(max(width, BLOCK_BYTES)))
    per_stage = step * (tile.outputs + tile.rows * x.itemsize * 8 // bits)
    stages = max(2, min(4, _SHARED_BYTES // per_stage))
    default = {"BLOCK_M": tile.rows, "BLOCK_N": tile.outputs, "num_warps": tile.warps, "num_stages": stages}
    # Batches of nearly the same size share an entry.
    key = f"W{bits} {str(x.dtype).removeprefix('torch.')} {next_power_of_2(rows)}x{outputs}x{x.shape[1]}"
    return {**tuned("packed_linear", key, default, x), "BLOCK_B": step}
