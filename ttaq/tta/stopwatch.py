"""How much of a step is learning."""

from __future__ import annotations

import time

import torch

__all__ = ["Stopwatch"]


class Stopwatch:
    """Adds up what lies between `start` and `stop`; an adapter whose `stopwatch` it is marks its updates with it.

    On a CPU it reads the clock. On a GPU it puts events into the stream, which wait for nothing: what counts is when
    the device, not the host, comes by.

    Args:
        device: where the adapter computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._gpu = device.type == "cuda"
        self._begin = 0.0
        self._seconds = 0.0
        self._events: list[torch.cuda.Event] = []

    def start(self) -> None:
        """Here learning begins."""
        if self._gpu:
            self._mark()
        else:
            self._begin = time.perf_counter()

    def stop(self) -> None:
        """And here it ends."""
        if self._gpu:
            self._mark()
        else:
            self._seconds += time.perf_counter() - self._begin

    def read(self) -> float:
        """Milliseconds since the last reading, in all. Waits for a GPU."""
        milliseconds = 1e3 * self._seconds
        if self._events:
            self._events[-1].synchronize()
            pairs = zip(self._events[::2], self._events[1::2], strict=True)
            milliseconds += sum(begin.elapsed_time(end) for begin, end in pairs)
        self._seconds, self._events = 0.0, []
        return milliseconds

    def _mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)
