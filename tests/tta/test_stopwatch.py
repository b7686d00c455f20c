"""The stopwatch of an adapter: updates are timed, all else is not."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor
from tta_cases import TESTED, Everything, batch_norm_net, stream

from ttaq.tta.stopwatch import Stopwatch

CPU = torch.device("cpu")


def test_adds_up_stretches_and_starts_anew_when_read() -> None:
    watch = Stopwatch(CPU)
    assert watch.read() == 0
    for _ in range(2):
        watch.start()
        time.sleep(0.01)
        watch.stop()
        time.sleep(0.05)
    assert 20 <= watch.read() < 60
    assert watch.read() == 0


class Slow(Everything):
    """Takes 20 ms for its forward and 40 ms for its update."""

    def step(self, x: Tensor) -> Tensor:
        time.sleep(0.02)
        return super().step(x)

    def _optimize(self, optimizer: torch.optim.Optimizer, when: Tensor | None) -> None:
        time.sleep(0.04)
        super()._optimize(optimizer, when)


def test_marks_the_update_of_a_step() -> None:
    adapter = Slow(batch_norm_net())
    adapter.stopwatch = Stopwatch(CPU)
    first, second = stream(2)
    adapter(first)
    adapter.stopwatch.read()
    begin = time.perf_counter()
    adapter(second)
    whole = 1e3 * (time.perf_counter() - begin)
    update = adapter.stopwatch.read()
    assert update >= 40
    assert whole - update >= 20


def test_an_update_that_fails_is_stopped_too(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = Everything(batch_norm_net())
    adapter.stopwatch = Stopwatch(CPU)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(adapter, "_optimize", fail)
    with pytest.raises(KeyboardInterrupt):
        adapter(stream(1)[0])
    assert adapter.stopwatch.read() > 0


def test_a_method_that_learns_nothing_has_no_update() -> None:
    adapter = TESTED["norm"](batch_norm_net())
    adapter.stopwatch = Stopwatch(CPU)
    adapter(stream(1)[0])
    assert adapter.stopwatch.read() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_is_the_time_of_the_device() -> None:
    device = torch.device("cuda")
    watch, matrix = Stopwatch(device), torch.randn(4096, 4096, device=device)
    for _ in range(2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        watch.start()
        for _ in range(50):
            matrix @ matrix
        watch.stop()
        launched = 1e3 * (time.perf_counter() - begin)
        torch.cuda.synchronize()
        whole = 1e3 * (time.perf_counter() - begin)
        measured = watch.read()
    assert launched < 0.5 * measured  # nothing waited
    assert measured == pytest.approx(whole, rel=0.2)
