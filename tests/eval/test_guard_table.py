"""What a report says of guards."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from report_rows import domain_rows, three_seeds

from ttaq.eval import build_report, markdown
from ttaq.eval.rows import Row
from ttaq.tta import Limits

SIGNALS = {"entropy": 0.2, "classes": 0.9, "batch_classes": 0.8, "spike": 0.1, "drift": 0.02, "drift_per_batch": 0.001}


def guarded(rows: list[Row], alarms: list[int], **signals: float) -> list[Row]:
    return [
        row | {"guards": asdict(Limits()), "signals": SIGNALS | signals, "counters": {"alarms": n, "paused": 10 * n}}
        for row, n in zip(rows, alarms, strict=True)
    ]


def cells(text: str) -> list[str]:
    (line,) = [line for line in text.partition("Guards:")[2].splitlines() if line.startswith("| tent")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_without_guards_there_is_no_table() -> None:
    assert "Guards:" not in markdown(build_report(three_seeds()))


@pytest.mark.parametrize(("setting", "alarms"), [("continual", 2 + 0), ("reset_each_shift", 0 + 1 + 2 + 0)])
def test_alarms_are_counted_once_and_the_nearest_value_of_all_seeds_stands(setting: str, alarms: int) -> None:
    rows = domain_rows("source", 0, [10.0, 20.0, 30.0], setting=setting)
    rows += guarded(domain_rows("tent", 0, [9.0, 19.0, 29.0], setting=setting), [0, 1, 2])
    other = domain_rows("tent", 1, [9.0, 19.0, 29.0], setting=setting)
    rows += guarded(other, [0, 0, 0], entropy=0.125, drift=0.5, classes=0.95)
    text = markdown(build_report(rows))
    assert cells(text) == ["tent", str(alarms), str(10 * alarms), "0.12", "0.9", "0.8", "0.1", "0.5", "0.001"]
    assert "entropy, at least 0.01" in text
    assert "drift, at most 0.5" in text
    assert "| source" not in text.partition("Guards:")[2]
