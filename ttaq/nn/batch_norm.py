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

    alpha: share of the batch, from 0 (source statistics) to 1 (batch statistics). None, the default, behaves as
        `torch.nn.BatchNorm2d`, bit for bit. A layer without running statistics can only take None or 1.
    prior_n: weight of the source in images; a batch of B images then has `alpha = B / (B + prior_n)` (Schneider et al.
        2020, arXiv 2006.16971). 0 is alpha 1.

    With either set, the running statistics are read and never written. A channel with a single value (one image of
    1x1) has variance 0 at alpha 1 and becomes `bias`. Gradients go through the share of the batch. An empty batch
    stays empty.

    Raises `InputError` if both are set or one is out of range; `KernelError` for alpha < 1 without running statistics.
    """

    alpha: float | None = None
    prior_n: int | None = None

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
            return super().forward(x)
        self._check_input_dim(x)
        return batch_norm(x, self.weight, self.bias, self.running_mean, self.running_var, alpha, self.eps)

    def extra_repr(self) -> str:
        own = f"alpha={self.alpha}, prior_n={self.prior_n}"
        return f"{super().extra_repr()}, {own}"  # type: ignore[no-untyped-call]
