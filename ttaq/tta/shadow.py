"""Shadow: a method that adapts and is watched, while the source model answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ttaq.errors import CheckpointError, InputError
from ttaq.tta.adapter import Adapter
from ttaq.tta.guards import Guarded
from ttaq.tta.source import Source
from ttaq.tta.window import SlidingWindow

__all__ = ["Shadow"]


class Shadow:
    """`logits = shadow(x)` are those of the source model; the adapter adapts to x beside it.

    For a first time in a new place: nothing that adaptation does reaches an answer, and `adapted` says what it would
    have been. Costs a forward pass of the source model per batch, and a copy of it.

    Args:
        adapter: any method, or a window over one.
        model: the model that the adapter was built from; an adapter sets its own copy up for itself.

    State: that of the adapter.

    Raises:
        InputError: `model` is not the one that the adapter was built from.
    """

    def __init__(self, adapter: Adapter | Guarded | SlidingWindow, model: nn.Module) -> None:
        method: object = adapter
        while isinstance(method, Guarded | SlidingWindow):
            method = method.adapter
        if not isinstance(method, Adapter):
            raise InputError(
                f"Shadow: got {type(adapter).__name__}, expected an Adapter or a SlidingWindow; build one with "
                f"ttaq.tta.build"
            )
        self.adapter = adapter
        self.adapted: Tensor | None = None
        """What the adapter answered to the last batch; None before the first one."""
        self.source = Source(model, check_finite=method.check_finite)
        """What answers."""
        self._follow(method)
        if (got := self.source.state_dict()["source"]) != (expected := method.state_dict()["source"]):
            raise InputError(
                f"Shadow: the model (hash {got[:12]}) is not the one that the adapter was built from "
                f"({expected[:12]}); give both the same model"
            )

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of the source model, while the adapter learns from the batch."""
        logits = self.predict(x)
        self.adapted = self.adapter(x)
        return logits

    def predict(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of the source model. Nothing is learned and nothing is counted."""
        return self.source.predict(x)

    @property
    def counters(self) -> dict[str, int]:
        """Those of the adapter."""
        return self.adapter.counters

    def reset(self) -> None:
        """A reset adapter behind the same source model."""
        self.adapter.reset()
        self.adapted = None

    def state_dict(self) -> dict[str, Any]:
        """Everything mutable, in copies."""
        return {"shadow": self.adapter.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was called. CheckpointError, nothing changed, for a state of something else."""
        if not isinstance(state, Mapping) or set(state) != {"shadow"}:
            got = ", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise CheckpointError(
                f"Shadow: the state holds {got}, expected that of a Shadow; load it into what made it"
            )
        self.adapter.load_state_dict(state["shadow"])
        self.adapted = None

    def _follow(self, method: Adapter) -> None:
        """The source model to where the adapter's is."""
        some = next(method.model.parameters(), None)
        if some is not None:
            self.source.to(some.device, some.dtype)
