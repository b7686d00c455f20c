"""The integer expression of a layer whose weight and input lie on quantization grids, evaluated exactly in float.

    acc[n] = sum_k (q_w[n, k] - zero_point_w[n]) (q_a[k] - zero_point_a)          padded taps contribute 0
    y[n]   = fp32(acc[n]) * (scale_w[n] * scale_a) + bias[n]                      then the type of the input

In float32 the sum is exact, in any order, while `sum_k |q_w - zero_point_w| * max |q_a - zero_point_a|` stays below
2^24. Where it does not, the sum over k is cut into pieces that do, and these are added in float64: that costs little, a
float64 convolution five times the time. Inputs of more than 8 bits (twin grids) are cut into two digits first. So `y`
has the bits that integer arithmetic gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from ttaq.nn.quantizer import Quantizer

__all__ = ["EXACT", "Digits", "IntegerLayer", "Product", "WeightCodes"]

EXACT = 2**24  # float32 holds every integer up to here
_MOST_PIECES = 16
_WIDEST_CODE = 255  # of 8 bits: integers beyond it are summed as two digits


class Product(Protocol):
    """A product of x [N, K, ...] and weight [C_out, K / groups, ...], linear in both, without bias."""

    @property
    def groups(self) -> int: ...

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor: ...

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of x and weight that are needed; that of x reads nothing of `x` but its shape."""

    def per_output(self, vector: Tensor) -> Tensor:
        """A vector [C_out] or [1], shaped to broadcast over a product."""


class Digits(NamedTuple):
    """Integers x as `high * base + low`. limit: the largest |high| and |low|."""

    base: int
    limit: int

    @classmethod
    def of(cls, largest: int) -> Digits:
        """The digits of integers up to `largest`."""
        base = 1 << (largest.bit_length() // 2)
        return cls(base, max((largest + base // 2) // base, base // 2))

    def sum(self, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        """fp32(product(x)) of a linear `product` that is exact for each digit."""
        high = (x * (1 / self.base)).round_()
        return product(high).double().mul_(self.base).add_(product(x - high * self.base)).float()


class WeightCodes(NamedTuple):
    """A weight as integers, and how to sum exactly with it.

    codes: q - zero_point in fp32, the shape of the weight. scale: fp32, [C_out] or [1].
    piece: how many inputs can be summed exactly in float32; 0 to sum in float64. digits: of the inputs, where these are
    summed one digit after the other.
    """

    codes: Tensor
    scale: Tensor
    piece: int
    digits: Digits | None = None

    @classmethod
    def of(cls, weight: Tensor, quantizer: Quantizer, input_limit: int, groups: int) -> WeightCodes:
        """`input_limit`: the largest |q_a - zero_point_a| of the inputs to come."""
        if quantizer.scale is None:
            raise RuntimeError("WeightCodes: the weight has no scale, calibrate it first")
        codes = (quantizer(weight.float()) / _per_row(quantizer.scale, weight)).round_()
        inputs = codes.shape[1]
        digits = Digits.of(input_limit) if input_limit > _WIDEST_CODE else None
        limit = input_limit if digits is None else digits.limit
        load = codes.abs().reshape(*codes.shape[:2], -1).sum(2)
        # With groups a piece would have to take some inputs of every group: these sums are short anyway.
        for pieces in range(1, 1 + min(inputs, _MOST_PIECES if groups == 1 else 1)):
            piece = -(-inputs // pieces)
            if all(float(part.sum(1).amax()) * limit < EXACT for part in torch.split(load, piece, 1)):
                return cls(codes, quantizer.scale, piece, digits)
        return cls(codes, quantizer.scale, 0)

    def dequantized(self) -> Tensor:
        return self.codes * _per_row(self.scale, self.codes)

    def sum(self, x: Tensor, product: Product) -> Tensor:
        """fp32(acc) for an x of integers."""
        if self.piece == 0:
            return product(x.double(), self.codes.double()).float()
        if self.digits is not None:
            return self.digits.sum(x, lambda digit: self._pieces(digit, product))
        return self._pieces(x, product).float()

    def _pieces(self, x: Tensor, product: Product) -> Tensor:
        """acc, in float32 or in float64."""
        if self.piece >= self.codes.shape[1]:
            return product(x, self.codes)
        first, *others = map(product, *(torch.split(tensor, self.piece, 1) for tensor in (x, self.codes)))
        acc = first.double()
        for other in others:
            acc += other
        return acc


def _per_row(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (weight.ndim - 1))


class _IntegerProduct(torch.autograd.Function):
    """fp32(acc) * (scale_w * scale_a), with the gradients of the product of x and the dequantized weight.

    weight_hat: the dequantized weight where it takes part in a graph, None where the weight is frozen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_hat: Tensor | None,  # noqa: ARG004
        input_scale: Tensor,
        weight: WeightCodes,
        product: Product,
    ) -> Tensor:
        ctx.product, ctx.type = product, x.dtype
        if any(ctx.needs_input_grad):
            # Only the gradient of the weight reads the input; otherwise its memory is not held.
            kept = x if ctx.needs_input_grad[1] else x.new_empty(1).expand(x.shape)
            ctx.save_for_backward(kept, weight.codes, weight.scale)
        codes = (x.float() * input_scale.reciprocal()).round_()
        return weight.sum(codes, product).mul_(product.per_output(weight.scale * input_scale))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, codes, scale = ctx.saved_tensors
        weight_hat = WeightCodes(codes, scale, 0).dequantized()
        dx, dweight = ctx.product.backward(grad, x.float(), weight_hat, ctx.needs_input_grad[:2])
        return None if dx is None else dx.to(ctx.type), dweight, None, None, None


class _Cache:
    """The codes of the current weight. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        self.value: WeightCodes | None = None
        self.sources: tuple[Tensor, ...] = ()
        self.stamp: tuple[int, ...] = ()

    def __reduce__(self) -> tuple[type[_Cache], tuple[()]]:
        return _Cache, ()

    def get(self, sources: tuple[Tensor, ...], limit: int, make: Callable[[], WeightCodes]) -> WeightCodes:
        """`make()`, called again whenever one of the tensors it reads is another one, or was written to."""
        if any(source.is_inference() for source in sources):
            return make()  # such tensors do not count how often they are written to
        stamp = (limit, *(number for s in sources for number in (s._version, s.data_ptr())))
        same = len(sources) == len(self.sources) and all(a is b for a, b in zip(sources, self.sources, strict=True))
        if self.value is None or not same or stamp != self.stamp:
            self.value, self.sources, self.stamp = make(), sources, stamp
        return self.value


class IntegerLayer(nn.Module):
    """A layer with a weight on a grid. Subclasses mix it in front of the float layer that they replace.

    input_limit: the largest |q - zero_point| of the inputs that will come, 255 for 8 bits, more on twin grids.
    The codes of the weight are computed when the layer first runs, and again after the weight or its grid changed.
    Writing through `weight.data` escapes notice, as it does in autograd; write under `torch.no_grad()`. A state_dict
    with a weight but without its grid makes the layer uncalibrated.
    """

    weight: Tensor
    bias: Tensor | None
    weight_quantizer: Quantizer
    input_limit: int
    _cache: _Cache

    def _set_up(self, weight_quantizer: Quantizer | None) -> None:
        """Called at the end of a constructor; without a quantizer the weight gets 8 bits, one scale per output."""
        if weight_quantizer is None:
            weight_quantizer = Quantizer(8, axis=0, device=self.weight.device)
        self.weight_quantizer = weight_quantizer
        self.input_limit = 255
        self._cache = _Cache()

    def calibrate_weight(self, search: str = "mse") -> None:
        """Find the grid of the weight (`ttaq_kernels.search_scale`)."""
        self.weight_quantizer.calibrate(self.weight.detach(), search=search)

    def weight_codes(self, groups: int) -> WeightCodes:
        """The weight as integers; needs a calibrated weight."""
        quantizer = self.weight_quantizer
        sources = tuple(t for t in (self.weight, quantizer.scale, quantizer.zero_point) if t is not None)

        def make() -> WeightCodes:
            # In inference mode the codes could not be saved for a backward pass outside of it.
            with torch.inference_mode(False), torch.no_grad():
                return WeightCodes.of(self.weight, quantizer, self.input_limit, groups)

        return self._cache.get(sources, self.input_limit, make)

    def integer_forward(self, x: Tensor, input_scale: Tensor, product: Product) -> Tensor:
        """The expression of this file for `x` on the grid `k * input_scale`; needs a calibrated weight.

        The gradients of x, weight and bias are those of `product(x, weight_hat) + bias`, that of the weight through its
        rounding as in `fake_quantize`.
        """
        learns = self.weight.requires_grad and torch.is_grad_enabled()
        weight_hat = self.weight_quantizer(self.weight.float()) if learns else None
        with torch.autocast(x.device.type, enabled=False):
            y = self.exact_product(x, input_scale, self.weight_codes(product.groups), product, weight_hat)
            if self.bias is not None:
                y = y.add_(product.per_output(self.bias.float()))
            return y.to(x.dtype)

    @staticmethod
    def exact_product(
        x: Tensor, input_scale: Tensor, codes: WeightCodes, product: Product, weight_hat: Tensor | None = None
    ) -> Tensor:
        """fp32(acc) * (scale_w * scale_a) for `x` on the grid `k * input_scale`, with the gradients of the product."""
        y: Tensor = _IntegerProduct.apply(x, weight_hat, input_scale, codes, product)  # type: ignore[no-untyped-call]
        return y

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}weight" in state_dict and f"{prefix}weight_quantizer.scale" not in state_dict:
            self.weight_quantizer.set_grid(None, None)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Moved tensors keep their identity and may land on the old address.
        self._cache = _Cache()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self
