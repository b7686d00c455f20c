"""Everything a user can get wrong ends in one line, the right exit code and no traceback."""

from pathlib import Path

import pytest

from ttaq.cli import main

MODEL = " --model {files}/float.safetensors"
ADAPT = "adapt --dataset digits --methods source --images 4 --corruptions fog --out {tmp}/r.jsonl" + MODEL
QUANTIZE = "quantize --dataset digits --scheme W4A4 --calibration 4 --out {tmp}/q.safetensors" + MODEL


def prepare(tmp: Path, files: Path) -> None:
    """Broken files of every kind."""
    whole = (files / "q.safetensors").read_bytes()
    (tmp / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp / "damaged.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (tmp / "text.safetensors").write_text("no model")
    (tmp / "notes.txt").write_text("my notes\n")
    (tmp / "future.jsonl").write_text('{"format": 99}\n')
    (tmp / "bad.toml").write_text("[adapt\n")
    (tmp / "key.toml").write_text("[adapt]\nseverty = 3\n")
    (tmp / "section.toml").write_text("[adopt]\nseverity = 3\n")
    (tmp / "value.toml").write_text("[adapt]\nseverity = 'strong'\n")
    (tmp / "flag.toml").write_text("[adapt]\nstored = 'yes'\n")
    (tmp / "folder").mkdir()


USAGE = [
    ("", "required: command"),
    ("adopt", "invalid choice: 'adopt'"),
    ("adapt --out x", "required: --model"),
    (ADAPT + " --severity 9", "invalid choice: 9"),
    (ADAPT + " --severity strong", "invalid int value: 'strong'"),
    (ADAPT + " --images 0", "at least 1, got '0'"),
    (ADAPT + " --batch-size x", "at least 1, got 'x'"),
    (ADAPT + " --checkpoint-every 0", "at least 1, got '0'"),
    (ADAPT + " --max-memory 0", "expected a number above 0, got '0'"),
    (ADAPT + " --max-memory much", "expected a number above 0, got 'much'"),
    (ADAPT + " --seeds 1,one", "expected integers"),
    (ADAPT + " --seeds 1,1", "expected different names"),
    (ADAPT + " --dataset mnist", "invalid choice: 'mnist'"),
    (ADAPT + " --split test", "invalid choice: 'test'"),
    (ADAPT + " --sev 3", "unrecognized arguments: --sev"),
    (ADAPT + " --config {tmp}/absent.toml", "absent.toml: No such file"),
    (ADAPT + " --config {tmp}/bad.toml", "bad.toml is not TOML"),
    (ADAPT + " --config {tmp}/key.toml", "unknown key 'severty' in [adapt], expected one of: batch-size"),
    (ADAPT + " --config {tmp}/section.toml", "[adopt] is not a command"),
    (ADAPT + " --config {tmp}/value.toml", "invalid int value: 'strong'"),
    (ADAPT + " --config {tmp}/flag.toml", "stored in [adapt] is 'yes', expected true or false"),
    (ADAPT + " --config", "expected one argument"),
    ("report", "required: ROWS"),
    ("convert x --out y --architecture alexnet", "invalid choice: 'alexnet'"),
    ("convert x --out y --architecture cifar_resnet8 --mean 1,2", "three numbers"),
    (ADAPT + " --corruptions fog,all", "expected different names separated by commas"),
]
ERRORS = [
    (ADAPT + " --dataset cifar10 --data {tmp}/absent", "absent"),
    (ADAPT + " --dataset cifar10 --data {tmp}/folder", "no test_batch.bin in"),
    (ADAPT + " --methods source,wish", "--methods: unknown wish, expected some of: source"),
    (ADAPT + " --corruptions smoke", "unknown corruption 'smoke'"),
    (ADAPT + " --option lr=1", "expected METHOD.NAME=VALUE"),
    (ADAPT + " --option tent.lr=1", "expected one for source"),
    (ADAPT + " --methods tent --option tent.speed=1", "no option is named speed"),
    (ADAPT + " --methods tent --option tent.lr=fast", "Tent: lr is 'fast'"),
    (ADAPT + " --images 4000", "has 480"),
    (ADAPT + " --source-images 100", "--source-images: none of source wants any"),
    (ADAPT + " --methods eata --source-images 1", "expected at least 2 images"),
    (ADAPT + " --methods source,tent --max-memory 0.01", "tent on float needs"),
    (ADAPT + " --stored", "digits has no stored"),
    (ADAPT + " --frost {tmp}/absent --corruptions frost", "absent"),
    (ADAPT + " --device abacus", "unknown device 'abacus'"),
    (ADAPT + " --model {files}/seven.safetensors", "expected [B, 10] for digits"),
    (ADAPT + " --model {tmp}/absent.safetensors", "absent.safetensors"),
    (ADAPT + " --model {tmp}/cut.safetensors", "truncated"),
    (ADAPT + " --model {tmp}/damaged.safetensors", "damaged"),
    (ADAPT + " --model {tmp}/text.safetensors", "truncated, damaged or not a safetensors file"),
    (ADAPT + " --model {files}/newer.safetensors", "format version 99"),
    (ADAPT + " --model {files}/plain.safetensors", "NAME:PATH"),
    (ADAPT + " --model alexnet:{files}/plain.safetensors", "no architecture is named 'alexnet'"),
    (ADAPT + " --model cifar_resnet20:{files}/plain.safetensors", "another architecture"),
    (ADAPT + " --model cifar_resnet8:{tmp}/absent", "no file"),
    (ADAPT + " --model timm:no_such_net:{files}/plain.safetensors", "timm"),
    (ADAPT + " --out {tmp}/absent/r.jsonl", "--out: the folder {tmp}/absent does not exist"),
    (ADAPT + " --out {tmp}/folder", "is a folder, expected a file name"),
    (ADAPT + " --out {tmp}/notes.txt", "line 1 of {tmp}/notes.txt is not JSON"),
    (ADAPT + " --out {tmp}/future.jsonl", "install a newer ttaq"),
    (ADAPT + " --out /dev/full", "--out: /dev/full is no regular file"),
    (ADAPT + " --seeds 0,-1", "seed is -1, expected an integer from 0"),
    (ADAPT + " --option source.seed=3", "--option: seed is no option of source; use the flag for seeds"),
    (ADAPT + " --device meta", "unknown device 'meta'"),
    (ADAPT + " --threads 100000", "--threads: 100000 is more than the 1024 there may be"),
    (QUANTIZE + " --seed 99999999999999999999", "--seed: 99999999999999999999, expected an integer from 0"),
    (QUANTIZE + " --out {files}/plain.safetensors --model cifar_resnet8:{files}/plain.safetensors", "would be lost"),
    ("convert {files}/net.pth --architecture cifar_resnet8 --out {files}/net.pth", "would be lost"),
    ("report {tmp}/notes.txt --out {tmp}/notes.txt", "--out: {tmp}/notes.txt is already a file of this command"),
    ("report {tmp}/future.jsonl --csv {tmp}/folder/../future.jsonl", "is already a file of this command"),
    ("report {tmp}/future.jsonl --out {tmp}/a --csv {tmp}/a", "--csv: {tmp}/a is already a file of this command"),
    (QUANTIZE + " --scheme W9A4", "W9A4"),
    (QUANTIZE + " --method magic", "magic"),
    (QUANTIZE + " --search luck", "luck"),
    (QUANTIZE + " --method qdrop --preset slow", "preset is 'slow'"),
    (QUANTIZE + " --method qdrop --option qdrop.speed=1", "no setting is named 'speed'"),
    (QUANTIZE + " --method qdrop --option brecq.iterations=5", "expected one for qdrop"),
    (QUANTIZE + " --option rtn.iterations=5", "rtn has no settings"),
    (QUANTIZE + " --method qdrop --cache-mb -1", "cache_mb is -1"),
    (QUANTIZE + " --calibration 5000", "count is 5000, expected 1 to 1197"),
    (QUANTIZE + " --model {files}/q.safetensors", "already quantized (W4A4)"),
    (QUANTIZE + " --out {tmp}/absent/q.safetensors", "does not exist"),
    (QUANTIZE + " --dataset cifar10", "TTAQ_DATA"),
    ("report {tmp}/absent.jsonl", "not a file"),
    ("report {tmp}/notes.txt", "not JSON"),
    ("report {tmp}/notes.txt --out {tmp}/absent/report.md", "does not exist"),
    ("info {tmp}/absent", "no file"),
    ("info {files}/plain.safetensors", "ttaq convert"),
    ("convert {tmp}/notes.txt --architecture cifar_resnet8 --out {tmp}/c.safetensors", "notes.txt"),
    ("convert {files}/net.pth --architecture cifar_resnet20 --out {tmp}/c.safetensors", "another architecture"),
    ("demo --out {tmp}/notes.txt", "cannot use the folder"),
]


def attempt(command: str, files: Path, tmp: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and what stderr says, which has to be a single line."""
    prepare(tmp, files)
    try:
        code = main([part.format(files=files, tmp=tmp) for part in command.split()])
    except SystemExit as stopped:
        code = stopped.code  # type: ignore[assignment]
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert said.endswith("\n")
    return code, said


@pytest.mark.parametrize(("command", "says"), USAGE, ids=lambda text: text[-60:])
def test_usage_errors(
    command: str,
    says: str,
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, said = attempt(command, files, tmp_path, capsys)
    assert code == 2, said
    assert says in said


@pytest.mark.parametrize(("command", "says"), ERRORS, ids=lambda text: text[-60:])
def test_errors_the_user_can_mend(
    command: str,
    says: str,
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TTAQ_DATA", raising=False)
    code, said = attempt(command, files, tmp_path, capsys)
    assert code == 1, said
    assert says.format(tmp=tmp_path) in said
    for leftover in ("q.safetensors", "c.safetensors"):
        assert not (tmp_path / leftover).exists()


def test_rows_of_another_stream(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [part.format(files=files, tmp=tmp_path) for part in ADAPT.split()]
    assert main(argv) == 0
    rows = (tmp_path / "r.jsonl").read_bytes()
    capsys.readouterr()
    assert main([*argv, "--severity", "3"]) == 1
    assert "severity (5 against 3)" in capsys.readouterr().err
    assert (tmp_path / "r.jsonl").read_bytes() == rows
