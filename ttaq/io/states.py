"""Everything mutable of a running adapter, saved so that a stream that was killed goes on with the same outputs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ttaq.errors import CheckpointError
from ttaq.io.container import read, write

__all__ = ["load_state", "save_state"]


def save_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Save a nested state: dictionaries with text keys, lists, text, int, float, bool, None and tensors of any shape
    and device.

    Tensors become entries of the file, named by their place (`/optimizer/0/exp_avg`, a JSON pointer); the rest is the
    field `state` of the header, where a tensor is `{"$tensor": name}`, a float that is not finite `{"$float": "nan"}`,
    and a key that begins with `$` has one `$` more. Equal values come back, floats bit for bit; strides, shared
    storage and requires_grad do not. The file is written completely or not at all. Raises CheckpointError for any
    other type, naming its place.
    """
    tensors: dict[str, Tensor] = {}
    if not isinstance(state, dict):
        raise CheckpointError(f"save_state: the state is a {type(state).__name__}, expected a dict")
    try:
        tree = _encode(state, "", tensors)
    except RecursionError as error:
        raise CheckpointError(
            "save_state: the state is nested deeper than Python can follow; it may hold itself"
        ) from error
    write("save_state", path, "state", {"state": tree}, tensors)


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state that `save_state` wrote, tensors on the CPU. Raises CheckpointError for a missing, truncated, damaged,
    newer or other file."""
    header, tensors = read("load_state", path, "state")
    try:
        state = _decode(header["state"], tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"load_state: the state in {path} is not one that ttaq wrote ({error!r})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"load_state: {path} holds a {type(state).__name__}, expected a dict")
    return state


def _encode(value: object, place: str, tensors: dict[str, Tensor]) -> object:
    if isinstance(value, Tensor):
        tensors[place] = value
        return {"$tensor": place}
    if isinstance(value, dict):
        for key in value:
            if type(key) is not str:
                raise CheckpointError(
                    f"save_state: the key {key!r} at {place or '/'} is a {type(key).__name__}, expected text"
                )
        return {
            f"${key}" if key.startswith("$") else key: _encode(item, f"{place}/{_escape(key)}", tensors)
            for key, item in value.items()
        }
    if type(value) is list:
        return [_encode(item, f"{place}/{index}", tensors) for index, item in enumerate(value)]
    if type(value) is float and not math.isfinite(value):
        return {"$float": repr(value)}
    # Exact types only: a tuple, an enum or a NumPy number would come back as something else.
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise CheckpointError(
        f"save_state: {place or '/'} is a {type(value).__name__}, "
        f"expected dict, list, str, int, float, bool, None or Tensor"
    )


def _escape(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def _decode(node: object, tensors: Mapping[str, Tensor]) -> object:
    if isinstance(node, list):
        return [_decode(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    if "$tensor" in node:
        return tensors[node["$tensor"]]
    if "$float" in node:
        return float(node["$float"])
    return {key.removeprefix("$"): _decode(item, tensors) for key, item in node.items()}
