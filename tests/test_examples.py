"""Every example runs by itself and prints what it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
PROMISED = {
    "drop_in_modules.py": ["equal before calibration: True", "3-bit weights", "gradients arrive: True"],
    "adapt_your_model.py": ["layer ", "source", "tent"],
    "save_and_resume.py": ["same outputs after resuming: True", "'updates': 6", "reset equals a new adapter: True"],
}


def run(name: str, tmp_path: Path) -> str:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / name], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_example_is_left_out() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == PROMISED.keys()


@pytest.mark.parametrize("name", ["drop_in_modules.py", "save_and_resume.py"])
def test_example(name: str, tmp_path: Path) -> None:
    said = run(name, tmp_path)
    for promise in PROMISED[name]:
        assert promise in said


def test_adapting_in_fog_helps(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    said = run("adapt_your_model.py", tmp_path)
    for promise in PROMISED["adapt_your_model.py"]:
        assert promise in said
    errors = {name: float(error) for name, error in re.findall(r"^(\w+) +([\d.]+) % errors", said, re.MULTILINE)}
    assert errors["norm"] < errors["source"]
