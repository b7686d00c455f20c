"""Times of batches: what a step takes, and how much of it is learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["PERCENTILES", "Latency", "mean_latency"]

PERCENTILES = ("p50", "p95", "p99")


class Latency:
    """Times in ms, batch by batch."""

    def __init__(self) -> None:
        self._step: list[float] = []
        self._update: list[float] = []

    def add(self, step: float, update: float) -> None:
        """A batch that took `step`, of it `update` for learning."""
        self._step.append(step)
        self._update.append(update)

    def summary(self) -> dict[str, Any]:
        """Percentiles of the whole step, of its learning (`update`) and of the rest of it (`forward`)."""
        step, update = np.array(self._step), np.array(self._update)
        return {
            **_percentiles(step),
            "batches": len(step),
            "forward": _percentiles(step - update),
            "update": _percentiles(update),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The times so far."""
        return {
            "step": torch.tensor(self._step, dtype=torch.float64),
            "update": torch.tensor(self._update, dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        self._step, self._update = state["step"].tolist(), state["update"].tolist()


def _percentiles(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float]:
    return {name: float(np.percentile(values, int(name[1:]))) for name in PERCENTILES}


def mean_latency(latencies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means of what all of the summaries have; those of an earlier version have less."""
    found: dict[str, Any] = {
        name: float(np.mean([one[name] for one in latencies]))
        for name in PERCENTILES
        if all(name in one for one in latencies)
    }
    for part in ("forward", "update"):
        if all(part in one for one in latencies):
            found[part] = mean_latency([one[part] for one in latencies])
    return found
