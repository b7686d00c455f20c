"""Batch norm that takes its statistics from the source data, from the batch, or from between the two."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ttaq.errors import InputError
from ttaq_kernels import batch_norm, batch_norm_ema, batch_norm_moments

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

    keep_statistics: whether a forward leaves in `statistics` the mean and var above, float32 without gradients: with
        alpha = m, what running statistics of momentum m become when they take in the batch before they are used.
    renormalise: test-time batch renormalisation; see `start_renormalising`.

    With an alpha the running statistics are read and never written, and gradients go through the share of the batch;
    whoever wants them to move copies `statistics`. Of a layer that is used twice these are the later ones. A channel
    with a single value has variance 0 at alpha 1 and becomes `bias`; an empty batch stays empty.

    Raises `InputError` for alpha together with prior_n, one of them out of range, a mask or keep_statistics without
    either, or keep_statistics without running statistics; `KernelError` for alpha < 1 without running statistics and
    for a mask that does not fit the batch.
    """

    alpha: float | None = None
    prior_n: int | None = None
    sample_mask: Tensor | None = None
    keep_statistics: bool = False
    renormalise: bool = False
    statistics: tuple[Tensor, Tensor] | None = None
    moving_mean: Tensor
    moving_std: Tensor

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

    def start_renormalising(self) -> None:
        """From now on, values by moving statistics and gradients by those of the batch, whatever alpha is.

            y = ((x - mean) / std * r + d) * weight + bias        mean and std = sqrt(var + eps) of the batch
            r = std / moving_std,  d = (mean - moving_mean) / moving_std              constants to the gradient

        which is (x - moving_mean) / moving_std * weight + bias. The moving statistics are float32 buffers outside
        `state_dict()` that no forward writes; where `moving_std` is 0, as in the beginning, those of the batch stand in
        for them. Every forward leaves mean and std of the batch in `statistics`.

        Source: DELTA (Zhao et al., arXiv 2301.13018), after batch renormalisation (Ioffe, arXiv 1702.03275).
        """
        device = next((t.device for t in (*self.parameters(), *self.buffers())), None)
        for name in ("moving_mean", "moving_std"):
            self.register_buffer(name, torch.zeros(self.num_features, device=device), persistent=False)
        self.renormalise = True

    def forward(self, x: Tensor) -> Tensor:
        if self.renormalise:
            self._check_input_dim(x)
            return self._renormalise(x)
        alpha = self.batch_share(x.shape[0])
        if alpha is None:
            if self.sample_mask is not None or self.keep_statistics:
                name = "keep_statistics" if self.keep_statistics else "sample_mask"
                raise InputError(f"AdaptiveBatchNorm2d: {name} needs statistics of the batch; set alpha or prior_n")
            return super().forward(x)
        self._check_input_dim(x)
        affine, mask = (self.weight, self.bias), self.sample_mask
        if not self.keep_statistics:
            return batch_norm(x, *affine, self.running_mean, self.running_var, alpha, self.eps, sample_mask=mask)
        if self.running_mean is None or self.running_var is None:
            raise InputError("AdaptiveBatchNorm2d: keep_statistics needs running statistics, the layer has none")
        y, *new = batch_norm_ema(x, *affine, self.running_mean, self.running_var, alpha, self.eps, sample_mask=mask)
        self.statistics = new[0], new[1]
        return y

    def _renormalise(self, x: Tensor) -> Tensor:
        if self.sample_mask is not None:
            raise InputError("AdaptiveBatchNorm2d: renormalise takes all images, set sample_mask to None")
        mean, var = batch_norm_moments(x.detach())
        std = (var + self.eps).sqrt()
        started = self.moving_std > 0
        r = torch.where(started, std / self.moving_std, 1.0)
        d = torch.where(started, (mean - self.moving_mean) / self.moving_std, 0.0)
        self.statistics = mean, std
        # Folding r and d into weight and bias gives the same value and gradients as the formula.
        weight = r if self.weight is None else self.weight * r
        bias = d if self.weight is None or self.bias is None else torch.addcmul(self.bias, self.weight, d)
        return batch_norm(x, weight, bias, None, None, 1.0, self.eps)

    def extra_repr(self) -> str:
        own = f"alpha={self.alpha}, prior_n={self.prior_n}"
        return f"{super().extra_repr()}, {own}"  # type: ignore[no-untyped-call]
