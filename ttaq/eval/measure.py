"""One domain of a stream through an adapter: how good, how fast, how large."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ttaq.errors import InputError
from ttaq.eval.domains import Domains
from ttaq.eval.latency import Latency
from ttaq.eval.memory import PeakMemory
from ttaq.eval.memory_parts import MemoryParts, StepMemory, held
from ttaq.eval.metrics import Scores
from ttaq.eval.plan import Recipe, recipe_name
from ttaq.tta import Adapter, Guarded, Shadow, SlidingWindow
from ttaq.tta.stopwatch import Stopwatch

__all__ = ["Measurement", "Pauses", "Progress", "Stepper", "adapter_of", "guarded_of", "measure_domain"]

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what is being done)."""

Stepper = Adapter | Guarded | SlidingWindow | Shadow
"""What takes the batches of a stream."""


@dataclass(frozen=True)
class Pauses:
    """every: batches after which `save` is called with a measurement that can be continued."""

    every: int
    save: Callable[[Measurement], None]


class Measurement:
    """What is known of a domain so far, by batches."""

    def __init__(self, stepper: Stepper, device: torch.device) -> None:
        self.batches = 0
        self._scores, self._latency, self._parts = Scores(), Latency(), MemoryParts()
        self._shadow = Scores() if isinstance(stepper, Shadow) else None
        self._memory = PeakMemory(device)
        self._device = device

    def add(
        self, logits: Tensor, adapted: Tensor | None, labels: Tensor, recipe: Tensor, times: tuple[float, float]
    ) -> None:
        """A batch: its logits, those of an adapter in shadow, and (step, update) in ms."""
        self._scores.add(logits, labels, recipe)
        if self._shadow is not None and adapted is not None:
            self._shadow.add(adapted, labels)
        self._latency.add(*times)
        self.batches += 1

    def watches(self, adapter: Adapter, window: int) -> bool:
        """Whether the next step has something to say of the memory: until one needs as much as any will."""
        return self._scores.count < adapter.horizon + window - 1

    def add_memory(self, parts: MemoryParts) -> None:
        """What a step needed."""
        self._parts = self._parts.combine(parts, max)

    def row(self, recipes: tuple[Recipe, ...]) -> dict[str, Any]:
        """What a row says of it."""
        scores = self._scores
        peak, source = self._memory.read()
        shadow = {} if self._shadow is None else {"shadow_error": self._shadow.error()}
        return {
            "n": scores.count,
            "error": scores.error(),
            "class_error": scores.class_error(),
            "ece": scores.ece(),
            **shadow,
            "nonfinite": scores.nonfinite,
            "parts": {recipe_name(recipes[place]): part for place, part in scores.parts().items()}
            if len(recipes) > 1
            else {},
            "trace": scores.trace(),
            "latency_ms": self._latency.summary(),
            "memory": {"peak_mb": peak, "of": source, **self._parts.row()},
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything so far, with the state of torch's own random numbers, for a model that draws some."""
        on_gpu = self._device.type == "cuda"
        return {
            "batches": self.batches,
            "scores": self._scores.state_dict(),
            "shadow": None if self._shadow is None else self._shadow.state_dict(),
            "latency": self._latency.state_dict(),
            "peak": self._memory.read()[0],
            "parts": self._parts.row(),
            "random": torch.get_rng_state(),
            "random_gpu": torch.cuda.get_rng_state(self._device) if on_gpu else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.batches = state["batches"]
        self._scores.load_state_dict(state["scores"])
        if self._shadow is not None:
            self._shadow.load_state_dict(state["shadow"])
        self._latency.load_state_dict(state["latency"])
        self._memory.include(state["peak"])
        self._parts = MemoryParts.of_row(state["parts"])
        torch.set_rng_state(state["random"])
        if state["random_gpu"] is not None and self._device.type == "cuda":
            torch.cuda.set_rng_state(state["random_gpu"], self._device)


def measure_domain(
    stepper: Stepper,
    domains: Domains,
    index: int,
    device: torch.device,
    progress: Progress | None,
    saved: Mapping[str, Any] | None = None,
    pauses: Pauses | None = None,
) -> dict[str, Any]:
    """Adapt over domain `index` and return what its row says about it: scores, latency, memory, counters.

    Latency is the time of `stepper(images)` per batch, prediction and update together and each for itself, in ms; the
    images are already on the device, in channels_last, and a GPU is waited for before and after. The parts of the
    memory are those of the first batches, until one needs as much as any will, with what is held at the end.

    Args:
        saved: of a `Measurement` of this domain, to go on from; the stepper is where it was then.

    Raises:
        InputError: the number of logits is not the number of classes of the data set.
    """
    name = domains.names[index]
    total = domains.batches_per_domain
    adapter = adapter_of(stepper)
    # Methods keep their own generators; the seed only settles what a user's own module might draw.
    with _timed(adapter, device) as stopwatch, torch.random.fork_rng(devices=[device] if _on_gpu(device) else []):
        torch.manual_seed(domains.stream.number("adapter", name))
        measured = Measurement(stepper, device)
        if saved is not None:
            measured.load_state_dict(saved)
        for images, labels, recipe in domains.batches(index, measured.batches):
            images = images.to(device, memory_format=torch.channels_last)
            memory = StepMemory(adapter, stepper) if measured.watches(adapter, domains.stream.window) else None
            _wait(device)
            begin = time.perf_counter()
            with memory or contextlib.nullcontext():
                logits = stepper(images)
            _wait(device)
            times = 1e3 * (time.perf_counter() - begin), stopwatch.read()
            if logits.ndim != 2 or logits.shape[1] != domains.num_classes:
                raise InputError(
                    f"run: the model gives logits of shape {tuple(logits.shape)}, expected [B, {domains.num_classes}] "
                    f"for {domains.stream.dataset}; choose the data set that the model was trained for"
                )
            measured.add(logits, stepper.adapted if isinstance(stepper, Shadow) else None, labels, recipe, times)
            if memory is not None:
                measured.add_memory(memory.parts)
            if pauses is not None and measured.batches % pauses.every == 0 and measured.batches < total:
                pauses.save(measured)
            if progress is not None:
                progress(index * total + measured.batches, len(domains) * total, name)
    measured.add_memory(held(adapter, stepper))
    return {
        "domain": name,
        "index": index,
        "domains": len(domains),
        **measured.row(domains.plan(index).recipes),
        "counters": dict(stepper.counters),
        **_signals(stepper),
    }


def _signals(stepper: Stepper) -> dict[str, Any]:
    guarded = guarded_of(stepper)
    return {} if guarded is None else {"signals": dict(guarded.nearest)}


def guarded_of(stepper: Stepper) -> Guarded | None:
    """What watches over the method inside windows and shadows, if anything does."""
    while not isinstance(stepper, Adapter):
        if isinstance(stepper, Guarded):
            return stepper
        stepper = stepper.adapter
    return None


def adapter_of(stepper: Stepper) -> Adapter:
    """The method inside windows and shadows."""
    while not isinstance(stepper, Adapter):
        stepper = stepper.adapter
    return stepper


@contextlib.contextmanager
def _timed(adapter: Adapter, device: torch.device) -> Iterator[Stopwatch]:
    adapter.stopwatch = Stopwatch(device)
    try:
        yield adapter.stopwatch
    finally:
        adapter.stopwatch = None


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _wait(device: torch.device) -> None:
    if _on_gpu(device):
        torch.cuda.synchronize(device)
