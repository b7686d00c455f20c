"""Tables from the results of `python -m benchmarks.run` and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ttaq.errors import CheckpointError
from ttaq.eval.table import table

__all__ = ["kernel_markdown", "read_kernel_rows"]

Row = dict[str, Any]
_MADE_WITH = ("device", "driver", "cuda", "torch", "triton", "source")
_CASE = ("shape", "model", "dtype", "layout", "direction", "variant")
_REQUIRED = (*_MADE_WITH, *_CASE, "op", "impl", "p50_us", "bytes")
_ALWAYS = ("ttaq", "eager", "compile")
_KNOWN = (*_ALWAYS, "torch")
_NOT_MEASURED = "not measured"
_INTRODUCTION = (
    "Median time of a call in µs; `forward` is without gradients, `step` forward and backward. In parentheses the time "
    "divided by that of ttaq: above 1, ttaq is faster. `eager` is the same in plain torch ops, `compile` that under "
    "torch.compile, `torch` the op that torch itself has; other columns are public kernels.",
    "MB is what a call must read and write at least, the floor is the time that moving it takes at the bandwidth of "
    "the device, and `of floor` the floor divided by ttaq's time. The max error is the largest absolute difference of "
    "ttaq's result from plain torch ops in a wide type; exact: result and gradients agree bit for bit once rounded to "
    "their type. What was not run, or does not exist, is not measured. Results of different devices, versions or code "
    "stand in different sections; times of different sections are not compared.",
)


def read_kernel_rows(path: Path) -> list[Row]:
    """All rows of a results file; lines that were cut off by a kill are left out.

    Raises:
        CheckpointError: the file is missing, or holds something else.
    """
    if not path.is_file():
        raise CheckpointError(f"read_kernel_rows: {path} is not a file, expected results of python -m benchmarks.run")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            if line.startswith('{"op"'[: len(line)]):
                continue
            row = None
        missing = [key for key in _REQUIRED if key not in row] if isinstance(row, dict) else ["an object"]
        if missing:
            raise CheckpointError(
                f"read_kernel_rows: line {number} of {path} is not a result of python -m benchmarks.run "
                f"(it lacks {missing[0]}); choose another file"
            )
        rows.append(row)
    return rows


def kernel_markdown(rows: Sequence[Row]) -> str:
    """Per device, versions and code a section, in it per op a table with a line per shape.

    Of two results for the same call in one section the later one counts.

    Raises:
        CheckpointError: no rows.
    """
    if not rows:
        raise CheckpointError("report: the files hold no results; run python -m benchmarks.run first")
    sections: dict[str, list[Row]] = {}
    for row in rows:
        sections.setdefault(json.dumps([row[key] for key in _MADE_WITH]), []).append(row)
    extra = [impl for impl in dict.fromkeys(row["impl"] for row in rows) if impl not in _KNOWN]
    parts = ["# Times of the kernels", *_INTRODUCTION]
    for section in sections.values():
        parts += _caption(section)
        for op in dict.fromkeys(row["op"] for row in section):
            parts += [f"### {op}", *_op([row for row in section if row["op"] == op], extra)]
    return "\n\n".join(parts) + "\n"


def _caption(section: list[Row]) -> list[str]:
    first = section[0]
    versions = {"torch": first["torch"], "triton": first["triton"], "CUDA": first["cuda"], "driver": first["driver"]}
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    commits = dict.fromkeys(str(row["git_sha"])[:12] for row in section if row.get("git_sha"))
    days = sorted({str(row["date"])[:10] for row in section if row.get("date")})
    words = [
        known,
        f"code {first['source']}" + (f" (commit {', '.join(commits)})" if commits else ""),
        f"measured {' to '.join(dict.fromkeys([days[0], days[-1]]))}" if days else "",
    ]
    return [f"## {first['device']}, code {first['source']}", "; ".join(filter(None, words)) + "."]


def _op(rows: list[Row], extra: list[str]) -> list[str]:
    cases: dict[str, dict[str, Row]] = {}
    repeated = 0
    for row in rows:
        case = cases.setdefault(json.dumps([row[key] for key in _CASE]), {})
        other = case.get(row["impl"])
        repeated += other is not None
        if other is None or str(row.get("date")) >= str(other.get("date")):
            case[row["impl"]] = row
    seen = {row["impl"] for row in rows}
    baselines = [*_ALWAYS[1:], *(impl for impl in ("torch", *extra) if impl in seen)]
    pairs = [(case["ttaq"], row) for case in cases.values() if "ttaq" in case for row in case.values()]
    notes = [f"- {_name(row)}, {row['impl']}: {row['note']}" for case in cases.values() for row in _noted(case)]
    if any(not _same_timer(*pair) for pair in pairs):
        notes.append("- † timed in another way than ttaq (with its launches, or without), so no ratio")
    if repeated:
        notes.append(f"- measured again: {repeated}; of two results the later one counts")
    header = ["shape", "model", "type", "layout", "pass", "ttaq µs", *(f"{impl} µs" for impl in baselines)]
    lines = [_line(case, baselines) for case in cases.values()]
    return [table([*header, "MB", "of floor", "max error"], lines), *(["\n".join(notes)] if notes else [])]


def _line(case: dict[str, Row], baselines: list[str]) -> list[str]:
    any_row, ours = next(iter(case.values())), case.get("ttaq")
    fraction = None if ours is None else ours.get("frac_of_floor")
    error = None if ours is None else ours.get("max_abs_err")
    exact = ours is not None and ours.get("exact")
    return [
        "x".join(map(str, any_row["shape"])),
        any_row["model"],
        any_row["dtype"],
        any_row["layout"],
        ", ".join(filter(None, [any_row["direction"], any_row["variant"]])),
        _NOT_MEASURED if ours is None or ours["p50_us"] is None else _microseconds(ours["p50_us"]),
        *(_against(case.get(impl), ours) for impl in baselines),
        f"{any_row['bytes'] / 1e6:.3g}",
        _NOT_MEASURED if fraction is None else f"{100 * fraction:.0f} %",
        "exact" if exact else _NOT_MEASURED if error is None else f"{error:.1e}" if error else "0",
    ]


def _against(row: Row | None, ours: Row | None) -> str:
    if row is None or row["p50_us"] is None:
        return _NOT_MEASURED
    time = _microseconds(row["p50_us"])
    if ours is None or not ours["p50_us"]:
        return time
    return f"{time} ({row['p50_us'] / ours['p50_us']:.2f})" if _same_timer(ours, row) else f"{time} †"


def _same_timer(one: Row, other: Row) -> bool:
    return None in (one["p50_us"], other["p50_us"]) or one.get("timer") == other.get("timer")


def _noted(case: dict[str, Row]) -> list[Row]:
    return [row for row in case.values() if row.get("note")]


def _name(row: Row) -> str:
    words = ["x".join(map(str, row["shape"])), *(row[key] for key in _CASE[1:])]
    return " ".join(filter(None, words))


def _microseconds(time: float) -> str:
    return f"{time:.2f}" if time < 10 else f"{time:.1f}" if time < 1000 else f"{time:.0f}"
