"""A dense tensor seen as a matrix in memory order, whose rows or columns are the channels."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttaq_kernels._launch import ceil_div, launch, next_power_of_2, tl, triton

# Device functions stay without types: Triton has none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

__all__ = ["ELEMENTWISE", "Matrix", "dense", "rows_are_dense", "tile"]

_TILE = 2048  # elements of one program
# What may be tuned of a kernel without sums, whose results do not depend on how it is tiled.
ELEMENTWISE = {"TILE": _TILE, "num_warps": 4}
_COLUMNS = 64  # of one program where the columns are the channels: more rows then share one partial sum of dscale
_SMALLEST = 128  # elements of a program where there is one channel: the counters of QDrop need a multiple of it


@triton.jit
def tile(
    channels, rows, cols, col_blocks, CHANNEL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr
):  # fmt: skip
    """Offsets and mask of this program's tile of a [rows, cols] matrix; each row's or column's channel, which exist."""
    program = tl.program_id(0)
    first_row = (program // col_blocks).to(tl.int64) * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    offs_row = first_row + row
    offs_col = (program % col_blocks).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    mask_row, mask_col = offs_row < rows, offs_col < cols
    mask = mask_row & mask_col
    offs = offs_row * cols + offs_col
    if CHANNEL == "tensor":
        # There is one row: leaving it out keeps the offsets aligned, whatever the number of columns.
        offs = program.to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
        mask = offs < cols
        channel = row
        exists = row < 1
    elif CHANNEL == "row":
        channel, exists = offs_row, mask_row
    elif CHANNEL == "plane":
        channel = ((first_row % channels).to(tl.int32) + row) % channels
        exists = mask_row
    else:
        channel, exists = offs_col, mask_col
    return offs, mask, channel, exists


class Matrix(NamedTuple):
    """The tiling of a dense tensor.

    By `kind` the channels are its rows ("row"), its rows again and again ("plane") or its columns ("col"), or there is
    one channel and one row ("tensor").
    """

    channels: int
    rows: int
    cols: int
    kind: str
    block_rows: int
    block_cols: int

    @classmethod
    def of(cls, x: Tensor, axis: int | None, elements: int = _TILE) -> "Matrix":
        """`elements` of one program, a power of two of at least 128."""
        channels = 1 if axis is None else x.shape[axis]
        least, most = 1, elements
        if axis is None or channels == 1:
            kind, cols = "tensor", x.numel()
            least = _SMALLEST
        elif x.stride(axis) == 1:
            kind, cols = "col", channels
            most = _COLUMNS
        else:
            cols = x.stride(axis)
            kind = "row" if cols * channels == x.numel() else "plane"
        rows = x.numel() // cols if cols else 0
        block_cols = max(least, min(most, next_power_of_2(cols)))
        return cls(channels, rows, cols, kind, min(elements // block_cols, next_power_of_2(rows)), block_cols)

    def row_blocks(self) -> int:
        return ceil_div(self.rows, self.block_rows)

    def col_blocks(self) -> int:
        return ceil_div(self.cols, self.block_cols)

    def launch(
        self, who: str, kernel: Any, tensors: tuple[Tensor | None, ...], *scalars: float, **options: Any
    ) -> None:
        sizes = (self.channels, self.rows, self.cols, self.col_blocks())
        blocks: dict[str, Any] = {"CHANNEL": self.kind, "BLOCK_ROWS": self.block_rows, "BLOCK_COLS": self.block_cols}
        launch(who, kernel, self.row_blocks() * self.col_blocks(), *tensors, *sizes, *scalars, **blocks, **options)


def dense(tensor: Tensor, layout: Tensor) -> Tensor:
    """`tensor` with the strides of `layout`, copied only if it has others."""
    return tensor if tensor.stride() == layout.stride() else torch.empty_like(layout, dtype=tensor.dtype).copy_(tensor)


def rows_are_dense(x: Tensor) -> bool:
    """Whether `x` is dense and its indices of dimension 0 follow one after the other in memory."""
    layout = torch.empty_like(x, device="meta")
    return x.stride() == layout.stride() and (len(x) <= 1 or x.numel() == x.stride(0) * len(x))
