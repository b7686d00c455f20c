"""What the rule of quantization.toml says of the rows of `benchmarks.quantization --stage choose`.

    python -m benchmarks.quantization_choice benchmarks/results/quantization_choose.jsonl

Prints for each arm its error (%, mean of `norm` and `tent`) by scheme, and the paired difference to the base by seed,
averaged over the schemes that both have; as a Markdown table, with what the rule makes of it.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.quantization import PLAN, arms
from ttaq.eval.rows import read_rows
from ttaq.ptq.entry import settings_of

SCHEMES = ("W2A4", "W2A2", "W3A3")
METHODS = ("norm", "tent")
BASE = "batch_affine_keep_1"
"""What the arms of `parts` change, by step 1 of the rule."""
_NOT_OF_THE_ARM = {"calibration", "iterations", "rounding_penalty", "scale_lr", "search", "weight_lr"}

Cells = dict[tuple[str, int], float]
"""Error by scheme and seed."""


def flags_of(quantization: str) -> tuple[str, frozenset[tuple[str, str]]]:
    """`qdrop(augment=0.5,...)` as the method and those flags that belong to an arm; TTAQ is QDrop with flags."""
    method, _, rest = quantization.removesuffix(")").partition("(")
    method = "qdrop" if method == "ttaq" else method
    flags = dict(re.findall(r"(\w+)=([^,]*)", rest))
    return method, frozenset((name, value) for name, value in flags.items() if name not in _NOT_OF_THE_ARM)


def flags_of_arm(settings: dict[str, Any]) -> tuple[str, frozenset[tuple[str, str]]]:
    """The same of an arm of the plan, with what its method sets by itself."""
    method = settings["method"]
    own = {name: value for name, value in settings.items() if name != "method"}
    training = None if method == "float" else settings_of(method, settings=own)
    changed = {} if training is None else training.changed()
    return method, frozenset((name, str(value)) for name, value in changed.items() if name not in _NOT_OF_THE_ARM)


def arms_by_flags(base: str) -> dict[tuple[str, frozenset[tuple[str, str]]], str]:
    """The arm that flags belong to, in the order of the plan."""
    plan = tomllib.loads(PLAN.read_text())
    found = arms([name for section in plan.values() for name in section], base)
    return {flags_of_arm(settings): arm for arm, settings in found.items()}


def cells_by_arm(rows: list[dict[str, Any]], base: str) -> dict[str, Cells]:
    """For every arm of the plan that has rows, in the order of the plan."""
    names = arms_by_flags(base)
    errors: dict[str, dict[tuple[str, int, str], float]] = {arm: {} for arm in names.values()}
    for row in rows:
        if row["kind"] == "summary":
            arm = names[flags_of(row["quantization"])]
            errors[arm][row["scheme"], row["seed"], row["method"]] = row["error"]
    cells: dict[str, Cells] = {}
    for arm, own in errors.items():
        for scheme, seed in sorted({key[:2] for key in own}):
            values = [own.get((scheme, seed, method)) for method in METHODS]
            if None not in values:
                cells.setdefault(arm, {})[scheme, seed] = mean(value for value in values if value is not None)
    return cells


def differences(cells: Cells, base: Cells) -> dict[int, float]:
    """Per seed the mean over the schemes of this minus the base."""
    both = cells.keys() & base.keys()
    return {
        seed: mean(cells[key] - base[key] for key in both if key[1] == seed)
        for seed in sorted({key[1] for key in both})
    }


def verdict(cells: Cells, base: Cells) -> str:
    """Of an arm of `parts`."""
    found = differences(cells, base)
    if not cells.keys() >= {(scheme, 0) for scheme in SCHEMES}:
        return "seed 0 not complete"
    if found[0] >= 0:
        return "out after seed 0"
    if cells.keys() < base.keys():
        return "open"
    return "taken over" if all(value < 0 for value in found.values()) and mean(found.values()) < 0 else "out"


def main() -> None:
    """Read the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--base", default=BASE, help="what `parts` change")
    args = parser.parse_args()
    cells = cells_by_arm(read_rows(args.rows), args.base)
    parts = tomllib.loads(PLAN.read_text())["parts"]
    print(f"| arm | {' | '.join(SCHEMES)} | seeds | minus {args.base}, by seed | |")
    print(f"|---|{'---:|' * (len(SCHEMES) + 2)}---|")
    for arm, own in cells.items():
        by_scheme = {scheme: [value for (of, _), value in own.items() if of == scheme] for scheme in SCHEMES}
        figures = [f"{mean(values):.2f}" if values else "-" for values in by_scheme.values()]
        seeds = "/".join(str(len(values)) for values in by_scheme.values())
        by_seed = ", ".join(f"{value:+.2f}" for value in differences(own, cells[args.base]).values())
        said = verdict(own, cells[args.base]) if arm in parts else "base" if arm == args.base else ""
        print(f"| {arm} | {' | '.join(figures)} | {seeds} | {'' if arm == args.base else by_seed} | {said} |")


if __name__ == "__main__":
    main()
