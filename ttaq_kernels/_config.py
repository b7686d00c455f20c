"""Launch configurations that were tuned for a GPU; where there are none, an op uses its own.

Nothing is tuned while a user waits: `python -m benchmarks.tune` times candidates once and writes a table, a JSON file
named after GPU and capability, such as `nvidia_h200_sm90.json`:

    {"gpu": "NVIDIA H200", "capability": [9, 0], "configs": {"packed_linear": {KEY: {"BLOCK_M": 128, ...}}}}

It is looked for in the folder that TTAQ_KERNEL_CONFIGS names, then in `ttaq_kernels/configs`, when an op first runs on
the GPU. A key says what the best configuration depends on; an op builds it from the call. A tuned value changes how
long a call takes, never what it returns: what decides the order of a sum is not tuned.
"""

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttaq_kernels.errors import KernelError

__all__ = ["FOLDER_VARIABLE", "forced", "table_name", "tuned"]

FOLDER_VARIABLE = "TTAQ_KERNEL_CONFIGS"
_SHIPPED = Path(__file__).parent / "configs"

Config = dict[str, int]
Table = dict[str, dict[str, Config]]

_forced: dict[str, Config] = {}


def table_name(gpu: str, capability: tuple[int, int]) -> str:
    """The file that holds the table of a GPU: nvidia_h200_sm90.json."""
    words = re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_")
    return f"{words}_sm{capability[0]}{capability[1]}.json"


def _shape_error(content: Any) -> str | None:
    """What is wrong with the content of a table."""
    ops = content.get("configs") if isinstance(content, dict) else None
    if not isinstance(ops, dict):
        return "no object configs"
    for op, configs in ops.items():
        if not isinstance(configs, dict):
            return f"{configs!r} for {op}"
        for key, config in configs.items():
            numbers = config.values() if isinstance(config, dict) else (None,)
            if not all(type(number) is int and number > 0 for number in numbers):
                return f"{config!r} for {op}, {key}"
    return None


def _load(who: str, path: Path) -> Table:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        wrong = _shape_error(content)
    except (OSError, ValueError) as error:
        wrong = str(error)
    if wrong is not None:
        raise KernelError(
            f"{who}: the table of configurations {path} has {wrong}, expected {{configs: {{op: {{key: {{name: positive "
            "integer}}}}; write it anew with python -m benchmarks.tune, or remove it"
        )
    table: Table = content["configs"]
    return table


@functools.cache
def _table(who: str, folder: str | None, name: str) -> tuple[Table, str]:
    """The table and where it is from; nothing of either where there is none."""
    for place in (*([Path(folder)] if folder else []), _SHIPPED):
        if (place / name).is_file():
            return _load(who, place / name), str(place / name)
    return {}, ""


@functools.cache
def _name_of(index: int) -> str:
    return table_name(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))


def tuned(op: str, key: str, default: Mapping[str, int], x: Tensor) -> Config:
    """The configuration of `op` for this key on the GPU of `x`, or `default`, which also says what it consists of.

    Raises:
        KernelError: the table of this GPU is no table, or its entry has other names than `default`.
    """
    if op in _forced:
        return {**default, **_forced[op]}
    if not x.is_cuda:
        return dict(default)
    table, path = _table(op, os.environ.get(FOLDER_VARIABLE), _name_of(x.device.index))
    config = table.get(op, {}).get(key)
    if config is None:
        return dict(default)
    if config.keys() != default.keys():
        raise KernelError(
            f"{op}: the table of configurations {path} has {sorted(config)} for {key}, expected {sorted(default)}; "
            "write it anew with python -m benchmarks.tune, or remove it"
        )
    return dict(config)


@contextmanager
def forced(op: str, config: Mapping[str, int]) -> Iterator[None]:
    """While it is entered, `op` uses this configuration for every call: how the tuner tries candidates."""
    before = _forced.get(op)
    _forced[op] = dict(config)
    try:
        yield
    finally:
        del _forced[op]
        if before is not None:
            _forced[op] = before
