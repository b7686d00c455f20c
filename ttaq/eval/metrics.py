"""Error and calibration of predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from ttaq.errors import InputError

__all__ = ["Scores", "error_percent", "expected_calibration_error"]


def error_percent(correct: Tensor) -> float:
    """`100 (1 - mean(correct))`, in percent; `correct` is bool [N] with N > 0."""
    if correct.numel() == 0:
        raise InputError("error_percent: got 0 predictions, expected at least 1")
    return 100.0 * (1.0 - int(correct.sum()) / correct.numel())


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Expected calibration error in percent: `100 sum_b n_b / N |accuracy_b - confidence_b|`.

    Bins are equally wide: bin b holds `b / bins < confidence <= (b + 1) / bins`, and the first one holds 0 too.

    Args:
        confidence: largest class probability per sample, [N] in [0, 1].
        correct: whether the prediction is right, bool [N].
        bins: number of bins.

    Source: Naeini et al. 2015; Guo et al. 2017 (arXiv 1706.04599), equation 3.
    """
    if confidence.ndim != 1 or confidence.shape != correct.shape or confidence.numel() == 0:
        raise InputError(
            f"expected_calibration_error: confidence has shape {tuple(confidence.shape)} and correct "
            f"{tuple(correct.shape)}, expected the same [N] with N > 0"
        )
    confidence = confidence.double()
    bin_of = (torch.ceil(confidence * bins) - 1).clamp(0, bins - 1).long()
    gaps = torch.zeros(bins, dtype=torch.float64).index_add(0, bin_of, correct.double() - confidence)
    return 100.0 * float(gaps.abs().sum()) / confidence.numel()


class Scores:
    """Collects predictions batch by batch; a sample whose logits are not all finite is wrong with confidence 1."""

    def __init__(self) -> None:
        self._confidence: list[Tensor] = []
        self._correct: list[Tensor] = []
        self.nonfinite = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Score `logits` [B, C] against `labels` int64 [B]."""
        if logits.ndim != 2 or labels.shape != logits.shape[:1]:
            raise InputError(
                f"Scores.add: logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}, "
                f"expected [B, C] and [B]"
            )
        logits = logits.detach().float().cpu()
        finite = logits.isfinite().all(dim=1)
        confidence, predicted = logits.softmax(dim=1).max(dim=1)
        self._confidence.append(torch.where(finite, confidence, 1.0))
        self._correct.append((predicted == labels.cpu()) & finite)
        self.nonfinite += int((~finite).sum())

    @property
    def count(self) -> int:
        """Samples added so far."""
        return sum(correct.numel() for correct in self._correct)

    def error(self) -> float:
        """Error in percent over all samples added."""
        return error_percent(torch.cat(self._correct) if self._correct else torch.empty(0, dtype=torch.bool))

    def ece(self, bins: int = 15) -> float:
        """Expected calibration error in percent over all samples added."""
        return expected_calibration_error(torch.cat(self._confidence), torch.cat(self._correct), bins)
