"""What the rows of `benchmarks.adaptation` say: methods against one another, and each with ABL against itself without.

    python -m benchmarks.adaptation_result ROWS... [--figure FIGURE] [--clean] [--baseline LIST] [--versus ARM]
        [--plot FILE]

Rows of one stream. Prints Markdown tables: the figure (`error`, `class_error` or `ece`, %) of every method on every
model, a mean over the corrupted domains of the finished streams (with `--clean` over the clean ones instead), with its
95 % t interval over the seeds; the same minus that of each method of `--baseline`, paired by seed; with `--versus`,
minus that on the model of the same scheme quantized so; and, where there are arms of `abl`, minus the same method
without, and the mean of these differences over models and methods. `--plot` draws the first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.adaptation_choice import arms_by_settings, settings_of
from benchmarks.quantization_choice import BASE, arms_by_flags, flags_of
from benchmarks.quantization_result import TTAQ, text
from ttaq.errors import CheckpointError
from ttaq.eval.plot_style import clean, legend, save, style
from ttaq.eval.rows import read_rows
from ttaq.eval.stream import CLEAN, differing_flags
from ttaq.eval.student_t import Interval, t_interval

OFF, BASELINE = "off", "norm"
FIGURES = {"error": "error, %", "class_error": "mean error of the classes, %", "ece": "ECE, %"}

Line = tuple[str, str]
"""Method and arm of `abl`."""
Key = tuple[str, Line]
"""Model and line."""
Cells = dict[Key, dict[int, float]]
"""The figure of each seed."""


def is_corrupted(domain: str) -> bool:
    """By the name of a domain."""
    return domain != CLEAN


def is_clean(domain: str) -> bool:
    """By the name of a domain."""
    return domain == CLEAN


def cells_of(rows: list[dict[str, Any]], figure: str, counts: Callable[[str], bool] = is_corrupted) -> Cells:
    """Of finished streams, over the domains that count: models in the order of the rows, methods in that of their first
    rows, without ABL first."""
    quantized, balanced = arms_by_flags(BASE), arms_by_settings()
    networks = {row["model"] for row in rows}
    settings: dict[str, dict[str, set[str]]] = {}
    for row in rows:
        for name, value in row["options"].items():
            if not name.startswith("abl"):
                settings.setdefault(row["method"], {}).setdefault(name, set()).add(str(value))

    def place(row: dict[str, Any]) -> tuple[str, Line, int]:
        model = row["scheme"]
        if row["quantization"]:
            arm = quantized[flags_of(row["quantization"])]
            model += f" {'ttaq' if arm == TTAQ else arm}"
        if len(networks) > 1:
            model = f"{row['model']} {model}"
        unguarded = row["counters"].get("updates") and "guards" not in row
        method = row["method"] + (", no guards" if unguarded else "")
        for name, values in settings.get(row["method"], {}).items():
            if len(values) > 1:  # As ttaq report names it: by the options in which its rows differ.
                method += f", {name}={row['options'][name]}"
        return model, (method, balanced[settings_of(row["options"])]), row["seed"]

    summaries = [row for row in rows if row["kind"] == "summary"]
    if not summaries:
        raise CheckpointError("the rows hold no finished stream; run benchmarks.adaptation to the end of one first")
    domains: dict[tuple[str, Line, int], dict[int, float]] = {place(row): {} for row in summaries}
    for row in rows:
        if flags := differing_flags(summaries[0]["stream"], row["stream"]):
            raise CheckpointError(f"rows of different streams: {'; '.join(flags)}; give each stream a call of its own")
        key = place(row)
        if row["kind"] != "domain" or key not in domains or not counts(row["domain"]):
            continue
        if domains[key].setdefault(row["index"], row[figure]) != row[figure]:
            model, line, seed = key
            raise CheckpointError(f"two results for {model}, {', '.join(line)}, seed {seed}: remove one")
    if not all(domains.values()):
        raise CheckpointError("a stream has none of the domains that this figure is of")
    found: Cells = {}
    for (model, line, seed), values in domains.items():
        found.setdefault((model, line), {})[seed] = mean(values.values())
    methods, arms = list(dict.fromkeys(line[0] for _, line in found)), list(balanced.values())
    return dict(sorted(found.items(), key=lambda item: (methods.index(item[0][1][0]), arms.index(item[0][1][1]))))


def name_of(line: Line) -> str:
    """As it stands in the tables."""
    method, arm = line
    return f"`{method}`" if arm == OFF else f"`{method}`, {arm}"


def table(cells: Cells, title: str, minus: Callable[[Key], Key] | None = None) -> list[str]:
    """Methods down and models across, or the other way round where there are more models; minus what `minus` names, if
    it names anything else."""
    wanted = [key for key in cells if minus is None or minus(key) != key]
    models, lines = list(dict.fromkeys(key[0] for key in wanted)), list(dict.fromkeys(key[1] for key in wanted))

    def cell(key: Key) -> str:
        return text(cells.get(key), None if minus is None else cells.get(minus(key), {}))

    rows = {name_of(line): {model: cell((model, line)) for model in models} for line in lines}
    if len(models) > len(lines):
        rows = {model: {name: row[model] for name, row in rows.items()} for model in models}
    columns = list(next(iter(rows.values())))
    head = [f"| {title} | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    return head + [f"| {name} | {' | '.join(row.values())} |" for name, row in rows.items()]


def means_over_cells(cells: Cells) -> list[str]:
    """What each arm changes: mean over those models and methods that have the most seeds, paired by seed."""
    found: dict[str, list[dict[int, float]]] = {}
    for (model, (method, arm)), seeds in cells.items():
        without = cells.get((model, (method, OFF)), {})
        if arm != OFF:
            found.setdefault(arm, []).append(
                {seed: value - without[seed] for seed, value in seeds.items() if seed in without}
            )
    lines = ["| mean of these | cells | change |", "|---|---:|---:|"]
    for arm, every in found.items():
        most = max(map(len, every))
        changes = [change for change in every if len(change) == most]
        common = sorted(set.intersection(*map(set, changes)))
        means = {seed: mean(change[seed] for change in changes) for seed in common}
        lines.append(f"| {arm} | {len(changes)} | {text(means, dict.fromkeys(means, 0.0))} |")
    return lines


def baselines_of(cells: Cells, wanted: str | None) -> list[str]:
    """The methods that the others are compared with: those of the flag, or `norm` where there is such a row."""
    methods = {method for _, (method, arm) in cells if arm == OFF}
    found = wanted.split(",") if wanted else [BASELINE] if BASELINE in methods else []
    for baseline in found:
        if baseline not in methods:
            raise SystemExit(f"--baseline: no row is of {baseline!r} without ABL, only of {', '.join(sorted(methods))}")
    return found


def plot(cells: Cells, title: str, path: Path) -> None:
    """A row for each method and arm and a mark for each model, or the other way round where there are more models; the
    best on top by the mean of its marks."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(model for model, _ in cells))
    across = len(models) <= len({line for _, line in cells})
    means: dict[tuple[str, str], Interval] = {}
    """By row and mark."""
    for (model, line), seeds in cells.items():
        name = name_of(line).replace("`", "")
        means[(name, model) if across else (model, name)] = t_interval([*seeds.values()])
    rows, marks = (list(dict.fromkeys(key[place] for key in means)) for place in (0, 1))
    rows.sort(key=lambda row: mean(interval.mean for key, interval in means.items() if key[0] == row), reverse=True)
    figure = Figure(figsize=(7.5, 0.3 * len(rows) + 1.6), dpi=130, layout="constrained")
    panel = figure.subplots()
    clean(panel)
    for number, mark in enumerate(marks):
        own = [(place, means[row, mark]) for place, row in enumerate(rows) if (row, mark) in means]
        panel.errorbar(
            [interval.mean for _, interval in own],
            [place + 0.5 * ((number + 0.5) / len(marks) - 0.5) for place, _ in own],
            xerr=[interval.half or 0.0 for _, interval in own],
            linestyle="none",
            capsize=2,
            label=mark,
            **style(number),
        )
    panel.set_yticks(range(len(rows)), rows)
    panel.set_xlabel(title)
    legend(figure, *panel.get_legend_handles_labels())
    save(figure, path, "adaptation_result")


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The flags that tables of adaptation share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--figure", choices=FIGURES, default="error")
    parser.add_argument("--baseline", help="methods that the others are compared with; norm where there is such a row")
    parser.add_argument("--plot", type=Path, help="file to draw the figure to")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Read the rows and print the tables."""
    parser = parser_of(__doc__)
    parser.add_argument("--versus", metavar="ARM", help="quantization that those of the same scheme are compared with")
    parser.add_argument("--clean", action="store_true", help="of the clean domains instead of the corrupted ones")
    args = parser.parse_args(arguments)
    cells = cells_of(
        [row for path in args.rows for row in read_rows(path)], args.figure, is_clean if args.clean else is_corrupted
    )
    title = f"clean {FIGURES[args.figure]}" if args.clean else FIGURES[args.figure]
    tables = [table(cells, title)]
    without = {key: seeds for key, seeds in cells.items() if key[1][1] == OFF}
    if len({method for _, (method, _) in without}) > 1:
        for baseline in baselines_of(cells, args.baseline):
            tables.append(table(without, f"minus `{baseline}`", lambda key, name=baseline: (key[0], (name, OFF))))
    if args.versus:

        def versus(key: Key) -> Key:
            other = (f"{key[0].rpartition(' ')[0]} {args.versus}", key[1])
            return other if other in cells else key

        if all(versus(key) == key for key in cells):
            models = ", ".join(dict.fromkeys(model for model, _ in cells))
            raise SystemExit(f"--versus: no two models of one scheme, one of them by {args.versus!r}, only {models}")
        tables.append(table(cells, f"minus {args.versus}", versus))
    if len(without) < len(cells):
        tables.append(table(cells, "minus the same without ABL", lambda key: (key[0], (key[1][0], OFF))))
        tables.append(means_over_cells(cells))
    print("\n\n".join("\n".join(each) for each in tables))
    if args.plot is not None:
        plot(cells, title, args.plot)


if __name__ == "__main__":
    main()
