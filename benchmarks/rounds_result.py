"""What happens round by round, in streams that meet the same corruptions again and again.

    python -m benchmarks.rounds_result ROWS... [--figure FIGURE] [--baseline LIST] [--plot FILE]

Rows of `benchmarks.adaptation --table long`. Prints Markdown tables with a line for each round: the figure (`error`,
`class_error` or `ece`, %), a mean over the corrupted domains of the round, with its 95 % t interval over the seeds; the
same minus that of each method of `--baseline`, paired by seed; and, where there are arms of `abl`, minus the same
method without. `--plot` draws the first, over the seeds that all have: lines are means, shades the intervals.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.adaptation_result import (
    FIGURES,
    OFF,
    Cells,
    Key,
    baselines_of,
    cells_of,
    is_corrupted,
    name_of,
    parser_of,
)
from benchmarks.quantization_result import text
from ttaq.eval.plot_style import clean, legend, save, style
from ttaq.eval.rows import read_rows
from ttaq.eval.student_t import t_interval


def cells_by_round(rows: list[dict[str, Any]], figure: str) -> list[Cells]:
    """One after the other."""

    def belongs(number: int, domain: str) -> bool:
        name, _, own = domain.partition("#")  # That of round 1 has no number.
        return is_corrupted(name) and int(own or 1) == number

    rounds = {int(row["domain"].partition("#")[2] or 1) for row in rows if row["kind"] == "domain"}
    return [cells_of(rows, figure, partial(belongs, number)) for number in sorted(rounds)]


def column_name(key: Key, models: set[str]) -> str:
    """A method, and its model where there are several."""
    model, line = key
    return f"{model} {name_of(line)}" if len(models) > 1 else name_of(line)


def table(rounds: list[Cells], title: str, minus: Callable[[Key], Key] | None = None) -> list[str]:
    """Rounds down, methods across; minus what `minus` names, if it names anything else that has rows."""
    models = {model for model, _ in rounds[0]}
    keys = [key for key in rounds[0] if minus is None or (minus(key) != key and minus(key) in rounds[0])]
    lines = [f"| {title} | {' | '.join(column_name(key, models) for key in keys)} |", f"|---|{'---:|' * len(keys)}"]
    for number, cells in enumerate(rounds, 1):
        figures = [text(cells[key], None if minus is None else cells[minus(key)]) for key in keys]
        lines.append(f"| round {number} | {' | '.join(figures)} |")
    return lines


def plot(rounds: list[Cells], title: str, path: Path) -> None:
    """A line for each method on each model, over the seeds that all of them have."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.0), dpi=130, layout="constrained")
    panel = figure.subplots()
    clean(panel)
    numbers = np.arange(1, len(rounds) + 1)
    models = {model for model, _ in rounds[0]}
    common = sorted(set.intersection(*map(set, rounds[0].values())))
    if not common:
        raise SystemExit("--plot: there is no seed that all methods have run with; finish one first")
    for number, key in enumerate(rounds[0]):
        intervals = [t_interval([cells[key][seed] for seed in common]) for cells in rounds]
        means = np.array([interval.mean for interval in intervals])
        half = np.array([interval.half or 0.0 for interval in intervals])
        label = column_name(key, models).replace("`", "")
        panel.plot(numbers, means, markersize=4, linewidth=1.2, label=label, **style(number))
        panel.fill_between(numbers, means - half, means + half, color=style(number)["color"], alpha=0.12, linewidth=0)
    panel.set_xticks(numbers)
    panel.set_xlabel("round")
    panel.set_ylabel(title)
    legend(figure, *panel.get_legend_handles_labels())
    save(figure, path, "rounds_result")


def main(arguments: list[str] | None = None) -> None:
    """Read the rows and print the tables."""
    args = parser_of(__doc__).parse_args(arguments)
    rounds = cells_by_round([row for path in args.rows for row in read_rows(path)], args.figure)
    tables = [table(rounds, FIGURES[args.figure])]
    for baseline in baselines_of(rounds[0], args.baseline):
        tables.append(table(rounds, f"minus `{baseline}`", lambda key, name=baseline: (key[0], (name, OFF))))
    if any(arm != OFF for _, (_, arm) in rounds[0]):
        tables.append(table(rounds, "minus the same without ABL", lambda key: (key[0], (key[1][0], OFF))))
    print("\n\n".join("\n".join(each) for each in tables))
    if args.plot is not None:
        plot(rounds, FIGURES[args.figure], args.plot)


if __name__ == "__main__":
    main()
