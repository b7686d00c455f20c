"""Error over the stream as a picture."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttaq.errors import DataError, require
from ttaq.eval.plot_style import COLOURS, caption, clean, legend, save
from ttaq.eval.report import Report
from ttaq.eval.rows import Row
from ttaq.eval.student_t import Interval, t_interval

__all__ = ["plot_stream"]

_POINTS = 150
"""About as many points as a line has."""
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
_MOST_NAMES = 20
_MOST_TICKS = 150
_Edges = NDArray[np.int64]


def plot_stream(report: Report, path: str | os.PathLike[str]) -> None:
    """Write a PNG (or what the suffix of `path` says): error over the stream by method, one panel per group of models.

    A point is the error of the stretch of images around it, averaged over seeds; shades are 95 % t intervals (none for
    a single seed). Stretches of the rows' traces are joined until about 150 are left, across domains only where there
    are more than half as many domains. Short ticks are the ends of domains, long lines those of what the tables have a
    line for.

    Raises:
        MissingPackageError: matplotlib is not installed.
        DataError: there is no complete seed, or the file cannot be written.
    """
    require("matplotlib", "plot_stream", "plot")
    from matplotlib.figure import Figure

    streams = [rows for entry in report.entries.values() for rows in entry.rows.values()]
    if not streams:
        raise DataError("plot_stream: no method has finished a stream yet; run ttaq adapt to its end first")
    edges = _edges(streams)
    figure = Figure(figsize=(11.0, 2.6 * len(report.groups) + 1.6), dpi=130, layout="constrained")
    panels = [*figure.subplots(len(report.groups), 1, squeeze=False, sharex=True, sharey=True)[:, 0]]
    for panel, group in zip(panels, report.groups, strict=True):
        _panel(panel, report, group, edges)
    panels[0].set_xlim(0, edges[-1])
    panels[0].set_ylim(0, min(100.0, panels[0].get_ylim()[1]))
    _borders(panels, report, streams)
    panels[-1].set_xlabel("images seen")
    legend(figure, *panels[0].get_legend_handles_labels())
    caption(figure, report, "shades are")
    save(figure, path, "plot_stream")


def _edges(streams: Sequence[Sequence[Row]]) -> _Edges:
    """Where the stretches that become points end, in images from the start, 0 included."""
    rows = streams[0]
    if len(rows) > _POINTS // 2:
        step = math.ceil(len(rows) / _POINTS)
        lengths = [sum(row["n"] for row in rows[start : start + step]) for start in range(0, len(rows), step)]
    else:
        step = math.ceil(sum(len(row["trace"]["n"]) for row in rows) / _POINTS)
        traces = [row["trace"]["n"] for row in rows]
        lengths = [sum(trace[start : start + step]) for trace in traces for start in range(0, len(trace), step)]
    shortest = min(sum(row["n"] for row in stream) for stream in streams)
    ends = itertools.accumulate(lengths, initial=0)
    return np.array([end for end in ends if end <= shortest])


def _errors(rows: Sequence[Row], edges: _Edges) -> NDArray[np.float64]:
    """Error in % between each two edges; inside a stretch of the trace its errors count as evenly spread."""
    seen = np.cumsum([0, *(n for row in rows for n in row["trace"]["n"])])
    wrong = np.cumsum([0, *(n for row in rows for n in row["trace"]["wrong"])])
    errors: NDArray[np.float64] = 100.0 * np.diff(np.interp(edges, seen, wrong)) / np.diff(edges)
    return errors


def _panel(panel: Any, report: Report, group: str, edges: _Edges) -> None:
    centres = (edges[:-1] + edges[1:]) / 2
    for number, method in enumerate(report.methods):
        entry = report.entry(group, method)
        seeds = [] if entry is None else [_errors(rows, edges) for rows in entry.rows.values()]
        intervals: list[Interval] = [t_interval(values) for values in zip(*seeds, strict=True)]
        means = np.array([interval.mean for interval in intervals])
        colour = COLOURS[number % len(COLOURS)]
        dashes = _DASHES[number % len(_DASHES)]
        panel.plot(centres[: len(means)], means, color=colour, linestyle=dashes, linewidth=1.3, label=method, zorder=3)
        if len(seeds) > 1:
            half = np.array([interval.half or 0.0 for interval in intervals])
            low, high = np.clip(means - half, 0, 100), np.clip(means + half, 0, 100)
            panel.fill_between(centres, low, high, color=colour, alpha=0.4 / (len(report.methods) + 1), linewidth=0)
    panel.set_ylabel("error (%)")
    panel.set_title(group, fontsize=10, loc="left")
    clean(panel)


def _borders(panels: Sequence[Any], report: Report, streams: Sequence[Sequence[Row]]) -> None:
    """Ends of domains as ticks, ends of what the tables have a line for as lines with names on top.

    Where the seeds draw different domains, there are no such ends.
    """
    rows = streams[0]
    if any([(row["domain"], row["n"]) for row in rows] != [(row["domain"], row["n"]) for row in s] for s in streams):
        return
    ends = np.cumsum([row["n"] for row in rows])
    if len(rows) <= _MOST_TICKS:
        for panel in panels:
            # Lines, for hundreds of matplotlib's ticks take seconds.
            panel.vlines(ends, 0, 0.025, transform=panel.get_xaxis_transform(), color="black", linewidth=0.8)
    by_label = itertools.groupby(range(len(rows)), lambda index: report.lines.label(rows[index]))
    runs = [(label, [*run]) for label, run in by_label]
    starts = [0.0, *(float(ends[run[-1]]) for _, run in runs)]
    if len(runs) > len(report.lines.labels):
        return
    for panel in panels:
        for start in starts[1:-1]:
            panel.axvline(start, color="0.8", linewidth=0.8, zorder=0)
    if 1 < len(runs) <= _MOST_NAMES:
        top = panels[0].secondary_xaxis("top")
        middles = [(start + end) / 2 for start, end in itertools.pairwise(starts)]
        names = [str(label).replace("_", " ") for label, _ in runs]
        top.set_xticks(middles, names, rotation=35, ha="left", rotation_mode="anchor", fontsize=8)
        top.tick_params(length=0)
        top.spines["top"].set_visible(False)
