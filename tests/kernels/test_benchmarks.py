"""The benchmarks at tiny shapes: every op is right beside its baseline, and a run goes on where it stopped."""

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
TINY = ["--device", "cpu", "--suite", "tiny", "--impls", "ttaq,eager,torch", "--out"]
IDENTITY = ("op", "variant", "direction", "model", "shape", "dtype", "layout", "impl")
FIELDS = {
    *IDENTITY,
    *("p20_us", "p50_us", "p80_us", "timer", "bytes", "floor_us", "frac_of_floor", "device", "driver", "cuda"),
    *("torch", "triton", "sm_clock", "power", "git_sha", "source", "seed", "date"),
}


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT))
    yield importlib.import_module("benchmarks.run")
    sys.path.remove(str(ROOT))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def names(rows: list[dict[str, Any]]) -> list[str]:
    return sorted(str([row[name] for name in IDENTITY]) for row in rows)


def test_rows_are_complete_and_a_killed_run_goes_on(bench: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    assert bench.main([*TINY, str(path)]) == 0
    rows = rows_of(path)
    assert all(row.keys() >= FIELDS for row in rows)
    assert all(0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"] for row in rows)
    measured = {(row["op"], row["direction"], row["impl"]) for row in rows}
    ops = ("batch_norm", "fake_quantize", "softmax_entropy")
    assert measured >= {(op, way, impl) for op in ops for way in ("forward", "step") for impl in ("ttaq", "eager")}
    assert all(
        row["exact"] for row in rows if (row["impl"], row["variant"], row["direction"]) == ("ttaq", "tensor", "forward")
    )

    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-3]) + lines[-3][:40])
    assert bench.main([*TINY, str(path)]) == 0
    continued = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    assert names(continued) == names(rows)


def test_nothing_is_timed_when_the_time_is_up(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main([*TINY, str(tmp_path / "rows.jsonl"), "--budget-s", "-1"]) == 0
    assert rows_of(tmp_path / "rows.jsonl") == []
    assert "cases left, run again to measure them" in capsys.readouterr().out


def test_a_wrong_op_is_not_timed(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, other = bench.OPS[0], bench.OPS[2]
    wrong = dataclasses.replace(right, ours=lambda *inputs: right.ours(*inputs) + 1e-3)
    monkeypatch.setattr(bench, "OPS", (wrong, other))
    assert bench.main([*TINY, str(tmp_path / "rows.jsonl")]) == 1
    assert "NOT TIMED, the result is wrong by up to 0.001" in capsys.readouterr().out
    assert {row["op"] for row in rows_of(tmp_path / "rows.jsonl")} == {other.name}


@pytest.mark.parametrize("suite", ["cpu", "cuda"])
def test_cases_are_told_apart(suite: str, bench: ModuleType) -> None:
    keys = [str(case.key) for op in bench.OPS for case in op.cases(suite)]
    assert len(keys) == len(set(keys)) > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu", "--impls", "ttaq,numpy"], "--impls: unknown ['numpy'], expected some of ttaq,eager"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_usage_errors(
    arguments: list[str], message: str, bench: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("suite", ["tiny", "cpu", "cuda"])
def test_cases_differ_in_what_their_rows_say(bench: ModuleType, suite: str) -> None:
    keys = [json.dumps(case.key) for op in bench.OPS for case in op.cases(suite)]
    assert len(keys) == len(set(keys))
    assert all(op.cases(suite) for op in bench.OPS)


def test_the_networks_of_the_papers_are_timed_at_their_batches(bench: ModuleType) -> None:
    models = {op.name: {case.model for case in op.cases("cuda")} for op in bench.OPS}
    convolutional = {"ResNet-50 b64", "WRN-28-10 b200", "ResNeXt-29 b200"}
    assert models["batch_norm"] == models["norm_act_quant"] == convolutional
    assert models["fake_quantize"] == {*convolutional, "ViT-B b64"}
    assert models["packed_linear"] == {"ResNet-50 b64", "ResNeXt-29 b200", "ViT-B b64"}
    images = [case for op in bench.OPS for case in op.cases("cuda") if len(case.shape) == 4 and " b" in case.model]
    assert all(case.model.endswith(f" b{case.shape[0]}") for case in images if case.variant != "channel")
