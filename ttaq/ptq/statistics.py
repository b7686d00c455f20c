"""The statistics of the batch norms of a model: which are used, and how they are taken anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ttaq.nn import AdaptiveBatchNorm2d
from ttaq_kernels import batch_norm_moments

__all__ = ["batch_statistics", "estimate_statistics"]


def _norms(*models: nn.Module) -> list[AdaptiveBatchNorm2d]:
    return [module for model in models for module in model.modules() if isinstance(module, AdaptiveBatchNorm2d)]


@contextmanager
def batch_statistics(*models: nn.Module) -> Iterator[None]:
    """Normalise with the statistics of each batch meanwhile."""
    norms = _norms(*models)
    before = [(norm.alpha, norm.prior_n) for norm in norms]
    for norm in norms:
        norm.alpha, norm.prior_n = 1.0, None
    try:
        yield
    finally:
        for norm, (alpha, prior_n) in zip(norms, before, strict=True):
            norm.alpha, norm.prior_n = alpha, prior_n


def estimate_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running statistics of every batch norm to those of all `batches` together, in place.

    Mean and variance of a layer are those of its inputs while every layer normalises with the statistics of its batch.
    The variance is the unbiased one, as torch keeps it. Layers without running statistics stay as they are.
    """
    norms = [norm for norm in _norms(model) if norm.running_mean is not None]
    sums: dict[AdaptiveBatchNorm2d, tuple[int, Tensor, Tensor]] = {}

    def add(norm: AdaptiveBatchNorm2d) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            mean, var = batch_norm_moments(args[0])
            values = args[0].numel() // args[0].shape[1]
            count, of_means, of_squares = sums.get(norm, (0, mean.double() * 0, mean.double() * 0))
            mean, var = mean.double(), var.double()
            sums[norm] = count + values, of_means + values * mean, of_squares + values * (var + mean * mean)

        return hook

    with torch.no_grad(), batch_statistics(model), ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_pre_hook(add(norm)).remove)
        for batch in batches:
            model(batch)
    for norm, (count, of_means, of_squares) in sums.items():
        if norm.running_mean is not None and norm.running_var is not None:
            mean = of_means / count
            var = (of_squares / count - mean * mean).clamp_(min=0) * (count / max(1, count - 1))
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
