"""The parts of the memory, against bytes counted by hand."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from ttaq.eval.memory_parts import MemoryParts, StepMemory
from ttaq.tta import Adapter, Shadow, SlidingWindow, build
from ttaq.tta.optimizer import make_optimizer

BATCH = 3
TALLY = 8  # int64 count of updates
INITIAL = 5 * 12 * 4 + TALLY  # copies of the weight that learns, and of the count


def net() -> nn.Sequential:
    """12 inputs, 5 hidden, 4 classes."""
    torch.manual_seed(0)
    layers = (nn.Flatten(), nn.Linear(12, 5, bias=False), nn.Sigmoid(), nn.Linear(5, 4))
    return nn.Sequential(*layers).eval()


class First(Adapter):
    """Learns the first weight from the squares of the logits; `passes` forwards and backwards one after the other."""

    method: ClassVar[str] = "first"

    def __init__(self, model: nn.Module, optimizer: str = "sgd", passes: int = 1) -> None:
        super().__init__(model, options={}, check_finite=True)
        self.passes = passes
        learned = {"1.weight": self.model.get_parameter("1.weight")}
        self.adapt(learned, make_optimizer("First", learned.values(), optimizer, lr=0.1, momentum=0.9))

    def step(self, x: Tensor) -> Tensor:
        for _ in range(self.passes):
            logits: Tensor = self.model(x)
            self.update(logits.square().mean())
        return logits


def images(batch: int = BATCH) -> Tensor:
    return torch.rand(batch, 3, 2, 2)


WEIGHTS = (5 * 12 + 4 * 5 + 4) * 4
# The images, for the gradient of the first weight; the output of the sigmoid; the logits, for that of the square. The
# second weight is needed as well, but it is a weight.
ACTIVATIONS = (12 + 5 + 4) * 4
LAYER = (12 + 5) * 4


@pytest.mark.parametrize("passes", [1, 3])
def test_bytes_of_a_step_counted_by_hand(passes: int) -> None:
    adapter = First(net(), passes=passes)
    with StepMemory(adapter) as memory:
        adapter(images())
    assert memory.parts == MemoryParts(
        weights=WEIGHTS,
        optimizer=5 * 12 * 4,  # momentum
        state=INITIAL + TALLY,
        gradients=5 * 12 * 4,
        activations=BATCH * ACTIVATIONS,  # of one pass: each lets go of what it kept
        layer=BATCH * LAYER,
    )
    assert memory.parts.total == sum(memory.parts.row().values()) * 1e6


def test_adam_keeps_two_moments_and_a_count() -> None:
    adapter = First(net(), "adam")
    with StepMemory(adapter) as memory:
        adapter(images())
    assert memory.parts.optimizer == 2 * 5 * 12 * 4 + 4


def test_without_gradients_nothing_is_kept() -> None:
    adapter = build("source", net())
    with StepMemory(adapter) as memory:
        adapter(images())
    assert memory.parts == MemoryParts(WEIGHTS, 0, TALLY, 0, 0, BATCH * LAYER)


def test_a_window_and_a_shadow_are_state() -> None:
    adapter = First(net())
    shadow = Shadow(SlidingWindow(adapter, 2), net())
    for _ in range(2):
        with StepMemory(adapter, shadow) as memory:
            shadow(images(1))
    # The last answer is a row of the logits of the window, whose storage has two.
    window, source, answers = 2 * 12 * 4, WEIGHTS + TALLY, 2 * 4 * 4
    assert memory.parts.weights == WEIGHTS
    assert memory.parts.state == INITIAL + TALLY + window + source + answers
    assert memory.parts.activations == 2 * 5 * 4  # what autograd keeps beside the images and the logits


def test_is_over_after_the_block() -> None:
    adapter, twin = First(net()), First(net())
    x = images()
    with StepMemory(adapter) as memory:
        watched = adapter(x)
    assert torch.equal(watched, twin(x))  # watching changes no bit
    parts = memory.parts
    assert torch.equal(adapter(images(50)[:7] * 0), twin(images(7) * 0))
    assert memory.parts == parts
    assert torch.equal(adapter.model[1].weight, twin.model[1].weight)


def test_row_and_back() -> None:
    parts = MemoryParts(1e6, 2e6, 3e6, 4e6, 5e6, 6e6)
    assert parts.row()["activations_mb"] == 5
    assert MemoryParts.of_row(parts.row()) == parts
    assert parts.text() == "weights 1, optimizer 2, state 3, gradients 4, activations 5, layer 6 MB"
