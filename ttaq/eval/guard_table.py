"""The part of a report that says what the guards saw."""

from __future__ import annotations

from ttaq.eval.report import Report
from ttaq.eval.rows import Row
from ttaq.eval.table import table
from ttaq.tta.guards import FROM_BELOW

__all__ = ["guard_table"]

_SIGNALS = ("entropy", "classes", "batch_classes", "spike", "drift", "drift_per_batch")


def guard_table(report: Report, group: str) -> list[str]:
    """Of each guarded method of a group the alarms of all complete seeds, and of each signal what came nearest to its
    limit (`ttaq.tta.Guarded`); nothing where no method was guarded."""
    found: dict[str, list[list[Row]]] = {}
    for method in report.methods:
        entry = report.entry(group, method)
        if entry is not None and all("signals" in row for rows in entry.rows.values() for row in rows):
            found[method] = [*entry.rows.values()]
    if not found:
        return []
    limits = next(iter(found.values()))[0][0]["guards"]
    header = [f"{name}, at {'least' if name in FROM_BELOW else 'most'} {limits[name]:g}" for name in _SIGNALS]
    lines = []
    for method, seeds in found.items():
        counts = (sum(_count(rows, key, report) for rows in seeds) for key in ("alarms", "paused"))
        lines.append([method, *map(str, counts), *(_nearest(name, seeds) for name in _SIGNALS)])
    note = "Guards: alarms and batches without learning after them, and of each signal the value nearest to its limit:"
    return [note, table(["method", "alarms", "paused", *header], lines)]


def _count(rows: list[Row], key: str, report: Report) -> int:
    # Counters go on over the stream, and begin anew where the adapter does.
    anew = report.stream.get("setting") == "reset_each_shift"
    return sum(row["counters"].get(key, 0) for row in (rows if anew else rows[-1:]))


def _nearest(name: str, seeds: list[list[Row]]) -> str:
    values = [row["signals"][name] for rows in seeds for row in rows if name in row["signals"]]
    return f"{(min if name in FROM_BELOW else max)(values):.2g}" if values else "-"
