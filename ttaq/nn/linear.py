"""Linear layer with a weight, and where the caller says so an input, on quantization grids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttaq.errors import InputError
from ttaq.nn.integer import IntegerLayer, WeightCodes
from ttaq.nn.quantizer import Quantizer
from ttaq_kernels import pack_codes, pack_weight, packed_linear, unpack_codes
from ttaq_kernels.pack import PackedWeight
from ttaq_kernels.qgemm import packed_linear_input_gradient

__all__ = ["QuantLinear"]

_PACKED = "packed_weight"  # its name in a state_dict


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


class _PackedProduct(torch.autograd.Function):
    """The integer expression on the packed weight; the gradient of `x` goes straight through the rounding to codes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, input_scale: Tensor, offset: Tensor | None, weight: PackedWeight
    ) -> Tensor:
        ctx.weight = weight
        codes = (x.float() * input_scale.reciprocal()).round_()
        codes = (codes if offset is None else codes.add_(offset)).clamp_(-128, 127).to(torch.int8)
        scale = input_scale.reshape(-1)
        return packed_linear(codes, weight, bias, input_scale=scale, input_zero_point=offset, dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx = packed_linear_input_gradient(grad, ctx.weight) if ctx.needs_input_grad[0] else None
        dbias = grad.float().sum(0) if ctx.needs_input_grad[1] else None
        return dx, dbias, None, None, None


class QuantLinear(IntegerLayer, nn.Linear):  # type: ignore[misc]
    """`torch.nn.Linear`, with the same arguments, whose weight gets a grid when it is calibrated.

    `forward(input)` and `forward(input, input_scale)` as in `QuantConv2d`; input: [..., in_features].

    `pack()` replaces the weight by its codes in 2, 4 or 8 bits each, which the integer kernels read; outputs stay the
    same, bit for bit, where `input_scale` is given. Packed, `weight` is None, the state_dict has `packed_weight` in its
    place (uint8, the order of `ttaq_kernels.pack_codes`), and inputs of 8 bits with a zero point need it:
    `forward(input, input_scale, input_zero_point)`. Loading such a state_dict packs the layer.
    """

    _codes: Tensor | None
    _zero_point: Tensor | None
    _row_sum: Tensor | None

    def __init__(self, *args: Any, weight_quantizer: Quantizer | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._set_up(weight_quantizer)
        for name in ("_codes", "_zero_point", "_row_sum"):
            self.register_buffer(name, None, persistent=False)

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

    @property
    def is_packed(self) -> bool:
        return self._codes is not None

    def pack(self) -> Self:
        """Keep the codes of the weight instead of the weight; returns the layer.

        Raises `InputError` if the weight is not calibrated, has NaN or infinite values, or has a grid of another axis,
        and for inputs from a twin grid, whose integers are wider than the kernels read.
        """
        quantizer = self.weight_quantizer
        if self.is_packed:
            return self
        if quantizer.scale is None or quantizer.zero_point is None:
            raise InputError(
                "QuantLinear.pack: the weight has no grid, expected a calibrated layer; call calibrate_weight() first"
            )
        if quantizer.scale.numel() not in (1, self.out_features):
            raise InputError(
                f"QuantLinear.pack: the grid of the weight has {quantizer.scale.numel()} scales, expected 1 or "
                f"{self.out_features}, one per output; calibrate it with axis=0 or axis=None"
            )
        if self.input_limit > 255:
            raise InputError(
                f"QuantLinear.pack: the inputs have integers up to {self.input_limit}, expected at most 255, what 8 "
                f"bits hold: a twin grid; quantize with the flag uniform_gelu or uniform_softmax, or leave it unpacked"
            )
        if not bool(self.weight.isfinite().all()):
            raise InputError(
                "QuantLinear.pack: the weight has NaN or infinite values, which no code stands for; look where they "
                "come from"
            )
        with torch.no_grad():
            codes = WeightCodes.of(self.weight, quantizer, self.input_limit, 1).codes.to(torch.int16)
            q = codes + quantizer.zero_point.to(torch.int16).view(-1, 1)
            self._set_packed(q, quantizer.scale, quantizer.zero_point)
        return self

    def calibrate_weight(self, search: str = "mse") -> None:
        if self.is_packed:
            raise InputError("QuantLinear.calibrate_weight: the layer is packed; calibrate it before pack()")
        super().calibrate_weight(search)

    def _set_packed(self, q: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        quantizer = self.weight_quantizer
        weight = pack_weight(q, quantizer.bits, scale, None if quantizer.symmetric else zero_point)
        self._codes, self._zero_point, self._row_sum = weight.codes, weight.zero_point, weight.row_sum
        self._bits, self._largest = weight.bits, weight.largest
        self.register_parameter("weight", None)

    def _packed(self) -> PackedWeight:
        """The weight as the kernels read it, with the scales of the quantizer."""
        codes, row_sum, scale = self._codes, self._row_sum, self.weight_quantizer.scale
        if codes is None or row_sum is None or scale is None:
            raise RuntimeError("QuantLinear: the packed weight lost its grid")
        return PackedWeight(codes, scale, self._zero_point, row_sum, self._bits, self.in_features, self._largest)

    def forward(
        self, input: Tensor, input_scale: Tensor | None = None, input_zero_point: Tensor | None = None
    ) -> Tensor:
        if self.is_packed:
            return self._packed_forward(input, input_scale, input_zero_point)
        if self.weight_quantizer.scale is None:
            return super().forward(input)
        if input_scale is None:
            return functional.linear(input, self.weight_quantizer(self.weight), self.bias)
        rows = input.reshape(-1, input.shape[-1])
        return self.integer_forward(rows, input_scale, _MatrixProduct()).view(*input.shape[:-1], self.out_features)

    def _packed_forward(self, input: Tensor, input_scale: Tensor | None, input_zero_point: Tensor | None) -> Tensor:
        weight, bias = self._packed(), None if self.bias is None else self.bias.float()
        if input_scale is None:
            return packed_linear(input, weight, bias)
        offset = None
        if self.input_limit > 128:  # q - zero_point may need 9 bits, q - 128 does not
            if input_zero_point is None:
                raise InputError(
                    "QuantLinear: a packed layer got an 8-bit input (input_limit 255) without input_zero_point; pass "
                    "the zero point of its quantizer, or set input_limit to 127 for inputs of fewer bits"
                )
            offset = input_zero_point.reshape(-1) - 128
        rows = input.reshape(-1, input.shape[-1])
        y: Tensor = _PackedProduct.apply(rows, bias, input_scale, offset, weight)  # type: ignore[no-untyped-call]
        return y.view(*input.shape[:-1], self.out_features)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_packed:
            quantizer, weight = self.weight_quantizer, self._packed()
            q = weight.integers()
            if quantizer.zero_point is not None:
                q = q + quantizer.zero_point.to(torch.int16).view(-1, 1)
            destination[prefix + _PACKED] = pack_codes(q, quantizer.bits)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name, quantizer = prefix + _PACKED, self.weight_quantizer
        packed = state_dict.get(name)
        scale, zero_point = (state_dict.get(f"{prefix}weight_quantizer.{key}") for key in ("scale", "zero_point"))
        if packed is not None and scale is not None and zero_point is not None:
            width = -(-self.in_features * quantizer.bits // 8)
            if tuple(packed.shape) == (self.out_features, width):
                device = quantizer._anchor.device
                q = unpack_codes(packed.to(device), quantizer.bits, self.in_features, signed=quantizer.symmetric)
                self._set_packed(q, scale.to(device), zero_point.to(device))
            else:
                error_msgs.append(
                    f"size mismatch for {name}: the file has {tuple(packed.shape)}, a layer of {self.out_features} x "
                    f"{self.in_features} weights of {quantizer.bits} bits has {(self.out_features, width)}."
                )
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if packed is not None and name in unexpected_keys:
            unexpected_keys.remove(name)
        if self.is_packed and packed is None and strict:
            missing_keys.append(name)
