"""What the rule of adaptation.toml says of the rows of `benchmarks.adaptation --table abl`.

    python -m benchmarks.adaptation_choice ROWS/abl_iid.jsonl ROWS/abl_dirichlet01.jsonl ROWS/abl_tail.jsonl

Prints for every arm the change that it makes to the mean per-class error (points, negative is better), paired by model,
method and seed: on each stream, and on those that the figure of the rule is the mean of; as a Markdown table.
"""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.adaptation import PLAN
from ttaq.eval.rows import read_rows
from ttaq.eval.stream import parse_description

DECIDING = ("dirichlet01", "tail")
MOST_ON_IID = 0.3  # points
_OPTIONS = {"abl": None, "abl_loss": "soft", "abl_weight": 1.0, "abl_answer": 0.0}

Cell = tuple[str, str, int]
"""Scheme, method and seed."""
Errors = dict[str, dict[str, dict[Cell, float]]]
"""By stream and arm."""


def settings_of(options: dict[str, Any]) -> tuple[Any, ...]:
    """What tells arms apart, of the options of a row or of an arm."""
    return tuple(options.get(name, default) for name, default in _OPTIONS.items())


def stream_of(description: str) -> str:
    """The name that the plan gives to a stream."""
    flags = parse_description(description)
    if flags["tail"] != "none":
        return "tail"
    return "iid" if flags["delta"] == "none" else f"dirichlet{flags['delta'].replace('.', '')}"


def arms_by_settings() -> dict[tuple[Any, ...], str]:
    """The arm that options belong to, in the order of the plan."""
    plan = tomllib.loads(PLAN.read_text())["abl"]
    names = {settings_of(settings): arm for arm, settings in plan["loss"].items()}
    for base, settings in plan["loss"].items():
        for answer, own in plan["answer"].items():
            if settings:
                names[settings_of({**settings, **own})] = f"{base}+{answer}"
    return names


def errors_of(rows: list[dict[str, Any]]) -> Errors:
    """The mean per-class error of every cell, from the summaries; arms in the order of the plan."""
    names = arms_by_settings()
    found: Errors = {}
    for row in rows:
        if row["kind"] == "summary":
            arms = found.setdefault(stream_of(row["stream"]), {})
            cells = arms.setdefault(names[settings_of(row["options"])], {})
            cells[row["scheme"], row["method"], row["seed"]] = row["class_error"]
    order = [*names.values()]
    return {stream: dict(sorted(arms.items(), key=lambda arm: order.index(arm[0]))) for stream, arms in found.items()}


def change(errors: Errors, arm: str, stream: str) -> float | None:
    """Of the error on a stream, by this arm against none, over the cells that both have."""
    arms = errors.get(stream, {})
    own, off = arms.get(arm, {}), arms.get("off", {})
    both = own.keys() & off.keys()
    return mean(own[cell] - off[cell] for cell in both) if both else None


def figure(errors: Errors, arm: str) -> float | None:
    """What the rule compares; None while a stream has not run."""
    changes = [change(errors, arm, stream) for stream in DECIDING]
    return None if None in changes else mean(value for value in changes if value is not None)


def chosen(errors: Errors, arms: list[str]) -> str | None:
    """The arm with the lowest figure among those that cost little where nothing is imbalanced, and were not left after
    the first seeds."""
    counts = {arm: sum(len(of_stream.get(arm, {})) for of_stream in errors.values()) for arm in arms}
    figures = {}
    for arm in (arm for arm in arms if counts[arm] == max(counts.values())):
        of_iid, own = change(errors, arm, "iid"), figure(errors, arm)
        if of_iid is not None and own is not None and of_iid < MOST_ON_IID:
            figures[arm] = own
    return min(figures, key=lambda arm: figures[arm]) if figures else None


def main() -> None:
    """Read the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+")
    errors = errors_of([row for path in parser.parse_args().rows for row in read_rows(path)])
    arms = list(dict.fromkeys(arm for of_stream in errors.values() for arm in of_stream if arm != "off"))
    streams = ["iid", *DECIDING]
    print(f"| arm | {' | '.join(streams)} | figure | cells | |")
    print(f"|---|{'---:|' * (len(streams) + 2)}---|")
    losses = chosen(errors, [arm for arm in arms if "+" not in arm])
    best = chosen(errors, arms)
    for arm in arms:
        values = [*(change(errors, arm, stream) for stream in streams), figure(errors, arm)]
        cells = "/".join(str(len(errors.get(stream, {}).get(arm, {}))) for stream in streams)
        said = ", ".join(name for name, which in (("best loss", losses), ("chosen", best)) if which == arm)
        print(f"| {arm} | {' | '.join('-' if v is None else f'{v:+.2f}' for v in values)} | {cells} | {said} |")


if __name__ == "__main__":
    main()
