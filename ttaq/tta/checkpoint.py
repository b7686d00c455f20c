"""Whether a saved state fits an adapter: decided completely before any of it is loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from ttaq.errors import CheckpointError

__all__ = ["check_state"]


def check_state(who: str, state: Mapping[str, Any], own: Mapping[str, Any], resizable: Collection[str] = ()) -> None:
    """Raise `CheckpointError` in the name of `who` unless `state` can be loaded where `own` is the present state.

    Same method, same options, same seed, same source hash; counters that count; and in every other part the same names
    with tensors of the same shape and dtype; of those in `resizable` the first dimension.
    """
    _same_names(who, "the state", state, own)
    _same_names(who, "options", state["options"], own["options"])
    _same_names(who, "counters", state["counters"], own["counters"])
    identity = {key: (state[key], own[key]) for key in ("method", "seed", "source")}
    identity |= {f"option {key}": (state["options"][key], own["options"][key]) for key in own["options"]}
    for what, (got, expected) in identity.items():
        if isinstance(got, Tensor) or got != expected:
            raise CheckpointError(
                f"{who}: the state was saved with {what} {got!r}, expected {expected!r}; "
                f"load it into an adapter built like the one it was saved from"
            )
    for name, count in state["counters"].items():
        if type(count) is not int or count < 0:
            raise CheckpointError(f"{who}: counter {name} is {count!r}, expected an integer >= 0; the state is damaged")
    for part in own.keys() - {"method", "options", "seed", "source", "counters"}:
        _same_names(who, part, state[part], own[part])
        for name, tensor in own[part].items():
            free = name in resizable
            if (got := _kind(state[part][name], free)) != (expected := _kind(tensor, free)):
                raise CheckpointError(f"{who}: {part} {name} is {got}, expected {expected}; the state is damaged")


def _kind(value: object, resizable: bool) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    shape = (*value.shape[:1], *("any" for _ in value.shape[1:])) if resizable else tuple(value.shape)
    return f"{value.dtype} {shape}"


def _same_names(who: str, what: str, got: object, expected: Mapping[str, object]) -> None:
    if not isinstance(got, Mapping):
        raise CheckpointError(f"{who}: {what} is {type(got).__name__}, expected a dict as state_dict() makes it")
    missing, unknown = sorted(expected.keys() - got.keys()), sorted(map(str, got.keys() - expected.keys()))
    for names, problem in (missing, "lacks"), (unknown, "has unknown"):
        if names:
            raise CheckpointError(
                f"{who}: {what} {problem} {', '.join(names[:3])} ({len(names)} in all), expected exactly "
                f"{len(expected)} entries; the state is damaged or of another version or model"
            )
