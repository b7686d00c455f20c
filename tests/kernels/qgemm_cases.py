"""Random products of a packed weight, and what they are by their formula, without the code under test."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from ttaq_kernels import pack_weight
from ttaq_kernels.pack import PackedWeight

ROWS, OUTPUTS, LENGTHS = [0, 1, 2, 5, 33], [0, 1, 3, 16, 70], [0, 1, 31, 32, 33, 64, 65, 130, 257]


@dataclass
class Product:
    """q, zero_point, scale: the weight. x, input_zero_point, input_scale: int8 activations, or floating x and None."""

    bits: int
    q: Tensor
    zero_point: Tensor | None
    scale: Tensor
    x: Tensor
    input_zero_point: Tensor | None
    input_scale: Tensor | None
    bias: Tensor | None

    @property
    def weight(self) -> PackedWeight:
        return pack_weight(self.q, self.bits, self.scale, self.zero_point)

    @property
    def arguments(self) -> dict[str, Tensor | None]:
        return {"input_scale": self.input_scale, "input_zero_point": self.input_zero_point}

    def launcher_arguments(self, dtype: torch.dtype, *out_grid: Tensor | int) -> tuple[object, ...]:
        """Of `_launch_gemm`, on the device of x; `out_grid`: scale, zero point, qmin, qmax."""
        weight, device = self.weight, self.x.device
        tensors = (weight.scale, weight.zero_point, weight.row_sum, self.input_scale, self.input_zero_point, self.bias)
        on_device = [None if t is None else t.to(device) for t in tensors]
        grid = [value.to(device) if isinstance(value, Tensor) else value for value in out_grid] or [None, None, 0, 0]
        return (self.x, weight.codes.to(device), weight.bits, *on_device, dtype, *grid)

    def integers(self) -> Tensor:
        return self.q if self.zero_point is None else self.q - self.zero_point.view(-1, 1)

    def expected(self) -> Tensor:
        """The integer sum in float64, then the fp32 expression; for floating x all of it in float64."""
        x, weight = self.x.cpu().double(), self.integers().double()
        if self.input_scale is None:
            y = x @ (weight * self.scale.double().view(-1, 1)).T
            return y if self.bias is None else y + self.bias.double()
        if self.input_zero_point is not None:
            x = x - self.input_zero_point
        y = (x @ weight.T).float() * (self.scale * self.input_scale)
        return y if self.bias is None else y + self.bias

    def magnitude(self) -> Tensor:
        """The sum of the magnitudes of the terms of a floating product."""
        weight = self.integers().double().abs() * self.scale.double().view(-1, 1)
        bias = 0.0 if self.bias is None else self.bias.double().abs()
        return self.x.cpu().double().abs() @ weight.T + bias


def make(
    bits: int,
    asymmetric: bool,
    rows: int,
    outputs: int,
    length: int,
    *,
    seed: int = 0,
    shared_scale: bool = False,
    input_zero_point: int | None = None,
    bias: bool = True,
    dtype: torch.dtype = torch.int8,
) -> Product:
    draw = torch.Generator().manual_seed(seed)
    low = 0 if asymmetric else -(1 << (bits - 1))
    q = torch.randint(low, low + (1 << bits), (outputs, length), generator=draw)
    scale = torch.rand(1 if shared_scale else outputs, generator=draw) + 0.01
    zero_point = torch.randint(0, 1 << bits, scale.shape, generator=draw, dtype=torch.int32) if asymmetric else None
    integer = dtype is torch.int8
    if integer:
        x = torch.randint(-128, 128, (rows, length), generator=draw, dtype=torch.int8)
    else:
        x = torch.randn(rows, length, generator=draw).to(dtype)
    offset = None if input_zero_point is None else torch.tensor([input_zero_point], dtype=torch.int32)
    return Product(
        bits,
        q,
        zero_point,
        scale,
        x,
        offset if integer else None,
        torch.rand(1, generator=draw) if integer else None,
        torch.randn(outputs, generator=draw) if bias else None,
    )


@st.composite
def products(draw: st.DrawFn, dtype: torch.dtype = torch.int8) -> Product:
    """Any bits, grids, zero points and shapes."""
    return make(
        draw(st.integers(2, 8)),
        draw(st.booleans()),
        draw(st.sampled_from(ROWS)),
        draw(st.sampled_from(OUTPUTS)),
        draw(st.sampled_from(LENGTHS)),
        seed=draw(st.integers(0, 10_000)),
        shared_scale=draw(st.booleans()),
        input_zero_point=draw(st.none() | st.integers(-128, 127)),
        bias=draw(st.booleans()),
        dtype=dtype,
    )
