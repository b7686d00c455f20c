"""The losses written a second time, in float64 and differentiable, and logits that try their edges."""

import torch
from torch import Tensor


def _softmax(logits: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor]:
    """p and ln p."""
    z = logits.double() if offset is None else logits.double() + offset
    log_p = z.log_softmax(1)
    return log_p.exp(), log_p


def _weighted(loss: Tensor, weights: Tensor | None) -> Tensor:
    return loss if weights is None else weights.double() * loss


def entropy(logits: Tensor, weights: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    """-sum p ln p; p ln p is 0 at p = 0."""
    p, log_p = _softmax(logits, offset)
    return _weighted(-(p * log_p.masked_fill(p == 0, 0.0)).sum(1), weights)


def likelihood_ratio(logits: Tensor, weights: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    """-sum q ln(q / (1 - q) + 1e-5), q = min(p, 0.99)"""
    q = _softmax(logits, offset)[0].clamp(max=0.99)
    return _weighted(-(q * (q / (1 - q) + 1e-5).log()).sum(1), weights)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None = None,
    offset: Tensor | None = None,
    symmetric: bool = False,
) -> Tensor:
    """-sum r ln p, or the mean of it and of -sum p ln r."""
    (p, log_p), (r, log_r) = _softmax(logits, offset), _softmax(target, None)
    loss = -(r * log_p.masked_fill(r == 0, 0.0)).sum(1)
    if symmetric:
        loss = 0.5 * loss - 0.5 * (p * log_r.masked_fill(p == 0, 0.0)).sum(1)
    return _weighted(loss, weights)


def logits(rows: int, classes: int, spread: float = 3.0, seed: int = 0) -> Tensor:
    """Rows from nearly uniform to nearly certain, around different offsets."""
    draw = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, classes, generator=draw) * torch.linspace(0.1, spread, rows).unsqueeze(1)
    return z + torch.linspace(-20, 20, rows).unsqueeze(1)


def weights_and_offset(rows: int, classes: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Weights from 0 to 2 with a 0 among them, and the logarithms of a prior."""
    draw = torch.Generator().manual_seed(seed)
    weights = 2 * torch.rand(rows, generator=draw)
    weights[rows // 2 : rows // 2 + 1] = 0
    return weights, torch.rand(classes, generator=draw).add_(0.01).log_()
