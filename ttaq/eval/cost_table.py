"""The part of a report that says what methods cost, and what those in shadow would have answered."""

from __future__ import annotations

from collections.abc import Mapping

from ttaq.eval.latency import PERCENTILES, mean_latency
from ttaq.eval.report import Entry
from ttaq.eval.rows import Row
from ttaq.eval.table import table

__all__ = ["MEMORY_PARTS", "cost_tables"]

MEMORY_PARTS = ("weights_mb", "optimizer_mb", "state_mb", "activations_mb")


def cost_tables(entries: Mapping[str, Entry]) -> list[str]:
    """Of the complete seeds of each method of a group. Rows of earlier versions have none of it: then there is no
    table.
    """
    rows = {method: [row for of_seed in entry.rows.values() for row in of_seed] for method, entry in entries.items()}
    return [*_shadows({method: entries[method] for method in rows if rows[method]}), *_costs(rows)]


def _shadows(entries: Mapping[str, Entry]) -> list[str]:
    lines = [
        [method, entry.mean().text(), entry.mean("shadow_error").text()]
        for method, entry in entries.items()
        if all("shadow_error" in row for rows in entry.rows.values() for row in rows)
    ]
    if not lines:
        return []
    note = "In shadow the source model answers while a method adapts: its error, and that of the method's own answers:"
    return [note, table(["method", "error %", "error % of the adapted model"], lines)]


def _costs(rows: Mapping[str, list[Row]]) -> list[str]:
    lines = [[method, *_latency(found), *_memory(found)] for method, found in rows.items() if any(map(_split, found))]
    if not lines:
        return []
    note = (
        "Milliseconds per batch, p50 / p95 / p99, of a step, of its learning (`update`: backward and optimizer) and of "
        "the rest of it, means over domains and seeds; and bytes of tensors, in MB, the most of any domain:"
    )
    header = ["method", "ms per step", "ms forward", "ms update", "weights", "optimizer", "state", "activations"]
    return [note, table(header, lines)]


def _split(row: Row) -> bool:
    return "update" in row["latency_ms"] and "weights_mb" in row["memory"]


def _latency(rows: list[Row]) -> list[str]:
    means = mean_latency([row["latency_ms"] for row in rows if _split(row)])
    return [
        " / ".join(f"{part[key]:.1f}" for key in PERCENTILES) for part in (means, means["forward"], means["update"])
    ]


def _memory(rows: list[Row]) -> list[str]:
    return [f"{max(row['memory'][part] for row in rows if _split(row)):.3g}" for part in MEMORY_PARTS]
