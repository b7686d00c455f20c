"""A report as one tidy table of comma-separated values."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from ttaq.eval.report import Report
from ttaq.eval.rows import Row

__all__ = ["csv_table"]

_MODEL = ("model", "scheme", "quantization", "calibration_seed", "model_hash")
_FIGURES = ("index", "domain", "domains", "n", "error", "class_error", "ece", "nonfinite")
_SOURCE = ("device", "threads", "stream")


def csv_table(report: Report) -> str:
    """A header and one line per (group, method, seed, domain) of the complete seeds, those that the tables are of.

    Values are those of the rows to the last digit; what a row does not have is empty. Columns: `group`, `method` (as
    the tables name them), `seed`; `model`, `scheme`, `quantization`, `calibration_seed`, `model_hash`; `options`
    (JSON); `index` (place in the stream, from 0), `domain`, `domains` (of the stream), `n` (images); `error`,
    `class_error`, `ece` in %; `nonfinite` (images whose logits were not finite); `latency_p50_ms`, `latency_p95_ms`
    (per batch), `memory_peak_mb`, `memory_of`; `device`, `threads`, `stream` (every flag).
    """
    text = io.StringIO()
    cost = ("latency_p50_ms", "latency_p95_ms", "memory_peak_mb", "memory_of")
    header = ["group", "method", "seed", *_MODEL, "options", *_FIGURES, *cost, *_SOURCE]
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    for entry in report.entries.values():
        for row in (row for rows in entry.rows.values() for row in rows):
            writer.writerow({"group": entry.group, "method": entry.method, **_line(row)})
    return text.getvalue()


def _line(row: Row) -> dict[str, Any]:
    return {
        "seed": row["seed"],
        **{key: row.get(key) for key in (*_MODEL, *_FIGURES, *_SOURCE)},
        "options": json.dumps(row["options"], sort_keys=True),
        "latency_p50_ms": row["latency_ms"]["p50"],
        "latency_p95_ms": row["latency_ms"]["p95"],
        "memory_peak_mb": row["memory"]["peak_mb"],
        "memory_of": row["memory"]["of"],
    }
