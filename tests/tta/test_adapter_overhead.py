"""The benchmark of what adapters cost beyond their operations: both sides do the same, and what it prints is whole."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    threads = torch.get_num_threads()
    yield importlib.import_module("benchmarks.adapter_overhead")
    torch.set_num_threads(threads)


def test_rows(bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    assert bench.main(["--repetitions", "3", "--batch", "2", "--out", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["method"] for row in rows] == list(bench.OPTIONS)
    for row in rows:
        assert row["batch"] == 2
        assert 0 < row["adapter_ms_min"] <= row["adapter_ms_median"]
        assert row["overhead_ms_min"] == pytest.approx(row["adapter_ms_min"] - row["bare_ms_min"], abs=2e-4)
        assert row.keys() >= {"device", "torch", "source", "date"}
    assert "tent" in capsys.readouterr().out


def test_sides_that_differ_are_not_timed(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench.Bare, "_learn", lambda self: self.optimizer.zero_grad())
    assert bench.main(["--methods", "tent"]) == 1
    assert "tent: NOT TIMED" in capsys.readouterr().out


def test_usage_error(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main(["--methods", "zoa"])
    assert caught.value.code == 2
    assert "--methods: unknown ['zoa']" in capsys.readouterr().err
