"""The committed timings of the corruptions: complete, fast enough, and what their page says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import corruptions
from ttaq.data.corruptions import CORRUPTIONS, VALIDATION_CORRUPTIONS

KINDS = (*CORRUPTIONS, *VALIDATION_CORRUPTIONS)
SLOWEST = 20  # images per second of CPU time, at 224 pixels


def test_rows_are_complete_and_none_is_slow() -> None:
    rows = [json.loads(line) for line in corruptions.ROWS.read_text().splitlines()]
    assert [(row["side"], row["kind"]) for row in rows] == [(side, kind) for side in (32, 224) for kind in KINDS]
    assert {row["threads"] for row in rows} == {1}
    assert all(row["repeats"] >= corruptions.REPEATS for row in rows)
    assert all(row["images_per_s"] > 0 for row in rows)
    assert [row["kind"] for row in rows if row["side"] == 224 and row["images_per_cpu_s"] < SLOWEST] == []
    assert len({row["source"] for row in rows}) == 1


def test_the_page_is_made_from_the_rows() -> None:
    rows = [json.loads(line) for line in corruptions.ROWS.read_text().splitlines()]
    assert corruptions.PAGE.read_text() == corruptions.render(rows)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(corruptions, "BATCHES", {32: 2, 224: 1})
    monkeypatch.setattr(corruptions, "KINDS", ("contrast", "pixelate"))
    monkeypatch.setattr(corruptions, "SECONDS", 0.0)
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    assert corruptions.main(["--out", str(rows), "--render", str(page)]) == 0
    made = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [(row["kind"], row["side"], row["batch"], row["repeats"]) for row in made] == [
        *(("contrast", 32, 2, corruptions.REPEATS), ("pixelate", 32, 2, corruptions.REPEATS)),
        *(("contrast", 224, 1, corruptions.REPEATS), ("pixelate", 224, 1, corruptions.REPEATS)),
    ]
    assert page.read_text().count("| contrast |") == 1
    assert "pixelate" in capsys.readouterr().out
