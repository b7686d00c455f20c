"""The small run that several tests make, and what of its rows must be repeatable."""

from __future__ import annotations

import torch
from torch import nn

from ttaq.eval import Stream
from ttaq.models import build

STREAM = Stream("digits", corruptions=("gaussian_noise", "fog", "contrast"), images=40, batch_size=16)
OPTIONS = {"lr": 0.01}


def small_model() -> nn.Module:
    """Four channels wide and untrained: what it predicts does not matter, only that it is the same again."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build("cifar_resnet8", width=4).eval()


def repeatable(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Rows without times and memory."""
    return [{key: value for key, value in row.items() if key not in ("latency_ms", "memory")} for row in rows]
