"""The reconstruction loss in plain PyTorch: what the kernel is tested against, and the CPU path."""

import torch
from torch import Tensor

from ttaq_kernels._philox import Drop
from ttaq_kernels.reference._blocks import blocks, vector
from ttaq_kernels.reference.fake_quant import inside_, limits, wide_like
from ttaq_kernels.reference.philox import draw, unite_, where_dropped, where_kept

__all__ = ["loss_and_gradients"]


def _square(e: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """e^2, and share times its derivative in the place of `e`."""
    return e.square(), e.mul_(2 * share)


def loss_and_gradients(
    h: Tensor,
    target: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    relu: bool,
    keep_quantized: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, dloss / dh and dloss / dscale."""
    dh = torch.empty_like(h, dtype=torch.float32 if h.dtype is torch.float16 else h.dtype)
    share, drop = h.shape[1] / max(h.numel(), 1), Drop.of(keep_quantized)
    drawn = None if seed is None or scale is None else draw(seed, h.numel(), drop)
    shortcut = None if residual is None else vector(residual, dh)
    total, dscale = torch.zeros(()), torch.zeros(()) if scale is None else torch.zeros_like(scale)
    for into, part, goal, added, fields in blocks(vector(dh, dh), vector(h, dh), vector(target, dh), shortcut, drawn):
        a = part.float() if added is None else torch.add(part.float(), added)
        if relu:
            a = a.clamp(min=0) if added is None else a.clamp_(min=0)
        if scale is None or zero_point is None:
            value, g = _square(a - goal, share)
        else:
            low, high = limits(zero_point, qmin, qmax)
            # What is not kept has the gradients of a zero, and its x_hat is one.
            v = (a.clone() if fields is None else where_kept(fields, drop, a)).mul_(scale.reciprocal())
            u = v.round().nan_to_num_(nan=-torch.inf)
            code = u.clamp(low, high)
            x_hat = code * scale
            if fields is not None:
                unite_(x_hat, where_dropped(fields, drop, a))
            value, g = _square(x_hat.sub_(goal), share)
            dscale += code.sub_(inside_(v, v, u, low, high)).mul_(g).sum()
            inside_(g, g, u, low, high)
        total += value.sum()
        into.copy_(torch.ops.aten.threshold_backward.grad_input(g, a, 0, grad_input=wide_like(into)) if relu else g)
    return total * share if h.numel() else total.fill_(torch.nan), dh, dscale
