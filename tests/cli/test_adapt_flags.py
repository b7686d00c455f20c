"""Flags of `ttaq adapt`: shadows, memory, images of the source, and going on or not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ttaq.cli import main
from ttaq.data.corruptions import VALIDATION_CORRUPTIONS
from ttaq.eval import read_rows
from ttaq.eval.stream import parse_description

DIGITS = ["--dataset", "digits", "--images", "40", "--corruptions", "fog", "--batch-size", "20"]


def adapt(files: Path, rows: Path, *flags: str, model: str = "float") -> int:
    return main(["adapt", "--model", str(files / f"{model}.safetensors"), *DIGITS, "--out", str(rows), *flags])


def repeatable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in ("latency_ms", "memory")} for row in rows]


def test_shadow_answers_with_the_source(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    assert adapt(files, rows, "--methods", "source,tent") == 0
    assert adapt(files, rows, "--methods", "tent", "--shadow") == 0
    source, tent, shadow = [row for row in read_rows(rows) if row["kind"] == "domain"]
    assert (shadow["shadow"], shadow["error"], shadow["shadow_error"]) == (True, source["error"], tent["error"])
    assert f"of the method in shadow {tent['error']:.2f} %" in capsys.readouterr().out
    assert main(["report", str(rows)]) == 0
    assert "| tent (shadow) |" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["float", "q"])
def test_max_memory_halves_the_batch(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    assert adapt(files, tmp_path / "whole.jsonl", "--methods", "source,tent", model=model) == 0
    memory = read_rows(tmp_path / "whole.jsonl")[3]["memory"]
    need = sum(memory[f"{part}_mb"] for part in ("weights", "optimizer", "state", "gradients", "activations", "layer"))
    capsys.readouterr()
    for share, size in ((1.05, "20"), (0.95, "10")):
        path = rows.with_name(f"{size}.jsonl")
        flags = ["--methods", "source,tent", "--max-memory", str(share * need)]
        assert adapt(files, path, *flags, model=model) == 0
        assert f"batch size {size}: tent on " in capsys.readouterr().out
        assert {parse_description(row["stream"])["batch_size"] for row in read_rows(path)} == {size}


def test_too_little_memory_says_what_is_missing(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adapt(files, tmp_path / "rows.jsonl", "--methods", "tent", "--max-memory", "0.1") == 1
    said = capsys.readouterr().err
    for part in ("for batches of 10", "weights", "optimizer", "state", "activations", "MB more than 0.1"):
        assert part in said
    assert not (tmp_path / "rows.jsonl").exists()


def test_images_of_the_source(files: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    assert adapt(files, rows, "--methods", "source,eata", "--source-images", "70", "--seeds", "0,1") == 0
    found = [row for row in read_rows(rows) if row["kind"] == "domain"]
    assert [row["options"].get("source_images") for row in found] == [None, 70, None, 70]


@pytest.mark.parametrize("resume", [["--no-resume"], ["--config"]], ids=["flag", "config"])
def test_without_resumption_nothing_is_run_where_a_row_is(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], resume: list[str]
) -> None:
    rows, config = tmp_path / "rows.jsonl", tmp_path / "run.toml"
    config.write_text("[adapt]\nresume = false\n")
    flags = [*resume, *([str(config)] if resume == ["--config"] else [])]
    assert adapt(files, rows, "--methods", "tent", *flags) == 0
    before = rows.read_bytes()
    capsys.readouterr()
    assert adapt(files, rows, "--methods", "source,norm,tent", *flags) == 1
    assert "already holds 2 rows of this run" in capsys.readouterr().err
    assert rows.read_bytes() == before
    assert adapt(files, rows, "--methods", "source,norm,tent") == 0
    assert [row["method"] for row in read_rows(rows) if row["kind"] == "domain"] == ["tent", "source", "norm"]


def test_sets_of_corruptions_stand_among_names(files: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    assert adapt(files, rows, "--methods", "source", "--corruptions", "validation,clean") == 0
    found = [row["domain"].split("@")[0] for row in read_rows(rows) if row["kind"] == "domain"]
    assert found == [*VALIDATION_CORRUPTIONS, "clean"]


def long_domain(files: Path, rows: Path) -> list[str]:
    argv = ["adapt", "--model", str(files / "q.safetensors"), "--dataset", "digits", "--methods", "tent"]
    argv += ["--corruptions", "fog", "--images", "480", "--batch-size", "2", "--threads", "1"]
    return [*argv, "--checkpoint-every", "10", "--out", str(rows)]


def test_killed_in_the_middle_of_a_domain(files: Path, tmp_path: Path) -> None:
    whole, rows = tmp_path / "whole.jsonl", tmp_path / "rows.jsonl"
    assert main(long_domain(files, whole)) == 0
    code = f"import sys; from ttaq.cli import main; sys.exit(main({long_domain(files, rows)!r}))"
    states = rows.with_name("rows.jsonl.state")
    deadline = time.monotonic() + 120
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL) as process:
        while not [*states.glob("[!.]*")] and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    assert rows.read_bytes() == b""
    assert len([*states.glob("[!.]*")]) == 1
    assert main(long_domain(files, rows)) == 0
    assert repeatable(read_rows(rows)) == repeatable(read_rows(whole))
    assert not states.exists()
