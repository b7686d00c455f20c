"""What a report says of latency, memory and shadows, where rows have it."""

from __future__ import annotations

from typing import Any

from report_rows import domain_rows, three_seeds

from ttaq.eval import build_report, markdown
from ttaq.eval.rows import Row


def detailed(rows: list[Row], latency: float = 10.0, **changes: Any) -> list[Row]:
    part = {"p50": latency, "p95": 2 * latency, "p99": 3 * latency}
    split = {"forward": {key: 0.75 * value for key, value in part.items()}}
    split["update"] = {key: 0.25 * value for key, value in part.items()}
    parts = {"weights_mb": 1.5, "optimizer_mb": 0.25, "state_mb": 0.125, "activations_mb": 812.34}
    return [
        row
        | {"latency_ms": {**part, "batches": 10, **split}, "memory": {"peak_mb": 100.0, "of": "test", **parts}}
        | changes
        for row in rows
    ]


def test_rows_of_earlier_versions_have_no_such_table() -> None:
    assert "p99" not in markdown(build_report(three_seeds()))


def test_percentiles_the_split_and_the_parts_of_the_memory() -> None:
    rows = domain_rows("source", 0, [10.0, 20.0, 30.0]) + detailed(domain_rows("tent", 0, [9.0, 19.0, 29.0]))
    text = markdown(build_report(rows))
    line = next(line for line in text.splitlines() if line.startswith("| tent") and "812" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "tent",
        "10.0 / 20.0 / 30.0",
        "7.5 / 15.0 / 22.5",
        "2.5 / 5.0 / 7.5",
        "1.5",
        "0.25",
        "0.125",
        "812",
    ]
    assert sum(line.startswith("| source") for line in text.splitlines()) == 1  # its rows are of before


def test_a_shadow_stands_beside_the_method_itself() -> None:
    rows = domain_rows("source", 0, [10.0, 20.0, 30.0]) + detailed(domain_rows("tent", 0, [9.0, 19.0, 29.0]))
    shadow = domain_rows("tent", 0, [10.0, 20.0, 30.0])
    rows += [row | {"shadow": True, "shadow_error": row["error"] - 1} for row in detailed(shadow)]
    report = build_report(rows)
    assert report.methods == ("source", "tent", "tent (shadow)")
    (line,) = [line for line in markdown(report).splitlines() if line.startswith("| tent (shadow)") and "19.00" in line]
    assert [cell.strip() for cell in line.strip("|").split("|")] == ["tent (shadow)", "20.00", "19.00"]
