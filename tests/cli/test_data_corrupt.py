"""`ttaq data corrupt`: the flags, the errors, and a run that is killed and continued."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ttaq.cli import main
from ttaq.data import open_imagenet_c, read_cifar_c
from ttaq.data.corruptions import corrupt

CIFAR = "data corrupt --dataset cifar10 --data {tmp}/clean --out {tmp}/out --workers 1 --corruptions contrast"
FOLDER = "data corrupt --dataset folder --data {tmp}/clean/val --out {tmp}/out --workers 1 --corruptions contrast"
CLASSES = ("ant", "bee")


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Twelve images of CIFAR in `clean`, and as many files of two classes in `clean/val`, alternating by name."""
    monkeypatch.delenv("TTAQ_DATA", raising=False)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
    records = [bytes([place % 10]) + image.tobytes() for place, image in enumerate(pixels)]
    (tmp_path / "clean").mkdir()
    (tmp_path / "clean" / "test_batch.bin").write_bytes(b"".join(records))
    (tmp_path / "clean" / "test.bin").write_bytes(b"".join(b"\0" + record for record in records))
    for place in range(12):
        file = tmp_path / "clean" / "val" / CLASSES[place % 2] / f"{place:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)).save(file)
    (tmp_path / "file").write_text("in the way")
    return pixels


def call(command: str, tmp: Path) -> int:
    try:
        return main(command.format(tmp=tmp).split())
    except SystemExit as end:
        return int(end.code or 0)


def levels(images: torch.Tensor) -> torch.Tensor:
    return (images * 255).round().byte()


def test_cifar(tmp_path: Path, clean: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(CIFAR + " --images 4", tmp_path) == 0
    assert capsys.readouterr().out == f"{tmp_path}/out/CIFAR-10-C: 20 corrupted images made, 0 were there\n"
    assert call(CIFAR + ",fog --images 4", tmp_path) == 0
    assert "20 corrupted images made, 20 were there" in capsys.readouterr().out
    read = read_cifar_c(tmp_path / "out", "contrast", 3)
    expected = corrupt(torch.from_numpy(clean[:4]), "contrast", 3, torch.Generator())
    assert torch.equal(read.images, levels(expected))
    assert read.labels.tolist() == [0, 1, 2, 3]


def test_cifar100_and_the_names_of_sets(tmp_path: Path) -> None:
    assert call(CIFAR.replace("cifar10", "cifar100").replace("contrast", "validation"), tmp_path) == 0
    home = tmp_path / "out" / "CIFAR-100-C"
    there = ["gaussian_blur.npy", "labels.npy", "saturate.npy", "spatter.npy", "speckle_noise.npy"]
    assert sorted(path.name for path in home.glob("*.npy")) == there
    assert read_cifar_c(home, "spatter", 1, num_classes=100).labels.tolist() == [*range(10), 0, 1]
    assert call(CIFAR.replace("contrast", "all"), tmp_path) == 0
    assert len(list((tmp_path / "out" / "CIFAR-10-C").glob("*.npy"))) == 15 + 1


def test_folder(tmp_path: Path) -> None:
    assert call(FOLDER + " --severities 2,5 --images 3 --preprocessing none", tmp_path) == 0
    stored = open_imagenet_c(tmp_path / "out", "contrast", 5)
    assert [file.name for file in stored.files] == ["00.png", "02.png", "01.png"]
    assert stored.classes == CLASSES
    clean = torch.stack([torch.from_numpy(np.array(Image.open(tmp_path / "clean" / "val" / name)))
                         for name in ("ant/00.png", "ant/02.png", "bee/01.png")]).permute(0, 3, 1, 2)  # fmt: skip
    assert torch.equal(stored.read().images, levels(corrupt(clean, "contrast", 5, torch.Generator())))
    assert sorted(path.name for path in (tmp_path / "out" / "ImageNet-C" / "contrast").iterdir()) == ["2", "5"]


def test_imagenet_finds_its_images(tmp_path: Path) -> None:
    imagenet = FOLDER.replace("folder", "imagenet").replace("clean/val", "clean") + " --severities 1 --split validate"
    assert call(imagenet, tmp_path) == 1  # two classes and nothing that tells their places
    (tmp_path / "clean" / "wnids.txt").write_text("\n".join(["bee", "ant", *(f"n{place}" for place in range(998))]))
    assert call(imagenet + " --format jpeg", tmp_path) == 0
    stored = open_imagenet_c(tmp_path / "out", "contrast", 1)
    assert [file.name for file in stored.files] == ["01.JPEG", "00.JPEG", "02.JPEG"]
    assert stored.labels.tolist() == [0, 1, 1]


USAGE = [
    ("data", "required: action, --dataset, --out"),
    ("data corrupted", "invalid choice: 'corrupted'"),
    (CIFAR + " --dataset mnist", "invalid choice: 'mnist'"),
    (CIFAR + " --severities 1,two", "expected integers"),
    (CIFAR + " --images 0", "at least 1, got '0'"),
    (CIFAR + " --workers none", "at least 1, got 'none'"),
    (CIFAR + " --format gif", "invalid choice: 'gif'"),
]
ERRORS = [
    (CIFAR + " --corruptions smoke", "unknown corruption 'smoke', expected some of: gaussian_noise"),
    (CIFAR + " --severities 5", "--severities: got 5, but the files of CIFAR-C hold all five"),
    (CIFAR + " --images 13", "--images: got 13, but split all of cifar10 has 12 here"),
    (CIFAR + " --split validate --images 1", "split validate of cifar10 has 0 here"),
    (CIFAR + " --split validate", "expected at least one of 0 to 11"),
    (CIFAR + " --data {tmp}/absent", "there is no folder {tmp}/absent"),
    (CIFAR + " --data {tmp}/clean/val", "there is no test_batch.bin in"),
    (CIFAR + " --out {tmp}/file", "cannot write {tmp}/file/CIFAR-10-C: Not a directory"),
    (CIFAR + " --corruptions frost --frost {tmp}/absent", "absent is not a folder"),
    (FOLDER + " --severities 0", "severities are [0], expected some of 1 to 5"),
    (FOLDER + " --data {tmp}/absent", "there is no folder {tmp}/absent"),
    (FOLDER + " --split report", "--split: got report, but a folder is taken whole"),
    (FOLDER + " --images 13", "split all of folder has 12 here"),
    (FOLDER.replace("folder", "imagenet"), "has 2 of 1,000 classes and no wnids.txt"),
    (
        FOLDER.replace("--data {tmp}/clean/val", ""),
        "--data: folder needs a folder of clean images; name one, or set TT",
    ),
]


@pytest.mark.parametrize(("code", "command", "says"), [(2, *row) for row in USAGE] + [(1, *row) for row in ERRORS])
def test_errors(code: int, command: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command, tmp_path) == code
    said = capsys.readouterr().err
    assert says.format(tmp=tmp_path) in said
    assert said.count("\n") == 1
    assert said.startswith("ttaq data: ")


def test_another_set_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(CIFAR, tmp_path) == 0
    for change, says in (("--seed 1", "seed (there 0, now 1)"), ("--images 5", "images (there None, now 5)")):
        assert call(f"{CIFAR} {change}", tmp_path) == 1
        assert f"was made with other settings: {says}; give the same ones" in capsys.readouterr().err


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def running(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes of a run in /proc")
def test_killed_and_continued(tmp_path: Path) -> None:
    """Two workers are killed with their parent; one process goes on and makes what one process alone makes."""
    command = FOLDER.replace("contrast", "motion_blur,fog")
    assert call(command.replace("/out", "/whole"), tmp_path) == 0
    whole = tmp_path / "whole" / "ImageNet-C"
    argv = [sys.executable, "-m", "ttaq", *command.format(tmp=tmp_path).split(), "--workers", "2"]
    out = tmp_path / "out" / "ImageNet-C"
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as run:
        while len(list(out.rglob("*.png"))) < 5 and run.poll() is None:
            time.sleep(0.01)
        workers = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL, "the run was over before it was killed"
    end = time.monotonic() + 20
    while running(workers) and time.monotonic() < end:
        time.sleep(0.05)
    assert len(workers) >= 2
    assert not running(workers)
    made = content(out)
    finished = {name: file for name, file in made.items() if name.endswith(".png")}
    assert 5 <= len(finished) < 2 * 5 * 12
    times = {name: os.stat(out / name).st_mtime_ns for name in finished}
    assert call(command, tmp_path) == 0
    assert content(out) == content(whole)
    assert {name: os.stat(out / name).st_mtime_ns for name in finished} == times
