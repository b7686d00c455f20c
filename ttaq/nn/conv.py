"""Convolution with a weight, and where the caller says so an input, on quantization grids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttaq.nn.integer import IntegerLayer, WeightCodes
from ttaq.nn.quantizer import Quantizer

__all__ = ["QuantConv2d"]


@dataclass(frozen=True)
class _Convolution:
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        if grad.is_contiguous(memory_format=torch.channels_last):
            # An input that was not kept has no layout; that of the weight decides about the gradient's then.
            weight = weight.contiguous(memory_format=torch.channels_last)
        geometry = (self.stride, self.padding, self.dilation, False, [0, 0], self.groups)
        dx, dweight, _ = torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, [*needs, False])
        return dx, dweight

    def per_output(self, vector: Tensor) -> Tensor:
        return vector.view(-1, 1, 1)


class QuantConv2d(IntegerLayer, nn.Conv2d):
    """`torch.nn.Conv2d`, with the same arguments, whose weight gets a grid when it is calibrated.

    `forward(input)`: the float layer, bit for bit, until the weight is calibrated; then a convolution with the
    dequantized weight (for calibration: the input may be anything).
    `forward(input, input_scale)`: for an input on a grid `k * input_scale`, the integer expression of
    `ttaq.nn.integer`, equal to integer arithmetic bit for bit; the float layer until the weight is calibrated. An
    input_scale of None is `forward(input)`.

    weight_offset: [C_out] or None, a number that is added to every weight of an output channel without being quantized:
        y[k] += weight_offset[k] * (sum of the input of the group over the kernel window). One channel per group more to
        compute, for a grid that need not hold zero. In the state_dict where it is set.

    input: [N, C, H, W] or [C, H, W], float types. Gradients: straight-through, those of the convolution with the
    dequantized weight. All strides, paddings, dilations, groups and padding modes.
    """

    weight_offset: Tensor | None

    def __init__(self, *args: Any, weight_quantizer: Quantizer | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._set_up(weight_quantizer)
        self.register_buffer("weight_offset", None)

    @classmethod
    def from_float(cls, layer: nn.Conv2d, weight_quantizer: Quantizer | None = None) -> QuantConv2d:
        """The same layer as `layer`, whose parameters it shares."""
        new = cls(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            layer.bias is not None,
            layer.padding_mode,
            device="meta",
            weight_quantizer=weight_quantizer or Quantizer(8, axis=0, device=layer.weight.device),
        )
        new._parameters = dict(layer._parameters)
        return new.train(layer.training)

    def forward(self, input: Tensor, input_scale: Tensor | None = None) -> Tensor:
        if self.weight_quantizer.scale is None or input_scale is None:
            weight = self.weight if self.weight_quantizer.scale is None else self.weight_quantizer(self.weight)
            y: Tensor = self._conv_forward(input, self.moved(weight), self.bias)
            return y
        if input.ndim == 3:
            return self.forward(input[None], input_scale)[0]
        left, right, top, bottom = self._reversed_padding_repeated_twice
        padding = (top, left)
        if self.padding_mode != "zeros" or (left, top) != (right, bottom):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input, padding = functional.pad(input, (left, right, top, bottom), mode=mode), (0, 0)
        product = _Convolution(self.stride, padding, self.dilation, self.groups)
        y = self.integer_forward(input, input_scale, product)
        if self.weight_offset is None:
            return y
        ones = self.weight.new_ones((self.groups, *self.weight.shape[1:]), dtype=torch.float32)
        window = self.exact_product(input, input_scale, WeightCodes(ones, ones.new_ones(1), ones.shape[1]), product)
        offset = self.weight_offset.float().view(self.groups, -1, 1, 1) * window.unsqueeze(2)
        return (y.float() + offset.flatten(1, 2)).to(y.dtype)

    def moved(self, weight: Tensor) -> Tensor:
        """`weight` with the offset of each output channel."""
        offset = self.weight_offset
        return weight if offset is None else weight + offset.to(weight.dtype).view(-1, 1, 1, 1)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}weight" in state_dict:
            found = f"{prefix}weight_offset" in state_dict
            self.weight_offset = torch.zeros(self.out_channels, device=self.weight.device) if found else None
        super()._load_from_state_dict(state_dict, prefix, *rest)
