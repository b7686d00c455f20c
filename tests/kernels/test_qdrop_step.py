"""The benchmark of a reconstruction step, on a tiny block: both sides do the same, and what it prints is complete."""

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
    module = importlib.import_module("benchmarks.qdrop_step")
    monkeypatch.setattr(module, "STAGES", {"tiny": (3, 5)})
    yield module
    torch.set_num_threads(threads)


def test_rows(bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    assert bench.main(["--forms", "plain eager,ttaq eager", "--repetitions", "2", "--out", str(path)]) == 0
    *rows, last = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["form"] for row in rows] == ["plain eager", "ttaq eager"]
    assert all(row[f"{clock}_min"] <= row[clock] for row in rows for clock in ("wall_ms", "cpu_ms"))
    assert rows[0]["wall_ms_ratio"] == rows[0]["cpu_ms_ratio"] == 1
    assert rows[0].keys() >= {"stage", "batch", "device", "torch", "source", "date"}
    printed = capsys.readouterr().out
    assert "ttaq eager" in printed
    shares = last["shares"]
    parts = {"convolution", "reconstruction_loss", "fake_quantize", "gather_mix", "soft_round_step_", "Adam", "ReLU"}
    assert shares.keys() >= parts
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert min(shares.values()) >= 0
    assert f"convolution {100 * shares['convolution']:.0f} %" in printed


def test_sides_that_differ_are_not_timed(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench.Plain, "rounding", staticmethod(lambda v: torch.sigmoid(v) * 1.21 - 0.1))
    assert bench.main(["--forms", "plain eager,ttaq eager"]) == 1
    assert "NOT TIMED, expected at most 0.0002" in capsys.readouterr().out


def test_usage_error(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main(["--forms", "numpy"])
    assert caught.value.code == 2
    assert "--forms: unknown ['numpy'], expected some of plain eager" in capsys.readouterr().err
