"""Everything to do on a GPU, in slices: the check list, the tests, compute-sanitizer, then the benchmarks.

    python -m benchmarks.gpu [--budget-s SECONDS] [--out FOLDER]     (make gpu)

Needs no network and installs nothing. Each call continues where the last one stopped: what was right with this code on
this device is not done again. Results are JSON lines in the folder: gpu_checks.jsonl, gpu_tests.jsonl,
qdrop_step_cuda.jsonl, kernels_cuda.jsonl. The exit status is 0 if all that was run is right, 1 if not, 2 if there is no
CUDA device.
"""

import argparse
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure

_ROOT = Path(__file__).parent.parent
_PASSED = {0, 5}  # of pytest: 5 where a file has no test for a GPU
_TINY = "every_op"  # the item of the check list that runs every kernel once, on small tensors
_UNSUPPORTED = "Device not supported"  # what compute-sanitizer says on some virtual machines


def _rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


class Slice:
    """One call: what is done already, what the time still allows, and whether all was right."""

    def __init__(self, out: Path, budget_s: float, device: torch.device) -> None:
        self.machine = measure.environment(device)
        self.log = out / "gpu_tests.jsonl"
        self.end = time.perf_counter() + budget_s
        self.right = self.finished = True
        known = {"device", "source", "torch", "triton"}
        rows = [row for row in _rows(self.log) if all(row.get(key) == self.machine[key] for key in known)]
        self.done = {(row["name"], row["content"]) for row in rows if row["right"]}

    def seconds(self) -> float:
        return self.end - time.perf_counter()

    def run(self, name: str, content: str, command: list[str], passed: set[int]) -> None:
        """Run a command unless it was right before with the same content; its outcome is appended."""
        if (name, content) in self.done:
            return
        if self.seconds() <= 0:
            self.finished = False
            return
        start = time.perf_counter()
        try:
            process = subprocess.run(
                command, cwd=_ROOT, capture_output=True, text=True, check=False, timeout=self.seconds()
            )
        except subprocess.TimeoutExpired:
            # Not wrong; if nothing came before it in this call, it needs a larger budget.
            print(f"cut off  {name} after {time.perf_counter() - start:.0f} s", flush=True)
            self.finished = False
            return
        output = process.stdout + process.stderr
        unsupported = name.startswith("compute-sanitizer") and _UNSUPPORTED in output
        right = process.returncode in passed or unsupported
        last = output.strip().rpartition("\n")[2]
        note = "not run, this device is not supported" if unsupported else last
        row = {"name": name, "content": content, "right": right, "status": process.returncode, "note": note}
        with self.log.open("a") as file:
            print(json.dumps({**row, "seconds": round(time.perf_counter() - start, 1), **self.machine}), file=file)
        print(f"{'ok      ' if right else 'FAILED  '} {name}: {note}", flush=True)
        if right:
            self.done.add((name, content))
        else:
            print(output[-3000:], flush=True)
            self.right = False


def _content(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def test_files() -> list[Path]:
    """The files with tests that a GPU runs."""
    found = sorted(_ROOT.glob("tests/**/test_*.py"))
    marks = ("mark.gpu", "kernel_device", "op_device")
    return [path for path in found if any(mark in path.read_text(encoding="utf-8") for mark in marks)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--budget-s", type=float, default=540.0, help="start nothing after this many seconds")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was run", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    part = Slice(options.out, options.budget_s, torch.device("cuda", torch.cuda.current_device()))
    checks = [
        sys.executable,
        "-m",
        "benchmarks.gpu_checklist",
        "--out",
        str((options.out / "gpu_checks.jsonl").resolve()),
    ]
    part.run("check list", "", checks, {0})
    if importlib.util.find_spec("pytest") is None:
        print("not run  tests: pytest is not installed")
    else:
        shared = sorted((_ROOT / "tests/kernels").glob("*.py"))
        for path in test_files():
            helpers = [other for other in shared if not other.name.startswith("test_")]
            command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(path)]
            part.run(str(path.relative_to(_ROOT)), _content(path, *helpers), command, _PASSED)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("not run  compute-sanitizer: it is not installed")
    else:
        for tool in ("memcheck", "racecheck"):
            watched = [sys.executable, "-m", "benchmarks.gpu_checklist", "--only", _TINY]
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *watched]
            part.run(f"compute-sanitizer {tool}", "", command, {0})
    step = Path(__file__).with_name("qdrop_step.py")
    steps = ["--device", "cuda", "--out", str((options.out / "qdrop_step_cuda.jsonl").resolve())]
    part.run("a step of QDrop", _content(step), [sys.executable, "-m", "benchmarks.qdrop_step", *steps], {0})
    if part.seconds() > 0:
        rows = str((options.out / "kernels_cuda.jsonl").resolve())
        budget = ["--budget-s", f"{part.seconds():.0f}", "--out", rows]
        timed = [sys.executable, "-m", "benchmarks.run", "--device", "cuda", *budget]
        part.right &= subprocess.run(timed, cwd=_ROOT, check=False).returncode == 0
    else:
        part.finished = False
    if not part.finished:
        print("the time is up, run again to go on")
    return 0 if part.right else 1


if __name__ == "__main__":
    sys.exit(main())
