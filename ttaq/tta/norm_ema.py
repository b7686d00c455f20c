"""NormEMA: batch norm on running statistics that go on running at test time."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ttaq.errors import InputError
from ttaq.nn.adapt_norms import adaptive_batch_norms
from ttaq.nn.batch_norm import AdaptiveBatchNorm2d
from ttaq.tta.adapter import Adapter
from ttaq.tta.running import running_means_

__all__ = ["NormEMA"]


class NormEMA(Adapter):
    """Batch norm whose running statistics, beginning with the source's, take in every batch before it is answered.

    Two forwards per batch. In the first every `BatchNorm2d` normalises with the mean and biased variance of the batch,
    and its answer is dropped; the second, in eval mode, gives the logits::

        mean <- (1 - momentum) mean + momentum mean_batch
        var  <- (1 - momentum) var  + momentum var_batch
        y    =  (x - mean) / sqrt(var + eps) * weight + bias

    Args:
        momentum: share of the batch in [0, 1]; 0 is Source.

    The statistics of all layers stay what they were after a batch that makes one of them NaN or infinite. Errors:
    `InputError` for a momentum out of range, a model without batch norm, with batch norm of another type than
    BatchNorm2d or without running statistics.

    State: the running statistics, counters. Weights and biases never change.

    Differs from the paper: in the literature the variance that is taken in is torch's unbiased one, which is larger by
    M / (M - 1) for M values per channel, and does not exist for M = 1.

    Source: Nado et al., arXiv 2006.10963, averaged over the stream; the form with two forwards is the "BN-EMA" of a
    comparison study, arXiv 2405.14977.
    """

    method: ClassVar[str] = "norm_ema"

    @torch.inference_mode(False)
    def __init__(self, model: nn.Module, *, momentum: float = 0.1, check_finite: bool = True) -> None:
        if not isinstance(momentum, (int, float)) or not 0 <= momentum <= 1:
            raise InputError(f"NormEMA: momentum is {momentum!r}, expected a number in [0, 1], the share of the batch")
        super().__init__(model, options={"momentum": momentum}, check_finite=check_finite)
        self._momentum = float(momentum)
        layers = adaptive_batch_norms(self.model, "NormEMA")
        if not layers:
            raise InputError("NormEMA: the model has no batch norm, expected some; use 'tent' for layer and group norm")
        names: list[str] = []
        for name, layer in layers.items():
            if layer.running_mean is None:
                raise InputError(f"NormEMA: {name} has no running statistics to go on with; use 'norm'")
            buffers = dict(layer.named_buffers(prefix=name, recurse=False))
            names += [key for key in buffers if key.endswith(("running_mean", "running_var"))]
        self._layers: list[AdaptiveBatchNorm2d] = list(layers.values())
        self.adapt(buffers=names)

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """Logits with the running statistics after this batch."""
        taken_in = self._with_batch(x)
        torch._foreach_copy_([buffer for _, buffer in self.buffers_adapted()], list(taken_in.values()))
        logits: Tensor = self.model(x)
        return logits

    def answer(self, x: Tensor) -> Tensor:
        """The logits of `step`, with statistics that are dropped."""
        logits: Tensor = functional_call(self.model, self._with_batch(x), (x,))
        return logits

    def _with_batch(self, x: Tensor) -> dict[str, Tensor]:
        """The first forward: by name, what the running statistics become with this batch."""
        for layer in self._layers:
            layer.alpha, layer.keep_statistics = 1.0, True
        try:
            self.model(x)
            # A layer that this forward does not use has nothing new.
            pairs = [layer.statistics or (layer.running_mean, layer.running_var) for layer in self._layers]
        finally:
            for layer in self._layers:
                layer.alpha, layer.keep_statistics, layer.statistics = None, False, None
        running = {name: buffer.clone() for name, buffer in self.buffers_adapted()}
        batch = [vector for pair in pairs for vector in pair if vector is not None]
        running_means_(list(running.values()), batch, 1 - self._momentum)
        return running
