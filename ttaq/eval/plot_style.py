"""What the pictures of a report share: colours, legend, caption, file."""

from __future__ import annotations

import io
import os
import textwrap
from pathlib import Path
from typing import Any

from ttaq.errors import DataError
from ttaq.eval.report import Report
from ttaq.io.atomic import write_atomically

__all__ = ["COLOURS", "MARKERS", "caption", "clean", "legend", "save", "style"]

# Okabe and Ito's colours, told apart by readers with any colour vision; markers keep the distinction in grey print.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F")
MARKERS = "osD^vP*X"
_LONGEST_FLAG = 60


def style(number: int) -> dict[str, str]:
    """Colour and marker of the method of that number."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def clean(panel: Any) -> None:
    """Horizontal grid lines behind the data, and a frame on two sides only."""
    panel.grid(axis="y", color="0.85", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def legend(figure: Any, handles: list[Any], labels: list[str]) -> None:
    """Above all panels, in as many columns as are sure to fit."""
    longest = max(map(len, labels))
    fits = int(figure.get_figwidth() * 11 / (longest + 6))  # Eleven characters to the inch, and the mark.
    figure.legend(handles, labels, loc="outside upper center", ncols=max(1, min(fits, len(labels))), frameon=False)


def caption(figure: Any, report: Report, bars: str) -> None:
    """The flags of the stream, but for long lists and those not in use, and what `bars` over seeds show."""
    used = {name: value for name, value in report.stream.items() if value not in ("none", "unused")}
    flags = [f"{name}={value}" for name, value in used.items() if len(value) <= _LONGEST_FLAG]
    seeds = f"{len(report.seeds)} seeds, {bars} 95 % t intervals" if len(report.seeds) > 1 else "one seed, no intervals"
    width = int(figure.get_figwidth() * 14)  # Fourteen characters of this size to the inch.
    text = textwrap.fill(f"{' '.join(flags)}; {seeds}", width, break_long_words=False, break_on_hyphens=False)
    figure.supxlabel(text, fontsize=8, color="0.35")


def save(figure: Any, path: str | os.PathLike[str], who: str) -> None:
    """Write the file, in the format that its suffix names."""
    picture = io.BytesIO()
    try:
        figure.savefig(picture, format=Path(path).suffix[1:] or None)
    except ValueError as error:
        raise DataError(f"{who}: cannot write {Path(path)} ({error}); choose a .png file") from None
    write_atomically(who, Path(path), picture.getvalue(), DataError)
