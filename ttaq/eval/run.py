"""One method on one model over one stream: rows that survive a kill at any moment."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ttaq.tta
from ttaq.errors import CheckpointError, InputError
from ttaq.eval.checkpoint import Checkpoint, refuse_what_is_there
from ttaq.eval.domains import Domains
from ttaq.eval.latency import mean_latency
from ttaq.eval.measure import Measurement, Pauses, Progress, Stepper, measure_domain
from ttaq.eval.rows import Row, RowFile, cell_of, check_one_stream
from ttaq.io import model_hash
from ttaq.tta import METHODS, Adapter, Guarded, Limits, Shadow, SlidingWindow
from ttaq.version import __version__

__all__ = ["ModelInfo", "build_stepper", "run", "what_adapts"]


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
    source_images: Tensor | None = None,
    shadow: bool = False,
    guards: Limits | None = None,
    resume: bool = True,
    checkpoint_every: int | None = None,
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
        source_images: [N, C, H, W] for a method that wants images of the data that the model was trained on; None
            draws as many as it wants (`Domains.source_images`). Their number stands among the options of the rows.
        shadow: the source model answers, the method only adapts (`ttaq.tta.Shadow`); rows have `shadow_error` too.
        guards: what watches over a method that learns (`ttaq.tta.Guarded`); None watches nothing.
        resume: False refuses what is there instead of going on behind it.
        checkpoint_every: batches after which the state is saved inside a domain too; None saves at its end only.

    Returns:
        The rows appended by this call, the summary last; empty if the cell was complete.

    Raises:
        InputError: unknown method or option, logits whose number of classes is not the data set's, or a method that
            wants images of a data set that has none to give.
        CheckpointError: rows of another stream, rows or a state that may not be resumed, or a state file that is
            damaged or cannot be written. What was saved before stays, and so do the rows.
    """
    device = torch.device(device)
    if checkpoint_every is not None and (type(checkpoint_every) is not int or checkpoint_every < 1):
        raise InputError(f"run: checkpoint_every is {checkpoint_every!r}, expected a number of batches from 1, or None")
    info = info or ModelInfo.of(model)
    if source_images is None and method in METHODS and METHODS[method].source_images:
        source_images = domains.source_images(METHODS[method].source_images)
    chosen = dict(options or {})
    adapter = ttaq.tta.build(method, model, source_images=source_images, seed=domains.stream.seed, **chosen).to(device)
    # torch's annotations do not know this form of `to`.
    adapter = adapter.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    base: Row = {
        "kind": "domain",
        **what_adapts(adapter, source_images, shadow, guards),
        **asdict(info),
        "stream": str(domains.stream),
        "seed": domains.stream.seed,
        "frost": domains.stream.frost_in_use,
        "versions": _versions(),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
    }
    cell = cell_of(base)
    check_one_stream([*(row["stream"] for row in rows.rows), base["stream"]], f"run: {rows.path}")
    checkpoint = Checkpoint(rows, cell)
    if not resume:
        refuse_what_is_there(rows, cell)
    before = [row for row in rows.rows if cell_of(row) == cell]
    written = {row["index"]: row for row in before if row["kind"] == "domain"}
    if any(row["kind"] == "summary" for row in before):
        if missing := set(range(len(domains))) - set(written):
            raise CheckpointError(
                f"run: {rows.path} has the summary of {method} on {info.scheme}, but lacks {len(missing)} of its "
                f"{len(domains)} domains; put their lines back, or remove the rest of that run to run it again"
            )
        checkpoint.forget()
        return []

    stepper = build_stepper(adapter, model, domains.stream.window, guards, shadow)
    appended: list[Row] = []
    start, inside = 0, None
    saved = checkpoint.load()
    # Rows that were removed while the state stayed can only come from running the domains again.
    if saved is not None and all(index in written for index in range(_index(saved))):
        stepper.load_state_dict(saved["adapter"])
        start, inside = _index(saved), saved.get("measured")
        if inside is None:
            if start not in written:
                appended.append(_append(rows, saved["row"], written))
            start += 1
    for index in range(start, len(domains)):
        if domains.stream.setting == "reset_each_shift" and inside is None:
            stepper.reset()

        def save(measured: Measurement, index: int = index) -> None:
            state = {"index": index, "measured": measured.state_dict(), "adapter": stepper.state_dict()}
            checkpoint.save(state)

        pauses = None if checkpoint_every is None else Pauses(checkpoint_every, save)
        measured = measure_domain(stepper, domains, index, device, progress, inside, pauses)
        inside = None
        row = written.get(index, base | measured)
        checkpoint.save({"row": row, "adapter": stepper.state_dict()})
        if index not in written:
            appended.append(_append(rows, row, written))
    summary = rows.append(_summary(base, [written[index] for index in range(len(domains))]))
    checkpoint.forget()
    return [*appended, summary]


def what_adapts(adapter: Adapter, source_images: Tensor | None, shadow: bool, guards: Limits | None) -> Row:
    """What rows say of the method and of what is around it. Options are those of the adapter, and how many images of
    the source it got."""
    given = {} if source_images is None or not adapter.source_images else {"source_images": len(source_images)}
    return {
        "method": adapter.method,
        "options": {**adapter.options, **given},
        **({"shadow": True} if shadow else {}),
        **({"guards": asdict(guards)} if guards is not None and _learns(adapter) else {}),
    }


def _learns(adapter: Adapter) -> bool:
    return bool(adapter.parameters_adapted() or adapter.buffers_adapted())


def build_stepper(adapter: Adapter, model: nn.Module, window: int, guards: Limits | None, shadow: bool) -> Stepper:
    """The adapter with what is around it: guards if it learns, a window of more than one image, a shadow."""
    guarded = adapter if guards is None or not _learns(adapter) else Guarded(adapter, guards)
    stepper = guarded if window == 1 else SlidingWindow(guarded, window)
    if not shadow:
        return stepper
    watched = Shadow(stepper, model)
    watched.source.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return watched


def _index(saved: Mapping[str, Any]) -> int:
    """The domain of a state: where it stands in the middle, or which it has finished."""
    index: int = saved["index"] if "measured" in saved else saved["row"]["index"]
    return index


def _append(rows: RowFile, row: Row, written: dict[int, Row]) -> Row:
    written[row["index"]] = row = rows.append(row)
    return row


def _summary(base: Row, rows: list[Row]) -> Row:
    means = ("error", "class_error", "ece", *(("shadow_error",) if "shadow" in base else ()))
    memories = [row["memory"] for row in rows]
    figures = [key for key in memories[0] if key.endswith("_mb") and all(key in memory for memory in memories)]
    peaks = {key: [memory[key] for memory in memories] for key in figures}
    return base | {
        "kind": "summary",
        "domains": len(rows),
        "n": sum(row["n"] for row in rows),
        **{key: float(np.mean([row[key] for row in rows])) for key in means},
        "latency_ms": mean_latency([row["latency_ms"] for row in rows]),
        "memory": {key: None if None in values else max(values) for key, values in peaks.items()}
        | {"of": memories[0]["of"]},
        "counters": rows[-1]["counters"],
    }


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
