"""A report as Markdown."""

from __future__ import annotations

from ttaq.eval.cost_table import cost_tables
from ttaq.eval.guard_table import guard_table
from ttaq.eval.report import Entry, Report
from ttaq.eval.table import table

__all__ = ["markdown"]


def markdown(report: Report) -> str:
    """The stream, per group of models a summary and a table of errors by domain, then differences between groups."""
    flags = " ".join(f"{name}={value}" for name, value in report.stream.items())
    seeds = ", ".join(map(str, report.seeds))
    parts = [
        "# Error under corruption",
        f"Stream: `{flags}`; seeds {seeds}. What a seed draws, such as the order of the images and the noise, is the "
        "same for every method and every group of models.",
        "Figures are means over seeds, ± is the half width of the 95 % t interval over the n seeds (a single seed has "
        "none). The difference is paired: per seed the mean over domains minus that of "
        f"{report.baseline}, negative is better; (n = ...) says where it has other seeds than the line, or one only. "
        "The class error is the mean over the classes of the error within each; without imbalance it is the error.",
        *_lines_note(report),
    ]
    for group in report.groups:
        parts += [f"## {group}", *_calibration(report, group), _summary(report, group), _by_domain(report, group)]
        parts += cost_tables({method: e for method in report.methods if (e := report.entry(group, method)) is not None})
        parts += guard_table(report, group)
        parts += _gaps(report, group)
    parts += _between_groups(report)
    parts.append(_memory_note(report))
    parts.append("Made with " + " and with ".join(report.made_with) + ".")
    return "\n\n".join(parts) + "\n"


def _missing(report: Report, key: tuple[str, str]) -> str:
    """What stands in the place of a figure of a group and method without a complete seed."""
    return "incomplete" if key in report.entries else "not run"


def _difference(report: Report, key: tuple[str, str], base: tuple[str, str], n: int) -> str:
    """Paired difference of two (group, method), in a line of n seeds."""
    entry, baseline = report.entry(*key), report.entry(*base)
    if entry is None or baseline is None:
        return _missing(report, key if entry is None else base)
    interval = entry.against(baseline)
    if interval is None:
        return "no common seed"
    return interval.text(signed=True) + (f" (n = {interval.n})" if interval.n == 1 or interval.n != n else "")


def _lines_note(report: Report) -> list[str]:
    what = report.lines.what
    return [f"In the tables by domain a line is {what}."] if what else []


def _summary(report: Report, group: str) -> str:
    rows = []
    for method in report.methods:
        entry = report.entry(group, method)
        if entry is None:
            rows.append([method, *[_missing(report, (group, method))] * 6, "0"])
            continue
        n = len(entry.rows)
        difference = _difference(report, (group, method), (group, report.baseline), n)
        rows.append(
            [
                method,
                entry.mean().text(),
                "-" if method == report.baseline else difference,
                entry.mean("class_error").text(),
                entry.mean("ece").text(),
                _latency(entry),
                _memory(entry),
                str(n),
            ]
        )
    header = ["error %", f"minus {report.baseline}", "class error %", "ECE %", "ms per batch p50 / p95", "peak MB", "n"]
    return table(["method", *header], rows)


def _by_domain(report: Report, group: str) -> str:
    columns = []
    for method in report.methods:
        entry = report.entry(group, method)
        if entry is None:
            columns.append([_missing(report, (group, method))] * (len(report.lines.labels) + 1))
            continue
        found = entry.by_line(report.lines)
        cells = [found[label].text() if label in found else "not run" for label in report.lines.labels]
        columns.append([*cells, entry.mean().text()])
    names = [*report.lines.labels, f"**{report.lines.mean}**"]
    return table(["error %", *report.methods], [[name, *cells] for name, *cells in zip(names, *columns, strict=True)])


def _between_groups(report: Report) -> list[str]:
    parts = []
    for base, groups in report.comparisons.items():
        rows = []
        for group in groups:
            pairs = [(report.entry(group, method), report.entry(base, method)) for method in report.methods]
            n = max(len(one.rows.keys() & other.rows.keys()) if one and other else 0 for one, other in pairs)
            differences = [_difference(report, (group, method), (base, method), n) for method in report.methods]
            rows.append([group, *differences, str(n)])
        parts += [f"Error % of a group minus that of **{base}** under the same method:"]
        parts += [table(["group", *report.methods, "n"], rows)]
    title = "## Between schemes"
    note = "Paired: per seed the mean over domains of one group minus that of the other. Negative is better."
    return [title, note, *parts] if parts else []


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
    return f"{latency}; memory: {', '.join(sources) or 'not measured'}."


def _gaps(report: Report, group: str) -> list[str]:
    notes = []
    for method in report.methods:
        entry = report.entries.get((group, method))
        for seed in report.seeds:
            if entry is not None and seed in entry.incomplete:
                done, domains = entry.incomplete[seed]
                notes.append(f"- {method}, seed {seed}: {done} of {domains} domains, in no figure")
            elif entry is None or seed not in entry.rows:
                notes.append(f"- {method}, seed {seed}: not run")
    return ["\n".join(["Not complete:", "", *notes])] if notes else []
