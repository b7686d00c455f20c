"""One domain of a stream through an adapter: how good, how fast, how large."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ttaq.errors import InputError
from ttaq.eval.domains import Domains
from ttaq.eval.memory import PeakMemory
from ttaq.eval.metrics import Scores
from ttaq.eval.plan import Recipe, recipe_name
from ttaq.tta import Adapter, SlidingWindow

__all__ = ["Progress", "measure_domain"]

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what is being done)."""


def measure_domain(
    adapter: Adapter | SlidingWindow,
    domains: Domains,
    index: int,
    device: torch.device,
    progress: Progress | None,
) -> dict[str, Any]:
    """Adapt over domain `index` and return what its row says about it: scores, latency, memory, counters.

    Latency is the time of `adapter(images)` per batch, prediction and update together, in ms; the images are already on
    the device, in channels_last, and a GPU is waited for before and after.

    Raises:
        InputError: the number of logits is not the number of classes of the data set.
    """
    name, plan = domains.names[index], domains.plan(index)
    scores, times = Scores(), list[float]()
    total = domains.batches_per_domain
    memory = PeakMemory(device)
    # Methods keep their own generators; the seed only settles what a user's own module might draw.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(domains.stream.number("adapter", name))
        for number, (images, labels, recipe) in enumerate(domains.batches(index), start=1):
            images = images.to(device, memory_format=torch.channels_last)
            _wait(device)
            begin = time.perf_counter()
            logits = adapter(images)
            _wait(device)
            times.append(1e3 * (time.perf_counter() - begin))
            if logits.ndim != 2 or logits.shape[1] != domains.num_classes:
                raise InputError(
                    f"run: the model gives logits of shape {tuple(logits.shape)}, expected [B, {domains.num_classes}] "
                    f"for {domains.stream.dataset}; choose the data set that the model was trained for"
                )
            scores.add(logits, labels, recipe)
            if progress is not None:
                progress(index * total + number, len(domains) * total, name)
    peak, source = memory.read()
    return {
        "domain": name,
        "index": index,
        "domains": len(domains),
        "n": scores.count,
        "error": scores.error(),
        "class_error": scores.class_error(),
        "ece": scores.ece(),
        "nonfinite": scores.nonfinite,
        "parts": _parts(plan.recipes, scores) if len(plan.recipes) > 1 else {},
        "trace": scores.trace(),
        "latency_ms": {
            "p50": float(np.percentile(times, 50)),
            "p95": float(np.percentile(times, 95)),
            "batches": len(times),
        },
        "memory": {"peak_mb": peak, "of": source},
        "counters": dict(adapter.counters),
    }


def _parts(recipes: tuple[Recipe, ...], scores: Scores) -> dict[str, dict[str, float]]:
    return {recipe_name(recipes[place]): part for place, part in scores.parts().items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
