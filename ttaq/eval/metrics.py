"""Error and calibration of predictions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

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
        self._labels: list[Tensor] = []
        self._part: list[Tensor] = []
        self.nonfinite = 0

    def add(self, logits: Tensor, labels: Tensor, part: Tensor | None = None) -> None:
        """Score `logits` [B, C] against `labels` int64 [B]; `part` int64 [B] says to which part each sample belongs."""
        if logits.ndim != 2 or labels.shape != logits.shape[:1]:
            raise InputError(
                f"Scores.add: logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}, "
                f"expected [B, C] and [B]"
            )
        logits, labels = logits.detach().float().cpu(), labels.cpu()
        finite = logits.isfinite().all(dim=1)
        confidence, predicted = logits.softmax(dim=1).max(dim=1)
        self._confidence.append(torch.where(finite, confidence, 1.0))
        self._correct.append((predicted == labels) & finite)
        self._labels.append(labels)
        self._part.append(torch.zeros_like(labels) if part is None else part)
        self.nonfinite += int((~finite).sum())

    def state_dict(self) -> dict[str, Any]:
        """Everything added so far."""
        parts = {name: torch.cat(batches) for name, batches in self._columns().items() if batches}
        return {**parts, "batches": [len(batch) for batch in self._correct], "nonfinite": self.nonfinite}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        for name, batches in self._columns().items():
            batches[:] = state[name].split(state["batches"]) if state["batches"] else []
        self.nonfinite = state["nonfinite"]

    def _columns(self) -> dict[str, list[Tensor]]:
        return {
            "confidence": self._confidence,
            "correct": self._correct,
            "labels": self._labels,
            "part": self._part,
        }

    @property
    def count(self) -> int:
        """Samples added so far."""
        return sum(correct.numel() for correct in self._correct)

    def error(self) -> float:
        """Error in percent over all samples added."""
        return error_percent(torch.cat(self._correct) if self._correct else torch.empty(0, dtype=torch.bool))

    def class_error(self) -> float:
        """Mean over the classes that occurred of the error in percent on the samples of that class."""
        return _mean(each["error"] for each in _grouped(torch.cat(self._labels), torch.cat(self._correct)).values())

    def parts(self) -> dict[int, dict[str, float]]:
        """Number of samples `n` and `error` in percent of every part that occurred."""
        return _grouped(torch.cat(self._part), torch.cat(self._correct))

    def trace(self, stretches: int = 50) -> dict[str, list[int]]:
        """How many samples, `n`, and how many wrong ones, in at most `stretches` runs of batches, in order."""
        size = max(1, math.ceil(len(self._correct) / stretches))
        runs = [torch.cat(self._correct[first : first + size]) for first in range(0, len(self._correct), size)]
        return {"n": [len(run) for run in runs], "wrong": [int((~run).sum()) for run in runs]}

    def ece(self, bins: int = 15) -> float:
        """Expected calibration error in percent over all samples added."""
        return expected_calibration_error(torch.cat(self._confidence), torch.cat(self._correct), bins)


def _grouped(group: Tensor, correct: Tensor) -> dict[int, dict[str, float]]:
    return {
        value: {"n": int((group == value).sum()), "error": error_percent(correct[group == value])}
        for value in sorted(set(group.tolist()))
    }


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)
