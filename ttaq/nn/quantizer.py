"""A quantization grid that a model carries: unset until it is calibrated, saved with the model afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from ttaq.errors import InputError
from ttaq_kernels import fake_quantize, search_scale

__all__ = ["Quantizer"]


class Quantizer(nn.Module):
    """Rounds a tensor to `(q - zero_point) * scale`, q = qmin, ..., qmax (`ttaq_kernels.fake_quantize`).

    bits: 2 to 8. symmetric: codes -2^(bits-1) to 2^(bits-1) - 1 and zero point 0, else 0 to 2^bits - 1.
    axis: the dimension with a scale per index, None for one scale. p: the grid with the smallest mean |x - x_hat|^p is
    the one that `calibrate` finds; a larger one clips less.

    State: `scale` (fp32) and `zero_point` (int32), shape [1] or [x.shape[axis]]; None and absent from the state_dict
    until `calibrate`, `set_grid` or `load_state_dict` sets them. Until then the module returns its input. The scale
    stays fp32 when the model changes its type.
    """

    scale: Tensor | None
    zero_point: Tensor | None
    _anchor: Tensor

    def __init__(
        self,
        bits: int,
        symmetric: bool = False,
        axis: int | None = None,
        device: torch.device | str | None = None,
        p: float = 2.4,
    ) -> None:
        super().__init__()
        if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
            raise InputError(f"Quantizer: bits is {bits!r}, expected 2 to 8")
        self.bits, self.symmetric, self.axis, self.p = bits, symmetric, axis, p
        self.register_buffer("scale", None)
        self.register_buffer("zero_point", None)
        # Tells where the model is while there is no other tensor that could.
        self.register_buffer("_anchor", torch.empty(0, device=device), persistent=False)

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        return self.qmin + (1 << self.bits) - 1

    @property
    def largest_code(self) -> int:
        """The largest |q - zero_point| that any zero point allows."""
        return max(self.qmax, -self.qmin)

    def set_grid(self, scale: Tensor | None, zero_point: Tensor | None) -> None:
        """Use this grid from now on; None and None make the quantizer uncalibrated."""
        device = self._anchor.device
        self.scale = None if scale is None else scale.detach().to(device, torch.float32, copy=True)
        self.zero_point = None if zero_point is None else zero_point.detach().to(device, torch.int32, copy=True)

    def calibrate(self, x: Tensor, *, search: str = "mse", candidates: int = 100) -> None:
        """Set the grid that fits `x` best (`ttaq_kernels.search_scale`)."""
        # Tensors made in inference mode could never take part in a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            grid = search_scale(
                x, self.bits, symmetric=self.symmetric, axis=self.axis, p=self.p, candidates=candidates, search=search
            )
            self.set_grid(*grid)

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None or self.zero_point is None:
            return x
        return fake_quantize(x, self.scale, self.zero_point, self.qmin, self.qmax, self.axis)

    def extra_repr(self) -> str:
        state = "" if self.scale is not None else ", uncalibrated"
        return f"bits={self.bits}, symmetric={self.symmetric}, axis={self.axis}{state}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scale is not None and self.scale is not None and self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        found = [state_dict[prefix + name] for name in ("scale", "zero_point") if prefix + name in state_dict]
        if found:
            # Buffers for torch to fill; where one of the two is missing, it reports that one.
            shape, device = torch.as_tensor(found[0]).shape, self._anchor.device
            self.scale = torch.ones(shape, device=device)
            self.zero_point = torch.zeros(shape, dtype=torch.int32, device=device)
        super()._load_from_state_dict(state_dict, prefix, *rest)
