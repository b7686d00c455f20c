"""Accuracy against what it costs as a picture."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from ttaq.errors import require
from ttaq.eval.plot_style import COLOURS, MARKERS, caption, clean, legend, save
from ttaq.eval.report import Entry, Report
from ttaq.eval.rows import Row
from ttaq.eval.student_t import Interval, t_interval

__all__ = ["plot_cost"]

_LOG_FROM = 5.0
"""Ratio of the largest to the smallest cost from which the axis is logarithmic."""


def plot_cost(report: Report, path: str | os.PathLike[str]) -> None:
    """Write a PNG (or what the suffix of `path` says): accuracy against latency, and accuracy against peak memory.

    One point per method (colour) and group of models (marker), the mean over seeds, with bars for the 95 % t intervals
    of both (none for a single seed). Latency is the median per batch, averaged over domains; memory is the largest peak
    of the stream. What was not measured has no point, and costs measured in different ways are not drawn together.

    Raises:
        MissingPackageError: matplotlib is not installed.
        DataError: the file cannot be written.
    """
    require("matplotlib", "plot_cost", "plot")
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    entries = [entry for entry in report.entries.values() if entry.rows]
    rows = [row for entry in entries for found in entry.rows.values() for row in found]
    devices = [*dict.fromkeys(f"{row['device']}, {row.get('threads', '?')} threads" for row in rows)]
    sources = [*dict.fromkeys(row["memory"]["of"] for row in rows if row["memory"]["peak_mb"] is not None)]
    figure = Figure(figsize=(11.0, 5.2 + 0.25 * len(report.groups)), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(left, report, entries, _latency, "latency, p50 per batch (ms)", devices)
    _panel(right, report, entries, _memory, "peak memory (MB)", sources)
    left.set_ylabel("accuracy (%), mean over domains")
    methods = [
        Line2D([], [], color=COLOURS[number % len(COLOURS)], linewidth=5) for number, _ in enumerate(report.methods)
    ]
    groups = [
        Line2D([], [], color="0.35", marker=MARKERS[number % len(MARKERS)], linestyle="none")
        for number, _ in enumerate(report.groups)
    ]
    legend(figure, [*methods, *groups], [*report.methods, *report.groups])
    caption(figure, report, "bars are")
    save(figure, path, "plot_cost")


def _latency(rows: Sequence[Row]) -> float | None:
    return float(sum(row["latency_ms"]["p50"] for row in rows) / len(rows))


def _memory(rows: Sequence[Row]) -> float | None:
    peaks = [row["memory"]["peak_mb"] for row in rows]
    return None if None in peaks else float(max(peaks))


def _panel(
    panel: Any,
    report: Report,
    entries: Sequence[Entry],
    cost: Callable[[Sequence[Row]], float | None],
    what: str,
    ways: Sequence[str],
) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    points = [(entry, _interval(entry, cost)) for entry in entries]
    known = [(entry, interval, accuracy) for entry, (interval, accuracy) in points if interval and accuracy]
    clean(panel)
    panel.set_xlabel(what + "".join(f"\n{way}" for way in ways[:1]))
    if not known or len(ways) > 1:
        text = "not comparable, measured in different ways:\n" + "\n".join(ways) if known else "not measured"
        panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center", color="0.35", wrap=True)
        return
    for entry, interval, accuracy in known:
        number = report.methods.index(entry.method)
        panel.errorbar(
            [interval.mean],
            [accuracy.mean],
            xerr=interval.half,
            yerr=accuracy.half,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[report.groups.index(entry.group) % len(MARKERS)],
            markersize=7,
            markeredgecolor="white",
            markeredgewidth=0.6,
            elinewidth=1.1,
            capsize=2,
        )
    means = [interval.mean for _, interval, _ in known]
    if min(means) > 0 and max(means) > _LOG_FROM * min(means):
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
    # Wide bars of few seeds may reach where no cost and no accuracy can be.
    least = min(means) / 3 if panel.get_xscale() == "log" else 0.0
    panel.set_xlim(left=max(least, panel.get_xlim()[0]))
    low, high = panel.get_ylim()
    panel.set_ylim(max(0.0, low), min(100.0, high))
    panel.grid(axis="x", color="0.92", linewidth=0.6)


def _interval(entry: Entry, cost: Callable[[Sequence[Row]], float | None]) -> tuple[Interval | None, Interval | None]:
    """The cost over the seeds where it was measured, and the accuracy of the same seeds."""
    found = {seed: value for seed, rows in entry.rows.items() if (value := cost(rows)) is not None}
    errors = entry.means()
    if not found:
        return None, None
    return t_interval([*found.values()]), t_interval([100.0 - errors[seed] for seed in found])
