"""Batch norm, residual, activation and re-quantization in plain PyTorch: the CPU path, and the oracle of the kernels.

Same operations in the same order as the kernels, hence the same bits from the same statistics. Each piece of the batch
goes through all of them while it is in the cache; comparisons are made by torch's vectorised gradients of activations.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ttaq_kernels.reference.batch_norm import batch_norm_backward, batch_statistics, normalise
from ttaq_kernels.reference.moments import pieces
from ttaq_kernels.reference.pack import to_kernel_order

__all__ = ["PLAIN", "Epilogue", "norm_act_quant_backward", "norm_act_quant_forward", "stored_shift"]


class Epilogue(NamedTuple):
    """What happens to a normalised tensor: + residual, the activation, the grid; None leaves a step out."""

    residual: Tensor | None = None
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    qmin: int = 0
    qmax: int = 0
    act: str = "identity"

    @property
    def clips(self) -> bool:
        """Whether there are elements that no gradient passes."""
        return self.scale is not None or self.act != "identity"


PLAIN = Epilogue()


def stored_shift(qmax: int) -> int:
    """What is subtracted from codes to store them as int8."""
    return 128 if qmax > 127 else 0


def _activate(z: Tensor, act: str) -> Tensor:
    """In place; NaN stays NaN."""
    return z.clamp_(0, 6) if act == "relu6" else z.relu_() if act == "relu" else z


def _unclamped(a: Tensor, scale: Tensor, zero_point: Tensor, nan: float) -> Tensor:
    """rint(a / scale) + zero_point in place, NaN replaced."""
    return a.mul_(scale.reciprocal()).round_().add_(zero_point).nan_to_num_(nan=nan)


def norm_act_quant_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    source_mean: Tensor | None,
    source_var: Tensor | None,
    sample_mask: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    act: str,
    output: str,
    alpha: float,
    eps: float,
    _statistics_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics, `y`, and for codes the tensor that carries their gradient; for values an empty one."""
    statistics = batch_statistics(x, source_mean, source_var, sample_mask, alpha, eps)
    y = torch.empty_like(x, dtype=x.dtype if output == "values" else torch.int8)
    in_place = y.dtype == statistics.dtype
    for x_piece, residual_piece, y_piece in pieces(x, residual, y):
        z = normalise(x_piece, statistics, weight, bias, y_piece if in_place else None)
        z = _activate(z if residual_piece is None else z.add_(residual_piece), act)
        if scale is not None and zero_point is not None:
            z = _unclamped(z, scale, zero_point, float(qmin)).clamp_(qmin, qmax)
            z = z.sub_(zero_point).mul_(scale) if output == "values" else z.sub_(stored_shift(qmax))
        if not in_place:
            y_piece.copy_(z)
    if output == "packed":
        y = to_kernel_order(y.movedim(1, -1).flatten(0, -2), 4)
    return statistics, y, gradient_carrier(x) if output != "values" else x.new_empty(0)


def gradient_carrier(x: Tensor) -> Tensor:
    """Zeros with the shape and type of `x` in the memory of one element."""
    return x.new_zeros((1,) * x.ndim).expand(x.shape)


def _passing(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor, after: Epilogue
) -> Tensor:
    """`grad` where activation and grid let it through, else 0."""
    passed = torch.empty_like(x, dtype=grad.dtype)
    for grad_piece, x_piece, residual_piece, passed_piece in pieces(grad, x, after.residual, passed):
        z = normalise(x_piece, statistics, weight, bias)
        z = z if residual_piece is None else z.add_(residual_piece)
        g = grad_piece.to(z.dtype)
        if after.act == "relu":
            g = torch.ops.aten.threshold_backward(g, z, 0)
        elif after.act == "relu6":
            # At NaN torch gives 0 or the gradient, depending on where in the tensor it is.
            g = torch.ops.aten.hardtanh_backward(g, z.nan_to_num(nan=-torch.inf), 0, 6)
        if after.scale is not None and after.zero_point is not None:
            u = _unclamped(_activate(z, after.act), after.scale, after.zero_point, -torch.inf)
            g = torch.ops.aten.hardtanh_backward(g, u, after.qmin - 0.5, after.qmax + 0.5)
        passed_piece.copy_(g)
    return passed


def norm_act_quant_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    sample_mask: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    act: str,
    alpha: float,
    need_x: bool,
    need_affine: bool,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dx`, [2, C]: dweight and dbias, and dresidual; what is not needed comes back empty."""
    after = Epilogue(residual, scale, zero_point, qmin, qmax, act)
    passed = _passing(grad, x, weight, bias, statistics, after) if after.clips else grad
    dx, affine = batch_norm_backward(passed, x, weight, statistics, sample_mask, alpha, need_x, need_affine)
    if not need_residual:
        return dx, affine, x.new_empty(0)
    return dx, affine, passed if after.clips else torch.empty_like(x).copy_(grad)
