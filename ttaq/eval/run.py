"""One method on one model over one stream: rows that survive a kill at any moment."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import ttaq.tta
from ttaq.errors import CheckpointError
from ttaq.eval.domains import Domains
from ttaq.eval.measure import Progress, measure_domain
from ttaq.eval.rows import Row, RowFile, cell_of, check_one_stream
from ttaq.io import load_state, model_hash, save_state
from ttaq.tta import SlidingWindow
from ttaq.version import __version__

__all__ = ["ModelInfo", "run"]


@dataclass(frozen=True)
class ModelInfo:
    """What a row says about its model.

    Args:
        model: architecture name.
        scheme: canonical text of the scheme, "float" without one.
        quantization: method that quantized it, None for a float model.
        calibration_seed: seed that drew its calibration images, None where there were none or the file does not say.
        model_hash: hash of the state (`ttaq.io.model_hash`).
    """

    model: str
    scheme: str
    quantization: str | None
    calibration_seed: int | None
    model_hash: str

    @classmethod
    def of(cls, model: nn.Module, calibration_seed: int | None = None) -> ModelInfo:
        """From a model in memory."""
        scheme = getattr(model, "scheme", None)
        return cls(
            type(model).__name__, "float" if scheme is None else str(scheme), None, calibration_seed, model_hash(model)
        )


def run(
    model: nn.Module,
    method: str,
    domains: Domains,
    rows: RowFile,
    *,
    options: Mapping[str, Any] | None = None,
    info: ModelInfo | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> list[Row]:
    """Adapt `model` with `method` over all domains; append one row per domain and a summary to `rows`.

    A row is appended once its adapter state, with the row inside, is safely in `rows.state_folder`. A run that was
    killed continues behind the last state and appends the same rows as one that was not (times and memory aside); rows
    that are already there are not written again, and a complete cell does nothing. Without a state that fits, the
    domains are run again to bring the adapter to where the rows end.

    Args:
        model: eval-mode model giving logits [B, C]; it is not changed.
        method: a key of `ttaq.tta.METHODS`.
        domains: the opened stream.
        rows: an entered row file; its rows may differ from this stream in the seed only.
        options: options of the method.
        info: what the rows say about the model; taken from the model itself when None.
        device: where the adapter runs.
        progress: called after each batch.

    Returns:
        The rows appended by this call, the summary last; empty if the cell was complete.

    Raises:
        InputError: unknown method or option, or logits whose number of classes is not the data set's.
        CheckpointError: rows of another stream, or a state file that is damaged.
    """
    device = torch.device(device)
    stream = domains.stream
    info = info or ModelInfo.of(model)
    adapter = ttaq.tta.build(method, model, **dict(options or {})).to(device)
    # torch's annotations do not know this form of `to`.
    adapter = adapter.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    stepper = adapter if stream.window == 1 else SlidingWindow(adapter, stream.window)
    base: Row = {
        "kind": "domain",
        "method": method,
        "options": adapter.state_dict()["options"],
        **asdict(info),
        "stream": str(stream),
        "seed": stream.seed,
        "frost": stream.frost_in_use,
        "versions": _versions(),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
    }
    cell = cell_of(base)
    check_one_stream([*(row["stream"] for row in rows.rows), base["stream"]], f"run: {rows.path}")
    state_file = rows.state_folder / f"{hashlib.sha256(cell.encode()).hexdigest()[:16]}.safetensors"
    before = [row for row in rows.rows if cell_of(row) == cell]
    written = {row["index"]: row for row in before if row["kind"] == "domain"}
    if any(row["kind"] == "summary" for row in before):
        _forget(state_file)
        return []

    appended: list[Row] = []
    start = 0
    saved = _load_saved(state_file, cell) if state_file.exists() else None
    # Rows that were removed while the state stayed can only come from running the domains again.
    if saved is not None and all(index in written for index in range(saved["row"]["index"])):
        stepper.load_state_dict(saved["adapter"])
        start = saved["row"]["index"] + 1
        if saved["row"]["index"] not in written:
            appended.append(_append(rows, saved["row"], written))
    for index in range(start, len(domains)):
        if stream.setting == "reset_each_shift":
            stepper.reset()
        measured = measure_domain(stepper, domains, index, device, progress)
        row = written.get(index, base | measured)
        save_state(state_file, {"cell": cell, "row": row, "adapter": stepper.state_dict()})
        if index not in written:
            appended.append(_append(rows, row, written))
    summary = rows.append(_summary(base, [written[index] for index in range(len(domains))]))
    _forget(state_file)
    return [*appended, summary]


def _append(rows: RowFile, row: Row, written: dict[int, Row]) -> Row:
    written[row["index"]] = row = rows.append(row)
    return row


def _summary(base: Row, rows: list[Row]) -> Row:
    def mean(values: list[float]) -> float:
        return float(np.mean(values))

    peaks = [row["memory"]["peak_mb"] for row in rows]
    return base | {
        "kind": "summary",
        "domains": len(rows),
        "n": sum(row["n"] for row in rows),
        "error": mean([row["error"] for row in rows]),
        "class_error": mean([row["class_error"] for row in rows]),
        "ece": mean([row["ece"] for row in rows]),
        "latency_ms": {key: mean([row["latency_ms"][key] for row in rows]) for key in ("p50", "p95")},
        "memory": {"peak_mb": None if None in peaks else max(peaks), "of": rows[0]["memory"]["of"]},
        "counters": rows[-1]["counters"],
    }


def _load_saved(state_file: Path, cell: str) -> dict[str, Any]:
    try:
        saved = load_state(state_file)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; delete {state_file} to run this method's domains again") from None
    if saved.get("cell") != cell:
        raise CheckpointError(f"run: {state_file} belongs to another run; delete it")
    return saved


def _forget(state_file: Path) -> None:
    """Remove the state with what a kill left of an unfinished one, and the folder once it is empty."""
    folder = state_file.parent
    for path in [state_file, *folder.glob(f".{state_file.name}.*")]:
        path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _versions() -> dict[str, str]:
    return {
        "ttaq": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _device_name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return f"{device.type} ({name})"
