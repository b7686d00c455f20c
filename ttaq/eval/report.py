"""Tables from row files and nothing else: means with t intervals over seeds and paired differences to a baseline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from ttaq.errors import CheckpointError
from ttaq.eval.breakdown import Breakdown, breakdown
from ttaq.eval.rows import Row, cell_of
from ttaq.eval.stream import differing_flags, parse_description
from ttaq.eval.student_t import Interval, t_interval

__all__ = ["Entry", "Report", "build_report"]

_Key = tuple[str, str, int]


@dataclass(frozen=True)
class Entry:
    """One method on one group of models: its complete seeds, with the rows of each by domain order."""

    group: str
    method: str
    rows: dict[int, list[Row]]
    incomplete: dict[int, tuple[int, int]]
    """Of the seeds that are not complete, which no figure uses: domains done so far, and domains of the stream."""

    def means(self, key: str = "error") -> dict[int, float]:
        """Per seed the mean of `key` over the domains."""
        return {seed: sum(row[key] for row in rows) / len(rows) for seed, rows in self.rows.items()}

    def mean(self, key: str = "error") -> Interval:
        """Interval over seeds of the mean over domains, of at least one complete seed."""
        return t_interval([*self.means(key).values()])

    def by_line(self, lines: Breakdown) -> dict[str, Interval]:
        """For each line of a table by domain the interval over seeds of its error; without a seed there is none."""
        seeds = [lines.errors(rows) for rows in self.rows.values()]
        values = {label: [errors[label] for errors in seeds if label in errors] for label in lines.labels}
        return {label: t_interval(found) for label, found in values.items() if found}

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
    comparisons: dict[str, tuple[str, ...]]
    """Per architecture with several groups: the baseline group, and the groups that are compared with it."""
    entries: dict[tuple[str, str], Entry]
    domains: tuple[str, ...]
    """The names of the domains in order; where a seed draws them, those of the first seed."""
    lines: Breakdown
    made_with: tuple[str, ...]
    """Every combination of versions and device in the rows."""

    def entry(self, group: str, method: str) -> Entry | None:
        """The entry, if it has a complete seed."""
        entry = self.entries.get((group, method))
        return entry if entry is not None and entry.rows else None


def build_report(rows: Sequence[Row], baseline: str = "source", baseline_group: str | None = None) -> Report:
    """Arrange rows by group of models, method, seed and domain.

    A group is an architecture, a scheme and a quantization method with its flags, without the calibration seed: a seed
    of the stream has one model in each group, so that seeds are independent repetitions.

    Args:
        rows: rows of any number of files.
        baseline: method that the paired differences between methods refer to.
        baseline_group: part of the name of the group that the paired differences between groups refer to; None takes
            the float group, or the first one where there is none. Groups of different architectures are not compared.

    Raises:
        CheckpointError: no domain rows, streams that differ in more than the seed, different domains or two different
            results in one place of a stream, two models of one group on the same seed, or a baseline that is not there
            or not the only one.
    """
    found = [row for row in rows if row["kind"] == "domain"]
    if not found:
        raise CheckpointError("report: the row files hold no finished domain; run ttaq adapt first")
    streams = _streams(found)
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
    methods = tuple(dict.fromkeys(method for _, method, _ in cells))
    if baseline not in methods:
        raise CheckpointError(f"report: no rows of the baseline {baseline!r}, the files have: {', '.join(methods)}")
    flags = parse_description(found[0]["stream"])
    del flags["seed"]
    return Report(
        stream=flags,
        seeds=tuple(sorted(streams)),
        groups=tuple(dict.fromkeys(group for group, _, _ in cells)),
        methods=methods,
        baseline=baseline,
        comparisons=_comparisons(found, baseline_group),
        entries=_entries(cells),
        domains=tuple(row["domain"] for row in max(streams.values(), key=len)),
        lines=breakdown([*streams.values()]),
        made_with=tuple(dict.fromkeys(_made_with(row) for row in found)),
    )


def _streams(found: list[Row]) -> dict[int, list[Row]]:
    """For each seed, in order, a row of each domain that any method has finished, in the order of the domains."""
    streams: dict[int, dict[int, Row]] = {}
    for row in found:
        if flags := differing_flags(found[0]["stream"], row["stream"]):
            raise CheckpointError(
                f"report: rows of different streams cannot be compared: {'; '.join(flags)}; "
                f"report each stream in a call of its own"
            )
        other = streams.setdefault(row["seed"], {}).setdefault(row["index"], row)
        first, second = ((one["domain"], one["n"], one["domains"]) for one in (other, row))
        if first != second:
            raise CheckpointError(
                f"report: seed {row['seed']} has two different domains in place {row['index']}: {first[0]} of "
                f"{first[1]} images in {first[2]} domains, and {second[0]} of {second[1]} in {second[2]}; "
                f"a file was edited or written by another version: report the files in separate calls"
            )
    return {seed: [streams[seed][index] for index in sorted(streams[seed])] for seed in sorted(streams)}


def _entries(cells: dict[_Key, dict[int, Row]]) -> dict[tuple[str, str], Entry]:
    entries: dict[tuple[str, str], Entry] = {}
    for (group, method, seed), cell in sorted(cells.items(), key=lambda item: item[0][2]):
        entry = entries.setdefault((group, method), Entry(group, method, {}, {}))
        domains = next(iter(cell.values()))["domains"]
        if len(cell) == domains:
            entry.rows[seed] = [cell[index] for index in sorted(cell)]
        else:
            entry.incomplete[seed] = len(cell), domains
    return entries


def _comparisons(found: list[Row], wanted: str | None) -> dict[str, tuple[str, ...]]:
    families: dict[str, dict[str, Row]] = {}
    for row in found:
        families.setdefault(row["model"], {}).setdefault(_group(row), row)
    everything = "; ".join(group for family in families.values() for group in family)
    comparisons, matched = {}, False
    for family in families.values():
        matching = [group for group in family if wanted == group] or [
            group for group in family if wanted is not None and wanted in group
        ]
        if len(matching) > 1:
            raise CheckpointError(
                f"report: the baseline group {wanted!r} is ambiguous, it fits {'; '.join(matching)}; "
                f"give more of the name"
            )
        matched |= bool(matching)
        floats = [group for group, row in family.items() if row["scheme"] == "float"]
        base = (matching or floats or [*family])[0]
        if others := tuple(group for group in family if group != base):
            comparisons[base] = others
    if wanted is not None and not matched:
        raise CheckpointError(f"report: no group is named {wanted!r}, the files have: {everything}")
    return comparisons


def _group(row: Row) -> str:
    quantization = row.get("quantization")
    return f"{row['model']}, {row['scheme']}" + (f", {quantization}" if quantization else "")


def _method(row: Row) -> str:
    return f"{row['method']} (shadow)" if row.get("shadow") else str(row["method"])


def _variant(row: Row) -> str:
    return json.dumps([_method(row), _options(row)], sort_keys=True)


def _options(row: Row) -> dict[str, object]:
    """Those of the method, and whether guards watched over it."""
    return {**row["options"], "guards": bool(row.get("guards"))}


def _method_names(rows: list[Row]) -> dict[str, str]:
    """A name for each method with its options: the options in which its variants differ are added in parentheses."""
    variants: dict[str, dict[str, dict[str, object]]] = {}
    for row in rows:
        variants.setdefault(_method(row), {})[_variant(row)] = _options(row)
    names = {}
    for method, by_variant in variants.items():
        keys = sorted({key for options in by_variant.values() for key in options})
        differing = [key for key in keys if len({str(options.get(key)) for options in by_variant.values()}) > 1]
        for variant, options in by_variant.items():
            values = ", ".join(f"{key}={options[key]}" for key in differing if key in options)
            names[variant] = f"{method} ({values})" if values else method
    return names


def _made_with(row: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    return f"{versions}; {row['device']}, {row.get('threads', '?')} threads"
