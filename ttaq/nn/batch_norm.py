"""Batch norm that takes its statistics from the source data, from the batch, or from between the two."""

from __future__ import annotations

from torch import Tensor, nn

from ttaq.errors import InputError
from ttaq_kernels import batch_norm

__all__ = ["AdaptiveBatchNorm2d"]


class AdaptiveBatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with a share of batch statistics that does not depend on `train()` and `eval()`.

        mean = (1 - alpha) * running_mean + alpha * batch_mean      var the same, with the biased variance of the batch
        y    = (x - mean) / sqrt(var + eps) * weight + bias

    alpha: share of the batch, 0 (source statistics) to 1. None, the default, is torch's layer, bit for bit.
    prior_n: weight of the source in images instead: a batch of B images, selected or not, has
        `alpha = B / (B + prior_n)` (Schneider et al. 2020, arXiv 2006.16971).
    sample_mask: [B], bool or 0 and 1: the images that the statistics of the batch are taken from; None takes all. Every
        image is normalised; where none is selected, the source statistics are used. It belongs to one batch, and is no
        part of the state.

    With an alpha the running statistics are read and never written, and gradients go through the share of the batch.
    A channel with a single value has variance 0 at alpha 1 and becomes `bias`; an empty batch stays empty.

    Raises `InputError` for alpha together with prior_n, one of them out of range, or a mask without either;
    `KernelError` for alpha < 1 without running statistics and for a mask that does not fit the batch.
    """

    alpha: float | None = None
    prior_n: int | None = None
    sample_mask: Tensor | None = None

    @classmethod
    def from_float(cls, layer: nn.BatchNorm2d) -> AdaptiveBatchNorm2d:
        """The same layer as `layer`, whose parameters and buffers it shares."""
        new = cls(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats, device="meta")
        new._parameters = dict(layer._parameters)
        new._buffers = dict(layer._buffers)
        return new.train(layer.training)

    def batch_share(self, images: int) -> float | None:
        """The alpha that a batch of so many images gets; None means as in torch."""
        if self.prior_n is None:
            alpha = self.alpha
            if alpha is not None and not 0 <= alpha <= 1:
                raise InputError(f"AdaptiveBatchNorm2d: alpha is {alpha}, expected 0 to 1, or None to be torch's layer")
            return alpha
        if self.alpha is not None:
            raise InputError(
                f"AdaptiveBatchNorm2d: alpha is {self.alpha} and prior_n is {self.prior_n}, set one of them to None"
            )
        if self.prior_n < 0:
            raise InputError(f"AdaptiveBatchNorm2d: prior_n is {self.prior_n}, expected a number of images, 0 or more")
        return images / max(images + self.prior_n, 1)

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.batch_share(x.shape[0])
        if alpha is None:
            if self.sample_mask is not None:
                raise InputError("AdaptiveBatchNorm2d: sample_mask needs statistics of the batch; set alpha or prior_n")
            return super().forward(x)
        self._check_input_dim(x)
        return batch_norm(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            alpha,
            self.eps,
            sample_mask=self.sample_mask,
        )

    def extra_repr(self) -> str:
        own = f"alpha={self.alpha}, prior_n={self.prior_n}"
        return f"{super().extra_repr()}, {own}"  # type: ignore[no-untyped-call]
