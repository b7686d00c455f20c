"""What of the memory of an adapter is what: counted in tensors, so that it is the same on every machine."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ttaq.tta import Adapter

__all__ = ["MemoryParts", "StepMemory", "held"]

_Place = tuple[int, int]
"""Address and bytes of a storage."""


@dataclass(frozen=True)
class MemoryParts:
    """Bytes of an adapter and of its step on a batch; storages that tensors share count once.

    Not in it: the images unless autograd keeps them, what a layer needs inside while it runs (workspaces of
    convolutions, gradients on their way back), what lies between allocations, and the process with its libraries.

    Args:
        weights: parameters and buffers of the adapter's model.
        optimizer: state of the optimizer.
        state: every other tensor that the adapter holds: buffers of its own, other models, initial copies.
        gradients: of the parameters that learn, while a step lasts.
        activations: the most that autograd keeps at one time between a forward and its backward, without what is
            counted above. 0 for a method that learns nothing by gradients.
        layer: the largest input and output together of a single layer.
    """

    weights: float = 0
    optimizer: float = 0
    state: float = 0
    gradients: float = 0
    activations: float = 0
    layer: float = 0

    @property
    def total(self) -> float:
        """The sum, which is an estimate of the peak: activations and the largest layer may overlap."""
        return float(sum(dataclasses.astuple(self)))

    def row(self) -> dict[str, float]:
        """In MB of 1e6 bytes, as rows have it."""
        return {f"{name}_mb": value / 1e6 for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def of_row(cls, row: Mapping[str, float]) -> MemoryParts:
        """Back from `row`."""
        return cls(*(1e6 * row[f"{field.name}_mb"] for field in dataclasses.fields(cls)))

    def text(self) -> str:
        """`weights 1.2, ... MB`"""
        return ", ".join(f"{name} {value / 1e6:.3g}" for name, value in dataclasses.asdict(self).items()) + " MB"

    def combine(self, other: MemoryParts, by: Callable[[float, float], float]) -> MemoryParts:
        """Part by part."""
        return MemoryParts(*map(by, dataclasses.astuple(self), dataclasses.astuple(other)))


class StepMemory:
    """`with StepMemory(adapter) as memory: adapter(x)`, then `memory.parts`. Nothing waits for the device.

    Args:
        adapter: of which the step is.
        holder: what holds the adapter and more tensors, such as a window; the adapter itself when None.
    """

    def __init__(self, adapter: Adapter, holder: object | None = None) -> None:
        self._adapter = adapter
        self._holder = adapter if holder is None else holder
        self._layer = 0
        self._handles: list[Any] = []
        self._saved = _SavedTensors()

    def __enter__(self) -> StepMemory:
        for module in self._adapter.model.modules():
            if not any(module.children()):
                self._handles.append(module.register_forward_hook(self._see_layer))
        self._saved.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._saved.__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()

    @property
    def parts(self) -> MemoryParts:
        """What the step needed."""
        # With what layers made in this step, if it was the first, and keep for the next.
        fixed = _fixed(self._adapter, self._holder)
        gradients = sum(_storages(parameter for _, parameter in self._adapter.parameters_adapted()).values())
        activations = self._saved.most({key for part in fixed for key in part})
        weights, optimizer, state = (sum(part.values()) for part in fixed)
        return MemoryParts(weights, optimizer, state, gradients, activations, self._layer)

    def _see_layer(self, module: nn.Module, inputs: tuple[object, ...], output: object) -> None:  # noqa: ARG002
        self._layer = max(self._layer, sum(_storages(_tensors([*inputs, output], set())).values()))


def held(adapter: Adapter, holder: object) -> MemoryParts:
    """What is there between two steps: weights, optimizer and state of an adapter and of what holds it."""
    return MemoryParts(*(sum(part.values()) for part in _fixed(adapter, holder)))


def _fixed(adapter: Adapter, holder: object) -> tuple[dict[_Place, int], dict[_Place, int], dict[_Place, int]]:
    """Weights, optimizer and state: bytes by the place of the storage, each in the first of them that has it."""
    weights = _storages([*adapter.model.parameters(), *adapter.model.buffers()])
    moments = [] if adapter.optimizer is None else [*_tensors(dict(adapter.optimizer.state), set())]
    optimizer = {key: size for key, size in _storages(moments).items() if key not in weights}
    everything = _storages(_tensors(holder, set()))
    state = {key: size for key, size in everything.items() if key not in weights and key not in optimizer}
    return weights, optimizer, state


class _SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """What graphs keep alive, in the order in which they take hold of it and let it go."""

    def __init__(self) -> None:
        self.events: list[tuple[int, _Place, int]] = []
        """+1 or -1, where the storage is, its bytes."""
        super().__init__(lambda tensor: _Saved(tensor, self.events), lambda saved: saved.tensor)

    def most(self, known: Container[_Place]) -> int:
        """The most bytes that were alive at one time, without storages that are known."""
        most, now, holders = 0, 0, Counter[_Place]()
        for change, key, size in self.events:
            if key in known:
                continue
            first_or_last = holders[key] == (0 if change > 0 else 1)
            holders[key] += change
            now += change * size if first_or_last else 0
            most = max(most, now)
        return most


class _Saved:
    """What autograd keeps in the place of a tensor."""

    def __init__(self, tensor: Tensor, events: list[tuple[int, _Place, int]]) -> None:
        self.tensor = tensor
        self._events = events
        self._what = [*_storages([tensor]).items()]
        events.extend((1, *what) for what in self._what)

    def __del__(self) -> None:
        self._events.extend((-1, *what) for what in self._what)


def _storages(tensors: Iterable[Tensor]) -> dict[_Place, int]:
    """Bytes of each storage by where it is. What one gave back may be another's soon, but hardly of the same size."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout is torch.strided]
    return {(storage.data_ptr(), storage.nbytes()): storage.nbytes() for storage in storages if storage.nbytes()}


def _tensors(value: object, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that can be reached through containers, modules and objects of ttaq."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _tensors(item, seen)
    elif isinstance(value, nn.Module) or type(value).__module__.split(".")[0] == "ttaq":
        yield from _tensors(getattr(value, "__dict__", {}), seen)
