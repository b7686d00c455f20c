"""Linear layer with a weight, and where the caller says so an input, on quantization grids."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ttaq.nn.integer import IntegerLayer
from ttaq.nn.quantizer import Quantizer

__all__ = ["QuantLinear"]


class _MatrixProduct:
    groups = 1

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.linear(x, weight)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        return grad @ weight if needs[0] else None, grad.T @ x if needs[1] else None

    def per_output(self, vector: Tensor) -> Tensor:
        return vector


class QuantLinear(IntegerLayer, nn.Linear):  # type: ignore[misc]
    """`torch.nn.Linear`, with the same arguments, whose weight gets a grid when it is calibrated.

    `forward(input)` and `forward(input, input_scale)` as in `QuantConv2d`; input: [..., in_features].
    """

    def __init__(self, *args: Any, weight_quantizer: Quantizer | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._set_up(weight_quantizer)

    @classmethod
    def from_float(cls, layer: nn.Linear, weight_quantizer: Quantizer | None = None) -> QuantLinear:
        """The same layer as `layer`, whose parameters it shares."""
        new = cls(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            device="meta",
            weight_quantizer=weight_quantizer or Quantizer(8, axis=0, device=layer.weight.device),
        )
        new._parameters = dict(layer._parameters)
        return new.train(layer.training)

    def forward(self, input: Tensor, input_scale: Tensor | None = None) -> Tensor:
        if self.weight_quantizer.scale is None:
            return super().forward(input)
        if input_scale is None:
            return functional.linear(input, self.weight_quantizer(self.weight), self.bias)
        rows = input.reshape(-1, input.shape[-1])
        return self.integer_forward(rows, input_scale, _MatrixProduct()).view(*input.shape[:-1], self.out_features)
