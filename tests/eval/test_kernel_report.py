"""Tables of kernel times from rows with known numbers, and from rows that the benchmarks write."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from ttaq.cli import main
from ttaq.errors import CheckpointError
from ttaq.eval.kernel_report import Row, kernel_markdown, read_kernel_rows

ROOT = Path(__file__).parents[2]


def kernel_row(impl: str, p50_us: float | None, **changes: object) -> Row:
    ours = {"frac_of_floor": 0.875, "max_abs_err": 1.5e-7, "exact": False} if impl == "ttaq" else {}
    return {
        "op": "batch_norm",
        "variant": "",
        "direction": "forward",
        "model": "ResNet-50 b64",
        "shape": [64, 256, 56, 56],
        "dtype": "bfloat16",
        "layout": "channels_last",
        "impl": impl,
        "device": "NVIDIA H200",
        "driver": "570.1",
        "cuda": "12.8",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "git_sha": "0123456789abcdef",
        "source": "cafe",
        "date": "2026-01-02T03:04:05Z",
        "timer": "cudagraph",
        "p50_us": p50_us,
        "bytes": 205_520_896,
        **ours,
        **changes,
    }


def cells(text: str) -> list[dict[str, str]]:
    """The lines of every table by column."""
    lines = []
    for part in text.split("\n\n"):
        if part.startswith("| shape"):
            header, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()]
            lines += [dict(zip(header, line, strict=True)) for line in body]
    return lines


def test_a_line_holds_times_ratios_and_the_floor() -> None:
    rows = [kernel_row("eager", 200.0), kernel_row("ttaq", 50.0), kernel_row("torch", 25.0), kernel_row("liger", 75.0)]
    (line,) = cells(kernel_markdown(rows))
    assert line == {
        "shape": "64x256x56x56",
        "model": "ResNet-50 b64",
        "type": "bfloat16",
        "layout": "channels_last",
        "pass": "forward",
        "ttaq µs": "50.0",
        "eager µs": "200.0 (4.00)",
        "compile µs": "not measured",
        "torch µs": "25.0 (0.50)",
        "liger µs": "75.0 (1.50)",
        "MB": "206",
        "of floor": "88 %",
        "max error": "1.5e-07",
    }


def test_the_caption_names_device_and_versions() -> None:
    text = kernel_markdown([kernel_row("ttaq", 50.0), kernel_row("eager", 60.0, date="2026-01-03T00:00:00Z")])
    assert "## NVIDIA H200, code cafe\n" in text
    versions = "torch 2.11.0, triton 3.6.0, CUDA 12.8, driver 570.1; code cafe (commit 0123456789ab)"
    assert f"{versions}; measured 2026-01-02 to 2026-01-03.\n" in text


@pytest.mark.parametrize("key", ["device", "driver", "cuda", "torch", "triton", "source"])
def test_other_machines_and_versions_stand_apart(key: str) -> None:
    text = kernel_markdown([kernel_row("ttaq", 50.0), kernel_row("eager", 200.0, **{key: "other"})])
    ours, other = cells(text)
    assert (ours["ttaq µs"], ours["eager µs"]) == ("50.0", "not measured")
    assert (other["ttaq µs"], other["eager µs"]) == ("not measured", "200.0")
    assert text.count("\n## ") == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shape", [1]),
        ("model", "ViT"),
        ("dtype", "float32"),
        ("layout", "contiguous"),
        ("direction", "step"),
        ("variant", "channel"),
    ],
)
def test_other_calls_have_a_line_of_their_own(key: str, value: object) -> None:
    lines = cells(kernel_markdown([kernel_row("ttaq", 50.0), kernel_row("eager", 200.0, **{key: value})]))
    assert [line["eager µs"] for line in lines] == ["not measured", "200.0"]


def test_ops_have_tables_of_their_own() -> None:
    text = kernel_markdown([kernel_row("ttaq", 50.0), kernel_row("ttaq", 5.0, op="fake_quantize", exact=True)])
    assert re.findall("### (.*)", text) == ["batch_norm", "fake_quantize"]
    assert [(line["ttaq µs"], line["max error"]) for line in cells(text)] == [("50.0", "1.5e-07"), ("5.00", "exact")]
    assert "torch µs" not in text  # Nobody has such an op.


def test_what_was_not_measured_says_so_and_why() -> None:
    note = "not measured: no C++ compiler"
    rows = [
        kernel_row("ttaq", 50.0, frac_of_floor=None, max_abs_err=0.0),
        kernel_row("eager", 60.0),
        kernel_row("compile", None, note=note),
    ]
    text = kernel_markdown(rows)
    (line,) = cells(text)
    assert (line["compile µs"], line["of floor"], line["max error"]) == ("not measured", "not measured", "0")
    assert f"- 64x256x56x56 ResNet-50 b64 bfloat16 channels_last forward, compile: {note}" in text


def test_times_of_other_timers_make_no_ratio() -> None:
    text = kernel_markdown([kernel_row("ttaq", 50.0), kernel_row("eager", 200.0, timer="do_bench")])
    assert cells(text)[0]["eager µs"] == "200.0 †"
    assert "- † timed in another way than ttaq" in text
    assert "†" not in kernel_markdown([kernel_row("ttaq", 50.0), kernel_row("eager", 200.0)])


@pytest.mark.parametrize("turn", [1, -1])
def test_the_later_of_two_results_counts(turn: int) -> None:
    rows = [kernel_row("ttaq", 50.0), kernel_row("ttaq", 40.0, date="2026-01-03T00:00:00Z"), kernel_row("eager", 80.0)]
    text = kernel_markdown(rows[::turn])
    (line,) = cells(text)
    assert (line["ttaq µs"], line["eager µs"]) == ("40.0", "80.0 (2.00)")
    assert "- measured again: 1; of two results the later one counts" in text


def test_files_of_several_runs_make_one_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, out = tmp_path / "1.jsonl", tmp_path / "2.jsonl", tmp_path / "k.md"
    # What a kill left of a row stays in the file, with further rows behind it.
    ours, theirs = json.dumps(kernel_row("ttaq", 50.0)), json.dumps(kernel_row("eager", 100.0))
    one.write_text(f"{theirs[:60]}\n{ours}\n{{")
    two.write_text(f"{theirs}\n")
    assert main(["report", "--kernels", str(one), str(two), "--out", str(out)]) == 0
    assert cells(out.read_text())[0]["eager µs"] == "100.0 (2.00)"
    assert capsys.readouterr().out == f"wrote {out}\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "is not a file"),
        ("", "the files hold no results; run python -m benchmarks.run first"),
        ("notes\n", "line 1 of .* is not a result of python -m benchmarks.run"),
        ('{"op": "x"}\n', "lacks device"),
        ("[1]\n", "lacks an object"),
        ('{"format": 2, "kind": "domain"}\n', "line 1 of .* is not a result"),
    ],
)
def test_files_that_hold_something_else(text: str | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CheckpointError, match=says):
        kernel_markdown(read_kernel_rows(path))


@pytest.mark.parametrize("flag", ["--csv", "--plot", "--plots"])
def test_kernels_make_tables_only(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(kernel_row("ttaq", 50.0)) + "\n")
    assert main(["report", "--kernels", str(path), flag, str(tmp_path / "out")]) == 1
    assert f"{flag}: --kernels makes Markdown tables only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_the_benchmarks_write_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    bench = importlib.import_module("benchmarks.run")
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(bench, "OPS", bench.OPS[1:2])
    arguments = ["--device", "cpu", "--suite", "tiny", "--impls", "ttaq,eager", "--out", str(path)]
    assert bench.main(arguments) == 0
    lines = cells(kernel_markdown(read_kernel_rows(path)))
    assert lines
    for line in lines:
        assert re.fullmatch(r"[\d.]+", line["ttaq µs"])
        assert re.fullmatch(r"[\d.]+ \([\d.]+\)", line["eager µs"])
        assert (line["compile µs"], line["of floor"]) == ("not measured", "not measured")
