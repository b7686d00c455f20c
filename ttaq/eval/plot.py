"""A report as a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ttaq.errors import DataError, require
from ttaq.eval.report import Report

__all__ = ["plot"]

# Okabe and Ito's colours, told apart by readers with any colour vision; markers keep the distinction in grey print.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F")
_MARKERS = "osD^vP*X"


def plot(report: Report, path: str | os.PathLike[str]) -> None:
    """Write a PNG (or what the suffix of `path` says): error by corruption and method, one panel per group of models.

    Points are means over seeds, bars their 95 % t intervals (none for a single seed); the mean over domains stands
    apart on the right.

    Raises:
        MissingPackageError: matplotlib is not installed.
        DataError: the file cannot be written.
    """
    require("matplotlib", "plot", "plot")
    from matplotlib.figure import Figure

    groups, domains = report.groups, report.domains
    width = max(7.0, 0.62 * len(domains) + 2.4)
    figure = Figure(figsize=(width, 2.9 * len(groups) + 1.1), dpi=130, layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    for panel, group in zip(panels, groups, strict=True):
        _panel(panel, report, group)
    panels[0].set_ylim(0, min(100.0, panels[0].get_ylim()[1]))  # Shared, so only now does it know every panel.
    positions = [*range(len(domains)), len(domains) + 0.5]
    panels[-1].set_xticks(positions, [*(name.replace("_", " ") for name in domains), "mean"], rotation=40, ha="right")
    panels[-1].get_xticklabels()[-1].set_fontweight("bold")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(5, len(labels)), frameon=False)
    figure.supxlabel(_caption(report), fontsize=8, color="0.35")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise DataError(f"plot: cannot write {Path(path)} ({error}); choose a .png file in a writable folder") from None


def _panel(panel: Any, report: Report, group: str) -> None:
    count = len(report.domains)
    for number, method in enumerate(report.methods):
        entry = report.entries.get((group, method))
        shift = 0.62 * ((number + 0.5) / len(report.methods) - 0.5)
        style = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
        intervals = [None if entry is None else entry.domain(index) for index in range(count)]
        intervals.append(None if entry is None else entry.mean())
        known = [(place, interval) for place, interval in enumerate(intervals) if interval is not None]
        panel.errorbar(
            [shift + place + (0.5 if place == count else 0.0) for place, _ in known],
            [interval.mean for _, interval in known],
            # Without bars, a legend entry is a bare mark too.
            yerr=None if len(report.seeds) == 1 else [interval.half or 0.0 for _, interval in known],
            linestyle="none",
            markersize=5,
            elinewidth=1.2,
            capsize=2,
            label=method,
            **style,
        )
    for place in range(0, count, 2):
        panel.axvspan(place - 0.5, place + 0.5, color="0.955", zorder=0, linewidth=0)
    panel.axvline(count - 0.25, color="0.6", linewidth=0.8)
    panel.set_xlim(-0.6, count + 1.1)
    panel.set_ylabel("error (%)")
    panel.set_title(group, fontsize=10, loc="left")
    panel.grid(axis="y", color="0.85", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _caption(report: Report) -> str:
    images = report.stream["images"]
    seeds = (
        f"{len(report.seeds)} seeds, bars are 95 % t intervals" if len(report.seeds) > 1 else "one seed, no intervals"
    )
    return (
        f"{report.stream['dataset']}, {images} images per corruption ({report.stream['split']} split), "
        f"severity {report.stream['severity']}, batches of {report.stream['batch_size']}; {seeds}"
    )
