"""The commands on a small model and real images: what they write, and that they can be interrupted."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ttaq.cli import main
from ttaq.eval import read_rows
from ttaq.io import load_model

DIGITS = ["--dataset", "digits", "--images", "20", "--corruptions", "fog,contrast", "--batch-size", "10"]


def test_quantize_adapt_report(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = f"cifar_resnet8:{files / 'plain.safetensors'}"
    for seed in (0, 1):
        argv = ["quantize", "--model", plain, "--dataset", "digits", "--scheme", "W4A4", "--calibration", "32"]
        assert main([*argv, "--seed", str(seed), "--out", str(tmp_path / f"q{seed}.safetensors")]) == 0
    assert load_model(tmp_path / "q1.safetensors").header["extra"]["calibration_seed"] == 1

    rows = tmp_path / "rows.jsonl"
    adapt = ["adapt", "--model", str(tmp_path / "q{seed}.safetensors"), "--model", plain, *DIGITS]
    adapt += ["--seeds", "0,1", "--option", "tent.lr=1e-2", "--option", "tent.optimizer=sgd", "--out", str(rows)]
    assert main(adapt) == 0
    found = [row for row in read_rows(rows) if row["kind"] == "domain"]
    assert len(found) == 2 * 2 * 3 * 2  # seeds, models, methods, domains
    assert {(row["scheme"], row["seed"], row["calibration_seed"]) for row in found} == {
        ("W4A4", 0, 0),
        ("W4A4", 1, 1),
        ("float", 0, None),
        ("float", 1, None),
    }
    assert {(row["options"]["lr"], row["options"]["optimizer"]) for row in found if row["method"] == "tent"} == {
        (0.01, "sgd")
    }
    assert {row["quantization"] for row in found} == {None, "rtn(calibration=32xdigits,search=mse)"}

    before = rows.read_bytes()
    capsys.readouterr()
    assert main(adapt) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert rows.read_bytes() == before

    out, picture = tmp_path / "report.md", tmp_path / "report.png"
    assert main(["report", str(rows), "--out", str(out), "--plot", str(picture)]) == 0
    text = out.read_text()
    assert "## cifar_resnet8, W4A4, rtn(calibration=32xdigits,search=mse)" in text
    assert "Calibration seeds 0, 1." in text
    assert picture.stat().st_size > 10_000
    capsys.readouterr()
    assert main(["report", str(rows), "--baseline", "norm"]) == 0
    assert "minus norm" in capsys.readouterr().out


def test_quantize_by_training_goes_on_where_it_was_interrupted(files: Path, tmp_path: Path) -> None:
    def argv(out: str) -> list[str]:
        shared = ["--dataset", "digits", "--scheme", "W2A4", "--calibration", "16", "--threads", "1"]
        settings = ["--method", "ttaq", "--preset", "fast"]
        settings += ["--option", "ttaq.iterations=25", "--option", "ttaq.distillation=5"]
        return [
            "quantize",
            "--model",
            str(files / "float.safetensors"),
            *shared,
            *settings,
            "--out",
            str(tmp_path / out),
        ]

    assert main(argv("whole.safetensors")) == 0
    code = f"import sys; from ttaq.cli import main; sys.exit(main({argv('resumed.safetensors')!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    units = tmp_path / "resumed.safetensors.units"
    deadline = time.monotonic() + 120
    while not (units / "unit_001.safetensors").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert not (tmp_path / "resumed.safetensors").exists()
    assert main(argv("resumed.safetensors")) == 0
    whole, resumed = (load_model(tmp_path / f"{name}.safetensors") for name in ("whole", "resumed"))
    assert whole.header["hash"] == resumed.header["hash"]
    assert whole.header["extra"]["quantization"]["iterations"] == 25
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed.safetensors", "whole.safetensors"]


def test_one_seed_on_two_models_is_not_averaged(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    for seed in ("0", "1"):
        quantized = str(tmp_path / f"q{seed}.safetensors")
        argv = ["quantize", "--model", str(files / "float.safetensors"), "--dataset", "digits", "--scheme", "W4A4"]
        assert main([*argv, "--calibration", "8", "--seed", seed, "--out", quantized]) == 0
        assert main(["adapt", "--model", quantized, *DIGITS, "--methods", "source", "--out", str(rows)]) == 0
    capsys.readouterr()
    assert main(["report", str(rows)]) == 1
    assert "a seed takes one model per group" in capsys.readouterr().err


def test_info_and_convert(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(files / "q.safetensors")]) == 0
    said = capsys.readouterr().out
    for part in ("cifar_resnet8", "W4A4", "rtn", "layer1.0.conv1", "bytes", "parameters:"):
        assert part in said
    out = str(tmp_path / "c.safetensors")
    assert main(["convert", str(files / "net.pth"), "--architecture", "cifar_resnet8", "--out", out]) == 0
    assert load_model(out).header["hash"] == load_model(files / "float.safetensors").header["hash"]
    assert main(["info", out]) == 0
    assert "net.pth" in capsys.readouterr().out


def test_toml_gives_flags_and_flags_win(files: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        f"""
        [adapt]
        model = ["{files / "float.safetensors"}"]
        dataset = "digits"
        methods = ["source", "tent"]
        corruptions = "fog"
        images = 10
        batch_size = 5
        severity = 2
        option.tent.lr = 0.5
        [quantize]
        scheme = "W8A8"
        """
    )
    rows = tmp_path / "rows.jsonl"
    assert main(["adapt", "--config", str(config), "--severity", "4", "--out", str(rows)]) == 0
    found = [row for row in read_rows(rows) if row["kind"] == "domain"]
    assert [row["method"] for row in found] == ["source", "tent"]
    assert found[1]["options"]["lr"] == 0.5
    assert " severity=4 images=10 " in found[0]["stream"]
    # A flag that may be repeated replaces the list of the file.
    model = str(files / "q.safetensors")
    assert main(["adapt", f"--config={config}", "--severity", "4", f"--model={model}", "--out", str(rows)]) == 0
    assert {row["scheme"] for row in read_rows(rows)[len(found) + 2 :]} == {"W4A4"}


@pytest.mark.parametrize("command", ["", "demo", "quantize", "adapt", "report", "convert", "info"])
def test_help_shows_defaults(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "None" not in said
    assert "default: []" not in said
    if command == "adapt":
        for default in ("5", "200", "source,norm,tent", "report", "continual", "all"):
            assert f"(default: {default})" in " ".join(said.split())


def long_run(files: Path, rows: Path) -> list[str]:
    argv = ["adapt", "--model", str(files / "q.safetensors"), "--dataset", "digits", "--methods", "tent"]
    argv += ["--corruptions", "fog,contrast,brightness,snow,defocus_blur", "--images", "120", "--batch-size", "4"]
    return [*argv, "--threads", "1", "--out", str(rows)]


def start(files: Path, rows: Path) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "ttaq", *long_run(files, rows)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_rows(process: subprocess.Popen[str], rows: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not rows.exists() or rows.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def repeatable(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{key: value for key, value in row.items() if key not in ("latency_ms", "memory")} for row in rows]


def test_kill_interrupt_and_resume(files: Path, tmp_path: Path) -> None:
    whole, rows = tmp_path / "whole.jsonl", tmp_path / "rows.jsonl"
    threads = torch.get_num_threads()
    try:
        assert main(long_run(files, whole)) == 0
    finally:
        torch.set_num_threads(threads)
    with start(files, rows) as process:
        wait_for_rows(process, rows, 1)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    with start(files, rows) as process:
        wait_for_rows(process, rows, 2)
        os.kill(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 130
        assert (
            said.strip() == "ttaq adapt: interrupted; finished domains are kept, the same command continues behind them"
        )
    assert 2 <= rows.read_bytes().count(b"\n") < 6
    with start(files, rows) as process:
        out, said = process.communicate(timeout=120)
        assert (process.returncode, said) == (0, "")  # Quiet when piped.
        assert "mean error" in out
    assert repeatable(read_rows(rows)) == repeatable(read_rows(whole))
