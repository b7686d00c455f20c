"""A report as one tidy table of comma-separated values."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from ttaq.eval.cost_table import MEMORY_PARTS
from ttaq.eval.latency import PERCENTILES
from ttaq.eval.report import Report
from ttaq.eval.rows import Row

__all__ = ["csv_table"]

_MODEL = ("model", "scheme", "quantization", "calibration_seed", "model_hash")
_FIGURES = ("index", "domain", "domains", "n", "error", "class_error", "ece", "nonfinite")
_SPLIT = ("forward", "update")
_SOURCE = ("device", "threads", "stream")


def csv_table(report: Report) -> str:
    """A header and one line per (group, method, seed, domain) of the complete seeds, those that the tables are of.

    Values are those of the rows to the last digit; what a row does not have is empty. Columns: `group`, `method` (as
    the tables name them), `seed`; `model`, `scheme`, `quantization`, `calibration_seed`, `model_hash`; `options`
    (JSON); `index` (place in the stream, from 0), `domain`, `domains` (of the stream), `n` (images); `error`,
    `class_error`, `ece` in %; `nonfinite` (images whose logits were not finite);
    `latency_p50_ms`, `latency_p95_ms`, `latency_p99_ms` (per batch) and of its parts `forward_p50_ms`,
    `forward_p95_ms`, `forward_p99_ms`, `update_p50_ms`, `update_p95_ms`, `update_p99_ms`; `memory_peak_mb`,
    `memory_of`, and of tensors `weights_mb`, `optimizer_mb`, `state_mb`, `activations_mb`; `alarms` (of the guards,
    until the end of the domain); `device`, `threads`, `stream` (every flag).
    """
    text = io.StringIO()
    latency = [f"{part}_{key}_ms" for part in ("latency", *_SPLIT) for key in PERCENTILES]
    cost = [*latency, "memory_peak_mb", "memory_of", *MEMORY_PARTS, "alarms"]
    header = ["group", "method", "seed", *_MODEL, "options", *_FIGURES, *cost, *_SOURCE]
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    for entry in report.entries.values():
        for row in (row for rows in entry.rows.values() for row in rows):
            writer.writerow({"group": entry.group, "method": entry.method, **_line(row)})
    return text.getvalue()


def _line(row: Row) -> dict[str, Any]:
    latency = row["latency_ms"]
    return {
        "seed": row["seed"],
        **{key: row.get(key) for key in (*_MODEL, *_FIGURES, *_SOURCE)},
        "options": json.dumps(row["options"], sort_keys=True),
        **{f"latency_{key}_ms": latency.get(key) for key in PERCENTILES},
        **{f"{part}_{key}_ms": latency.get(part, {}).get(key) for part in _SPLIT for key in PERCENTILES},
        "memory_peak_mb": row["memory"]["peak_mb"],
        "memory_of": row["memory"]["of"],
        **{part: row["memory"].get(part) for part in MEMORY_PARTS},
        "alarms": row["counters"].get("alarms"),
    }
