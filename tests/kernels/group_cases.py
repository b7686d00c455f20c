"""Groups of samples, and group_affine written a second time in float64, sample by sample."""

import torch
from torch import Tensor


def parameters_of(groups: int, channels: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """weight around 1 and bias around 0, [G, C] each."""
    draw = torch.Generator().manual_seed(seed)
    return 1 + 0.3 * torch.randn(groups, channels, generator=draw), 0.3 * torch.randn(groups, channels, generator=draw)


def index_of(samples: int, groups: int, seed: int = 3) -> Tensor:
    """A random group for each sample."""
    return torch.randint(groups, (samples,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def group_affine(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Tensor | None, axis: int = 1) -> Tensor:
    """Differentiable."""
    out = []
    for n in range(len(x)):
        g = n * len(weight) // len(x) if groups is None else int(groups[n])
        sample = x[n].double().movedim(axis - (axis > 0), -1) * weight[g]
        sample = sample if bias is None else sample + bias[g]
        out.append(sample.movedim(-1, axis - (axis > 0)))
    return torch.stack(out) if out else x.double()
