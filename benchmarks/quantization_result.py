"""What the rows of `benchmarks.quantization` say: errors by scheme, arm and method, and the claim.

    python -m benchmarks.quantization_result ROWS... [--arms LIST] [--claim ARM] [--against ARM] [--plot FILE]

Prints two Markdown tables. The first has the mean error (%) of every arm under every method, with its 95 % t interval
over the seeds. The second has, paired by seed, the claimed arm minus the one it is to beat, and minus the float model
under the same method, where there is anything to compare. `--plot` draws the first.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from benchmarks.quantization_choice import BASE, arms_by_flags, flags_of
from ttaq.eval.plot_style import clean, legend, save, style
from ttaq.eval.rows import read_rows
from ttaq.eval.student_t import t_interval

TTAQ = "distillation"
"""The arm that became TTAQ."""
Errors = dict[tuple[str, str, str], dict[int, float]]
"""By scheme, arm and method: the error of each seed."""


def errors_of(rows: list[dict[str, Any]], base: str) -> Errors:
    """From the summaries, arms in the order of the plan, with their steps where the rows are of several numbers."""
    names = arms_by_flags(base)
    steps = {count for row in rows for count in re.findall(r"iterations=(\d+)", row.get("quantization") or "")}
    found: Errors = {}
    for row in rows:
        if row["kind"] == "summary":
            floating = row["scheme"] == "float"
            arm = "float" if floating else names[flags_of(row["quantization"])]
            if len(steps) > 1 and (count := re.search(r"iterations=(\d+)", row["quantization"] or "")):
                arm += f", {count[1]} steps"
            seeds = found.setdefault((row["scheme"], arm, row["method"]), {})
            if seeds.setdefault(row["seed"], row["error"]) != row["error"]:
                raise SystemExit(f"two results for {row['scheme']}, {arm}, {row['method']}, seed {row['seed']}")
    places = list(names.values())

    def place(key: tuple[str, str, str]) -> tuple[Any, ...]:
        scheme, arm, method = key
        name, *count = re.split(", | steps", arm)
        return scheme != "float", places.index(name), int(count[0]) if count else 0, method

    return {key: found[key] for key in sorted(found, key=place)}


def schemes_of(errors: Errors) -> list[str]:
    """From many bits to few."""
    found = {scheme for scheme, _, _ in errors} - {"float"}
    return sorted(found, key=lambda scheme: (-sum(int(digit) for digit in scheme if digit.isdigit()), scheme))


def text(values: dict[int, float] | None, less: dict[int, float] | None = None) -> str:
    """Mean and interval, of the differences where `less` is given; with the number of seeds."""
    if not values or (less is not None and not values.keys() & less.keys()):
        return "not run"
    numbers = [v - less[s] for s, v in values.items() if s in less] if less is not None else [*values.values()]
    return f"{t_interval(numbers).text(signed=less is not None)} (n = {len(numbers)})"


def errors_table(errors: Errors, schemes: list[str]) -> list[str]:
    """A line for each arm and method, a column for each scheme; that of the float model has its error in all."""
    lines = [f"| quantized by | adapted by | {' | '.join(schemes)} |", f"|---|---|{'---:|' * len(schemes)}"]
    for arm, method in dict.fromkeys((arm, method) for _, arm, method in errors):
        figures = [text(errors.get(("float" if arm == "float" else scheme, arm, method))) for scheme in schemes]
        lines.append(f"| {arm} | {method} | {' | '.join(figures)} |")
    return lines


def claim_table(errors: Errors, schemes: list[str], claim: str, against: str) -> list[str]:
    """Negative is better than `against`; what is above the float model is what is left to gain."""
    lines = [f"| scheme | adapted by | {claim} minus {against} | {claim} minus float |", "|---|---|---:|---:|"]
    for scheme in schemes:
        for method in dict.fromkeys(method for of, arm, method in errors if (of, arm) == (scheme, claim)):
            own = errors[scheme, claim, method]
            others = errors.get((scheme, against, method), {}), errors.get(("float", "float", method), {})
            lines.append(f"| {scheme} | {method} | {' | '.join(text(own, other) for other in others)} |")
    return lines


def plot(errors: Errors, schemes: list[str], path: Path) -> None:
    """A panel for each method, a group of marks for each scheme, and the float model as a line."""
    from matplotlib.figure import Figure

    methods = [*dict.fromkeys(method for _, _, method in errors)]
    names = [*dict.fromkeys(arm for scheme, arm, _ in errors if scheme != "float")]
    figure = Figure(figsize=(4.6 * len(methods), 4.2), dpi=130, layout="constrained")
    for panel, method in zip(figure.subplots(1, len(methods), sharey=True, squeeze=False)[0], methods, strict=True):
        clean(panel)
        for number, arm in enumerate(names):
            cells = [errors.get((scheme, arm, method)) for scheme in schemes]
            found = [(x, t_interval([*cell.values()])) for x, cell in enumerate(cells) if cell]
            places = [x + 0.7 * ((number + 0.5) / len(names) - 0.5) for x, _ in found]
            means, halves = [i.mean for _, i in found], [i.half or 0.0 for _, i in found]
            panel.errorbar(places, means, halves, linestyle="none", capsize=2, label=arm, **style(number))
        if ("float", "float", method) in errors:
            level = t_interval([*errors["float", "float", method].values()]).mean
            panel.axhline(level, color="0.4", linestyle="--", label="float")
        panel.set_xticks(range(len(schemes)), schemes)
        panel.set_title(f"adapted by {method}")
    figure.axes[0].set_ylabel("error (%)")
    legend(figure, *figure.axes[0].get_legend_handles_labels())
    save(figure, path, "quantization_result")


def main(arguments: list[str] | None = None) -> None:
    """Read the rows and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--base", default=BASE, help="what `parts` change")
    parser.add_argument("--arms", help="some of them, separated by commas")
    parser.add_argument("--claim", default=TTAQ, help="the arm that is TTAQ")
    parser.add_argument("--against", default="qdrop")
    parser.add_argument("--plot", type=Path, help="file to draw the errors to")
    args = parser.parse_args(arguments)
    errors = errors_of([row for path in args.rows for row in read_rows(path)], args.base)
    if args.arms:
        errors = {key: seeds for key, seeds in errors.items() if key[1] in args.arms.split(",")}
    schemes = schemes_of(errors)
    tables = errors_table(errors, schemes), claim_table(errors, schemes, args.claim, args.against)
    print("\n\n".join("\n".join(table) for table in tables if len(table) > 2))
    if args.plot is not None:
        plot(errors, schemes, args.plot)


if __name__ == "__main__":
    main()
