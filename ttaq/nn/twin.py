"""Twin uniform grids: two steps in one tensor, for what a softmax or a GELU makes (PTQ4ViT, arXiv 2111.12293).

    fine    k * scale                  k = fine_min, ..., fine_max        for x below `edge`
    coarse  k * scale * ratio          k = coarse_min, ..., coarse_max    from there; ratio = 2^m, m = 0, ..., 10

    softmax  fine 0 to 2^(b-1) - 1 (values near 0), coarse 1 to 2^(b-1) (up to 1), scale * ratio = 2^-(b-1);
             `edge` lies midway between the last fine value and the next coarse one: each value goes to the nearer grid
    GELU     fine -2^(b-1) to 0 (the short negative side), coarse 0 to 2^(b-1) - 1; `edge` is 0

Either way 2^b values, all of them multiples of `scale`: readers see integers times one scale, wider than b bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ttaq.errors import InputError
from ttaq.nn.quantizer import Quantizer
from ttaq_kernels import fake_quantize

__all__ = ["TwinKind", "TwinQuantizer"]

TwinKind = Literal["softmax", "gelu"]
_MOST_DOUBLINGS = 10  # 2^10 times the 8-bit step of a softmax is 2^-17, far below what its sums notice
_PER_OCTAVE, _OCTAVES = 16, 4  # steps that are tried for the fine side of a GELU, from the one that covers it down


class TwinQuantizer(Quantizer):
    """Rounds a tensor to the union of a fine and a coarse grid with zero point 0.

    bits: 2 to 8, of which one says which grid. kind: what makes the tensor. State: `scale` (the fine one, fp32 [1]),
    `zero_point` (0) and `ratio` (int32 [1]), as in `Quantizer`.

    `forward(x)`: two calls of `fake_quantize` and a choice. Gradients: straight-through between the ends of the
    two grids, 0 outside; of `scale`, if it requires one, those of the grid that was chosen.
    `calibrate(x)`: the `ratio`, and for a GELU the `scale`, with the smallest mean |x - x_hat|^p. `search="minmax"`
    covers the range of a GELU; a softmax has no range to cover, its ratio is always searched.

    Values are exact in fp32. In bf16 and fp16 readers recover the codes of a softmax, whose steps are powers of two;
    those of a GELU only up to the rounding of the type.
    """

    ratio: Tensor | None

    def __init__(self, bits: int, kind: TwinKind, device: torch.device | str | None = None) -> None:
        super().__init__(bits, device=device)
        if kind not in ("softmax", "gelu"):
            raise InputError(f"TwinQuantizer: kind is {kind!r}, expected 'softmax' or 'gelu'")
        self.kind = kind
        self.register_buffer("ratio", None)

    @property
    def fine(self) -> tuple[int, int]:
        """Smallest and largest code of the fine grid."""
        half = 1 << (self.bits - 1)
        return (0, half - 1) if self.kind == "softmax" else (-half, 0)

    @property
    def coarse(self) -> tuple[int, int]:
        """Smallest and largest code of the coarse grid. That of a softmax could start at 1: its 0 is never nearer."""
        half = 1 << (self.bits - 1)
        return (0, half) if self.kind == "softmax" else (0, half - 1)

    @property
    def largest_code(self) -> int:
        return 1 << (self.bits - 1 + _MOST_DOUBLINGS)

    def set_grid(self, scale: Tensor | None, zero_point: Tensor | None, ratio: Tensor | None = None) -> None:
        """Use this grid from now on; without `ratio` it stays as it is, and None for all makes it uncalibrated."""
        super().set_grid(scale, zero_point)
        if scale is None:
            self.ratio = None
        elif ratio is not None:
            self.ratio = ratio.detach().to(self._anchor.device, torch.int32, copy=True)

    def calibrate(self, x: Tensor, *, search: str = "mse", candidates: int = 100) -> None:  # noqa: ARG002
        if search not in ("mse", "minmax"):
            raise InputError(f"TwinQuantizer: search is {search!r}, expected 'mse' or 'minmax'")
        # Tensors made in inference mode could never take part in a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            values = x.detach().flatten().float()
            if self.kind == "softmax":
                found = self._search_softmax(values)
            else:
                found = self._search_gelu(values) if search == "mse" else self._cover(values)
            scale, doublings = found
            device = values.device
            self.set_grid(
                torch.tensor([scale], device=device),
                torch.zeros(1, dtype=torch.int32, device=device),
                torch.tensor([1 << doublings], dtype=torch.int32, device=device),
            )

    def _search_softmax(self, x: Tensor) -> tuple[float, int]:
        choices = [(2.0 ** (1 - self.bits - m), m) for m in range(_MOST_DOUBLINGS + 1)]
        zero = torch.zeros(1, dtype=torch.int32, device=x.device)
        errors = []
        for scale, doublings in choices:
            x_hat = self.round(x, torch.tensor([scale], device=x.device), zero, 1 << doublings)
            errors.append((x_hat - x).abs_().pow_(self.p).sum())
        return choices[int(torch.stack(errors).argmin())]

    def _search_gelu(self, x: Tensor) -> tuple[float, int]:
        """The sides do not see each other, so each is scored once for every step that a pair could give it."""
        largest = self._widest(x)
        sides = x[x < 0], x[x >= 0]
        lattice = [largest * 2 ** (-j / _PER_OCTAVE) for j in range(_PER_OCTAVE * _OCTAVES)]
        fine = self._errors(sides[0], lattice, self.fine)
        above = [largest * 2 ** (j / _PER_OCTAVE) for j in range(_PER_OCTAVE * _MOST_DOUBLINGS, 0, -1)]
        coarse = self._errors(sides[1], above + lattice, self.coarse)
        best, found = math.inf, (largest, 0)
        for m in range(_MOST_DOUBLINGS + 1):
            first = len(above) - m * _PER_OCTAVE
            total = fine + coarse[first : first + len(lattice)]
            least, j = total.min(0)
            if float(least) < best:
                best, found = float(least), (lattice[int(j)], m)
        return found

    def _errors(self, x: Tensor, scales: list[float], codes: tuple[int, int]) -> Tensor:
        zero = torch.zeros(1, dtype=torch.int32, device=x.device)
        steps = torch.tensor(scales, device=x.device)[:, None]
        return torch.stack(
            [(fake_quantize(x, step, zero, *codes) - x).abs_().pow_(self.p).double().sum() for step in steps]
        )

    def _widest(self, x: Tensor) -> float:
        """The fine step that covers the negative values, or where there are hardly any, the finest that can be."""
        lo, hi = (float(end) for end in x.aminmax()) if x.numel() else (0.0, 0.0)
        needed = max(hi, 0.0) / max(1, self.coarse[1]) / (1 << _MOST_DOUBLINGS)
        return max(-lo / -self.fine[0], needed, 1e-8)

    def _cover(self, x: Tensor) -> tuple[float, int]:
        scale, top = self._widest(x), max(float(x.max()) if x.numel() else 0.0, 0.0) / max(1, self.coarse[1])
        doublings = min(_MOST_DOUBLINGS, max(0, math.ceil(math.log2(max(top, scale) / scale))))
        return max(scale, top / (1 << doublings)), doublings

    def round(
        self,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        ratio: Tensor | int,
        keep_quantized: float = 1.0,
        seed: Tensor | None = None,
    ) -> Tensor:
        """`x` on the grids of `scale`; with the drop of `fake_quantize`."""
        top = self.fine[1]
        following = (top // ratio + 1) * ratio if self.kind == "softmax" else 0  # the coarse value after the last fine
        with torch.no_grad():
            edge = scale * (0.5 * (top + following))
            low = x < edge
        # Both calls draw the same elements, since an element is drawn by its place.
        drop = {"keep_quantized": keep_quantized, "seed": seed}
        fine = fake_quantize(x, scale, zero_point, *self.fine, **drop)  # type: ignore[arg-type]
        coarse = fake_quantize(x, scale * ratio, zero_point, *self.coarse, **drop)  # type: ignore[arg-type]
        x_hat = torch.where(low, fine, coarse)
        if self.kind == "softmax" and x.requires_grad:
            # Between the grids the fine one is past its end: this adds 0, with the gradient that it lacks.
            between = low & (x >= scale * (top + 0.5)) & (fine != x)
            x_hat = x_hat + torch.where(between, x - x.detach(), 0.0)
        return x_hat

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None or self.zero_point is None or self.ratio is None:
            return x
        return self.round(x, self.scale, self.zero_point, self.ratio)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, kind={self.kind}{'' if self.scale is not None else ', uncalibrated'}"

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        if any(f"{prefix}{name}" in state_dict for name in ("scale", "ratio")):
            self.ratio = torch.ones(1, dtype=torch.int32, device=self._anchor.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)
