"""A report as Markdown."""

from __future__ import annotations

from ttaq.eval.report import Entry, Report
from ttaq.eval.student_t import Interval

__all__ = ["markdown", "table"]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, padded so that it reads as plain text too; the first column is aligned to the left."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]

    def line(cells: list[str]) -> str:
        first, *others = [*zip(cells, widths, strict=True)]
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def markdown(report: Report) -> str:
    """The stream, then per group of models a summary and a table of errors by domain."""
    flags = " ".join(f"{name}={value}" for name, value in report.stream.items())
    seeds = ", ".join(map(str, report.seeds))
    parts = [
        "# Error under corruption",
        f"Stream: `{flags}`; seeds {seeds}. All seeds see the same images, in another order and with other noise.",
        "Figures are means over seeds, ± is the half width of the 95 % t interval over the n seeds (a single seed has "
        "none). The difference is paired: per seed the mean over domains minus that of "
        f"{report.baseline}, negative is better.",
    ]
    for group in report.groups:
        parts += [f"## {group}", *_calibration(report, group), _summary(report, group), _by_domain(report, group)]
        parts += _gaps(report, group)
    parts.append(_memory_note(report))
    parts.append("Made with " + " and with ".join(report.made_with) + ".")
    return "\n\n".join(parts) + "\n"


def _text(interval: Interval | None, signed: bool = False) -> str:
    return "not run" if interval is None else interval.text(signed)


def _summary(report: Report, group: str) -> str:
    baseline = report.entries.get((group, report.baseline))
    rows = []
    for method in report.methods:
        entry = report.entries.get((group, method))
        if entry is None or not entry.rows:
            rows.append([method, *["not run" if entry is None else "incomplete"] * 5, "0"])
            continue
        difference = "not run" if baseline is None else _text(entry.against(baseline), signed=True)
        rows.append(
            [
                method,
                _text(entry.mean()),
                "-" if method == report.baseline else difference,
                _text(entry.mean("ece")),
                _latency(entry),
                _memory(entry),
                str(len(entry.rows)),
            ]
        )
    header = ["method", "error %", f"minus {report.baseline}", "ECE %", "ms per batch p50 / p95", "peak MB", "n"]
    return table(header, rows)


def _by_domain(report: Report, group: str) -> str:
    entries = [report.entries.get((group, method)) for method in report.methods]
    rows = [
        [domain, *(_text(None if entry is None else entry.domain(index)) for entry in entries)]
        for index, domain in enumerate(report.domains)
    ]
    rows.append(["**mean**", *(_text(None if entry is None else entry.mean()) for entry in entries)])
    return table(["error %", *report.methods], rows)


def _latency(entry: Entry) -> str:
    rows = [row for seed_rows in entry.rows.values() for row in seed_rows]
    return " / ".join(f"{sum(row['latency_ms'][key] for row in rows) / len(rows):.1f}" for key in ("p50", "p95"))


def _memory(entry: Entry) -> str:
    peaks = [row["memory"]["peak_mb"] for rows in entry.rows.values() for row in rows]
    return "not measured" if None in peaks else f"{max(peaks):.0f}"


def _calibration(report: Report, group: str) -> list[str]:
    entries = [entry for key, entry in report.entries.items() if key[0] == group]
    seeds = {seed for entry in entries for seed in entry.calibration_seeds() if seed is not None}
    if len(seeds) == 1:
        one = f"Calibrated with calibration seed {seeds.pop()} for every stream seed"
        return [f"{one}: the intervals leave out what other calibration images would change."]
    return [f"Calibration seeds {', '.join(map(str, sorted(seeds)))}."] if seeds else []


def _memory_note(report: Report) -> str:
    rows = [row for entry in report.entries.values() for rows in entry.rows.values() for row in rows]
    sources = dict.fromkeys(row["memory"]["of"] for row in rows)
    latency = "Latency is that of prediction and update together, averaged over domains and seeds"
    return f"{latency}; memory: {', '.join(sources)}."


def _gaps(report: Report, group: str) -> list[str]:
    notes = []
    for method in report.methods:
        entry = report.entries.get((group, method))
        for seed in report.seeds:
            if entry is not None and seed in entry.incomplete:
                done = f"{entry.incomplete[seed]} of {len(report.domains)} domains"
                notes.append(f"- {method}, seed {seed}: {done}, in no figure")
            elif entry is None or seed not in entry.rows:
                notes.append(f"- {method}, seed {seed}: not run")
    return ["\n".join(["Not complete:", "", *notes])] if notes else []
