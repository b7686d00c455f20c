"""Error by domain as a picture."""

from __future__ import annotations

import os
from typing import Any

from ttaq.errors import require
from ttaq.eval.plot_style import caption, clean, legend, save, style
from ttaq.eval.report import Report

__all__ = ["plot"]

_WIDEST = 18.0


def plot(report: Report, path: str | os.PathLike[str]) -> None:
    """Write a PNG (or what the suffix of `path` says): error by domain and method, one panel per group of models.

    Points are means over seeds, bars their 95 % t intervals (none for a single seed); the mean over domains stands
    apart on the right. Domains are those of the tables: where there are too many, means over several.

    Raises:
        MissingPackageError: matplotlib is not installed.
        DataError: the file cannot be written.
    """
    require("matplotlib", "plot", "plot")
    from matplotlib.figure import Figure

    groups, labels = report.groups, report.lines.labels
    width = min(max(7.0, 0.62 * len(labels) + 2.4), _WIDEST)
    height = 2.9 * len(groups) + 0.4 + 0.05 * max(map(len, labels), default=0)  # Names stand aslant below.
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    for panel, group in zip(panels, groups, strict=True):
        _panel(panel, report, group, (width - 1.0) / (len(labels) + 1.5))
    # Shared, so only now does it know every panel; the margin is that of the marks of a picture that begins at 0.
    panels[0].set_ylim(0, min(100.0, 1.04 * panels[0].get_ylim()[1]))
    positions = [*range(len(labels)), len(labels) + 0.5]
    texts = [*(label.replace("_", " ") for label in labels), report.lines.mean]
    panels[-1].set_xticks(positions, texts, rotation=40, ha="right", rotation_mode="anchor")
    panels[-1].get_xticklabels()[-1].set_fontweight("bold")
    legend(figure, *panels[0].get_legend_handles_labels())
    caption(figure, report, "bars are")
    save(figure, path, "plot")


def _panel(panel: Any, report: Report, group: str, inches: float) -> None:
    """`inches`: the room that a domain has."""
    count = len(report.lines.labels)
    for number, method in enumerate(report.methods):
        entry = report.entry(group, method)
        shift = 0.62 * ((number + 0.5) / len(report.methods) - 0.5)
        found = {} if entry is None else entry.by_line(report.lines)
        intervals = [*map(found.get, report.lines.labels), None if entry is None else entry.mean()]
        known = [(place, interval) for place, interval in enumerate(intervals) if interval is not None]
        panel.errorbar(
            [shift + place + (0.5 if place == count else 0.0) for place, _ in known],
            [interval.mean for _, interval in known],
            # Without bars, a legend entry is a bare mark too.
            yerr=None if len(report.seeds) == 1 else [interval.half or 0.0 for _, interval in known],
            linestyle="none",
            markersize=min(5.0, max(2.5, 0.8 * 72 * 0.62 * inches / len(report.methods))),
            elinewidth=1.2,
            capsize=2,
            label=method,
            **style(number),
        )
    for place in range(0, count, 2):
        panel.axvspan(place - 0.5, place + 0.5, color="0.955", zorder=0, linewidth=0)
    panel.axvline(count - 0.25, color="0.6", linewidth=0.8)
    panel.set_xlim(-0.6, count + 1.1)
    panel.set_ylabel("error (%)")
    panel.set_title(group, fontsize=10, loc="left")
    clean(panel)
