"""Tables from row files and nothing else: means with t intervals over seeds and paired differences to a baseline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from ttaq.errors import CheckpointError
from ttaq.eval.rows import Row, cell_of, check_one_stream
from ttaq.eval.stream import parse_description
from ttaq.eval.student_t import Interval, t_interval

__all__ = ["Entry", "Report", "build_report"]

_Key = tuple[str, str, int]


@dataclass(frozen=True)
class Entry:
    """One method on one group of models: its complete seeds, with the rows of each by domain order."""

    group: str
    method: str
    rows: dict[int, list[Row]]
    incomplete: dict[int, int]
    """Domains done so far of the seeds that are not complete, which no figure uses."""

    def means(self, key: str = "error") -> dict[int, float]:
        """Per seed the mean of `key` over the domains."""
        return {seed: sum(row[key] for row in rows) / len(rows) for seed, rows in self.rows.items()}

    def mean(self, key: str = "error") -> Interval | None:
        """Interval over seeds of the mean over domains; None without a complete seed."""
        values = list(self.means(key).values())
        return t_interval(values) if values else None

    def domain(self, index: int) -> Interval | None:
        """Interval over seeds of the error of one domain."""
        values = [rows[index]["error"] for rows in self.rows.values()]
        return t_interval(values) if values else None

    def calibration_seeds(self) -> set[int | None]:
        """The seeds that drew the calibration images of its models."""
        return {rows[0].get("calibration_seed") for rows in self.rows.values()}

    def against(self, baseline: Entry) -> Interval | None:
        """Interval over the seeds that both have of (this mean over domains - the baseline's); None without one."""
        mine, other = self.means(), baseline.means()
        values = [mine[seed] - other[seed] for seed in mine if seed in other]
        return t_interval(values) if values else None


@dataclass(frozen=True)
class Report:
    """All entries of one stream, in order of first appearance."""

    stream: dict[str, str]
    """The flags of the stream without the seed."""
    seeds: tuple[int, ...]
    groups: tuple[str, ...]
    methods: tuple[str, ...]
    baseline: str
    entries: dict[tuple[str, str], Entry]
    made_with: tuple[str, ...]
    """Every combination of versions and device in the rows."""

    @property
    def domains(self) -> list[str]:
        """The corruptions in order."""
        return self.stream["corruptions"].split(",")


def build_report(rows: Sequence[Row], baseline: str = "source") -> Report:
    """Arrange rows by group of models, method, seed and domain.

    A group is an architecture, a scheme and a quantization method with its flags, without the calibration seed: a seed
    of the stream has one model in each group, so that seeds are independent repetitions.

    Args:
        rows: rows of any number of files.
        baseline: method that the paired differences refer to.

    Raises:
        CheckpointError: no domain rows, streams that differ in more than the seed, two different results for one
            domain, or two models of one group on the same seed.
    """
    found = [row for row in rows if row["kind"] == "domain"]
    if not found:
        raise CheckpointError("report: the row files hold no finished domain; run ttaq adapt first")
    check_one_stream([row["stream"] for row in found], "report")
    names = _method_names(found)
    cells: dict[_Key, dict[int, Row]] = {}
    for row in found:
        key = (_group(row), names[_variant(row)], row["seed"])
        cell = cells.setdefault(key, {})
        other = next(iter(cell.values()), row)
        if cell_of(other) != cell_of(row):
            raise CheckpointError(
                f"report: {key[0]}, {key[1]}, seed {key[2]} was run on two models ({other['model_hash'][:12]} and "
                f"{row['model_hash'][:12]}); a seed takes one model per group: report the models in separate calls"
            )
        if cell.get(row["index"], row)["error"] != row["error"]:
            raise CheckpointError(
                f"report: {key[0]}, {key[1]}, seed {key[2]} has two different results for {row['domain']}; remove one"
            )
        cell[row["index"]] = row
    return _arrange(found, cells, baseline)


def _arrange(found: list[Row], cells: dict[_Key, dict[int, Row]], baseline: str) -> Report:
    stream = parse_description(found[0]["stream"])
    del stream["seed"]
    count = len(stream["corruptions"].split(","))
    entries: dict[tuple[str, str], Entry] = {}
    for (group, method, seed), cell in sorted(cells.items(), key=lambda item: item[0][2]):
        entry = entries.setdefault((group, method), Entry(group, method, {}, {}))
        if len(cell) == count:
            entry.rows[seed] = [cell[index] for index in range(count)]
        else:
            entry.incomplete[seed] = len(cell)
    methods = tuple(dict.fromkeys(method for _, method, _ in cells))
    if baseline not in methods:
        raise CheckpointError(f"report: no rows of the baseline {baseline!r}, the files have: {', '.join(methods)}")
    return Report(
        stream=stream,
        seeds=tuple(sorted({seed for _, _, seed in cells})),
        groups=tuple(dict.fromkeys(group for group, _, _ in cells)),
        methods=methods,
        baseline=baseline,
        entries=entries,
        made_with=tuple(dict.fromkeys(_made_with(row) for row in found)),
    )


def _group(row: Row) -> str:
    quantization = row.get("quantization")
    return f"{row['model']}, {row['scheme']}" + (f", {quantization}" if quantization else "")


def _variant(row: Row) -> str:
    return json.dumps([row["method"], row["options"]], sort_keys=True)


def _method_names(rows: list[Row]) -> dict[str, str]:
    """A name for each method with its options: the options in which its variants differ are added in parentheses."""
    variants: dict[str, dict[str, dict[str, object]]] = {}
    for row in rows:
        variants.setdefault(row["method"], {})[_variant(row)] = row["options"]
    names = {}
    for method, by_variant in variants.items():
        keys = sorted({key for options in by_variant.values() for key in options})
        differing = [key for key in keys if len({str(options.get(key)) for options in by_variant.values()}) > 1]
        for variant, options in by_variant.items():
            values = ", ".join(f"{key}={options.get(key)}" for key in differing)
            names[variant] = f"{method} ({values})" if values else method
    return names


def _made_with(row: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    return f"{versions}; {row['device']}, {row.get('threads', '?')} threads"
