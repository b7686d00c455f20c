"""Runs the kernels in three worlds: interpreted, compiled ahead of time for GPUs that are not there, and on a GPU.

Triton decides at import whether it interprets, and compiling without a GPU replaces its driver for the whole process.
So the tests marked `interpreter` and `aot` run in processes of their own, one for each file and mark, started when the
first of its tests is due; this process lists them and reports their results. To debug one right here, set
`TTAQ_KERNEL_TESTS=interpreter TRITON_INTERPRET=1`.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

_WORLDS = {"interpreter": "1", "aot": "0"}  # world -> TRITON_INTERPRET
_WORLD = "TTAQ_KERNEL_TESTS"
_RESULTS = "TTAQ_KERNEL_TEST_RESULTS"


def _world(item: pytest.Item) -> str | None:
    return next((world for world in _WORLDS if item.get_closest_marker(world)), None)


@pytest.fixture(
    params=[
        pytest.param("cpu", id="interpreter", marks=pytest.mark.interpreter),
        pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
    ]
)
def kernel_device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """For tests of launchers: CPU tensors are interpreted, CUDA tensors run compiled. Unwritten results are NaN."""
    torch.use_deterministic_algorithms(True)
    with np.errstate(all="ignore"):  # a kernel overflows in silence
        yield torch.device(request.param)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)])
def op_device(request: pytest.FixtureRequest) -> torch.device:
    """For tests of the public functions: the reference on CPU tensors, the kernels on CUDA tensors."""
    return torch.device(request.param)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if _world(item) and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    world = _world(pyfuncitem)
    if world is None or os.environ.get(_WORLD) == world:
        return None
    results, ending = _run_world(pyfuncitem.session, world, pyfuncitem.path)
    outcome, text = results.get(
        pyfuncitem.nodeid, ("failed", f"the {world} process stopped before this test: {ending}")
    )
    if outcome == "skipped":
        pytest.skip(text)
    if outcome == "failed":
        pytest.fail(text, pytrace=False)
    return True


@functools.cache
def _run_world(session: pytest.Session, world: str, path: Path) -> tuple[dict[str, tuple[str, str]], str]:
    """Outcome and text of each test of this run that is in the file `path` and belongs to `world`, and how its process
    ended. A process per file: files may be tested by several processes at once."""
    tests = [item.nodeid for item in session.items if _world(item) == world and item.path == path]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "results")
        cache = os.environ.get("TRITON_CACHE_DIR", folder)
        variables = {_WORLD: world, _RESULTS: str(file), "TRITON_INTERPRET": _WORLDS[world], "TRITON_CACHE_DIR": cache}
        process = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
            cwd=session.config.rootpath,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        lines = file.read_text().splitlines() if file.exists() else []
    results = {nodeid: (outcome, text) for nodeid, outcome, text in map(json.loads, lines)}
    return results, f"exit status {process.returncode}\n{process.stdout[-2000:]}\n{process.stderr[-2000:]}"


def pytest_runtest_logreport(report: Any) -> None:
    file = os.environ.get(_RESULTS)
    if file and (report.when == "call" or report.outcome != "passed"):
        text = report.longrepr[2] if report.outcome == "skipped" else report.longreprtext
        with open(file, "a") as results:
            print(json.dumps([report.nodeid, report.outcome, text]), file=results)
