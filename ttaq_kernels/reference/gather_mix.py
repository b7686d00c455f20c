"""`gather_mix` in plain PyTorch: what the kernel is tested against, and the CPU path."""

import torch
from torch import Tensor

from ttaq_kernels._philox import SMALLEST_BLOCK, Drop
from ttaq_kernels.reference._blocks import block_size
from ttaq_kernels.reference.philox import draw, unite_, where_dropped, where_kept

__all__ = ["gather_mix"]


def gather_mix(
    quantized: Tensor,
    floating: Tensor,
    index: Tensor,
    keep_quantized: float,
    seed: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
) -> Tensor:
    """Rows of `quantized` with elements of `floating` among them."""
    per_row = floating[:1].numel()
    # The rows as they lie in memory, whatever the order of their dimensions.
    rows = [cache.as_strided((len(cache), per_row), (per_row, 1)) for cache in (quantized, floating)]
    drop = Drop.of(keep_quantized)
    padded = -(-per_row // SMALLEST_BLOCK) * SMALLEST_BLOCK
    drawn = draw(seed, len(index) * padded, drop).view(len(index), padded)[:, :per_row]
    out = floating.new_empty(len(index), per_row)
    together = max(1, block_size() // max(1, per_row))
    for into, part, fields in zip(*(torch.split(tensor, together) for tensor in (out, index, drawn)), strict=True):
        chosen, rest = (cache.index_select(0, part).float() for cache in rows)
        if scale is not None and zero_point is not None:
            chosen.sub_(zero_point.to(torch.float32)).mul_(scale)
        where_kept(fields, drop, chosen, out=chosen)
        into.copy_(unite_(chosen, where_dropped(fields, drop, rest, out=rest)))
    return out.as_strided((len(index), *floating.shape[1:]), (per_row, *floating.stride()[1:]))
