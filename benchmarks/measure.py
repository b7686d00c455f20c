"""Timing a call, and naming the machine it ran on."""

import hashlib
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = ["environment", "gpu_state", "time_us", "warm_up"]

_ROOT = Path(__file__).parent.parent
_GRAPH_MS = 20


def time_us(run: Callable[[], None], device: torch.device, cpu_seconds: float) -> tuple[list[float], str]:
    """20th, 50th and 80th percentile of the time of a call in microseconds, and the timer that found them.

    On a GPU a CUDA graph replays the call, which takes the launch overhead of every implementation away. What cannot be
    captured is timed with its launches.
    """
    if device.type == "cuda":
        from triton.testing import do_bench, do_bench_cudagraph

        quantiles = [0.2, 0.5, 0.8]
        run()
        try:
            return [1e3 * ms for ms in do_bench_cudagraph(run, rep=_GRAPH_MS, quantiles=quantiles)], "cudagraph"
        except RuntimeError:
            torch.cuda.synchronize()
            return [1e3 * ms for ms in do_bench(run, quantiles=quantiles)], "do_bench"
    run()
    times: list[float] = []
    end = time.perf_counter() + cpu_seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(1e6 * (time.perf_counter() - start))
    times.sort()
    return [times[int(share * (len(times) - 1))] for share in (0.2, 0.5, 0.8)], "perf_counter"


def warm_up(device: torch.device) -> None:
    """Bring the clocks of a GPU to where they stay under load."""
    if device.type != "cuda":
        return
    matrix = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    end = time.perf_counter() + 2
    while time.perf_counter() < end:
        for _ in range(20):
            matrix @ matrix
        torch.cuda.synchronize()


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False).stdout.strip()


def gpu_state(device: torch.device) -> dict[str, object]:
    """The clock of the multiprocessors in MHz and the power in W, right after a measurement."""
    if device.type != "cuda":
        return {"sm_clock": None, "power": None}
    line = _output("nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits").partition("\n")[0]
    try:
        clock, power = (float(number) for number in line.split(","))
    except ValueError:
        return {"sm_clock": None, "power": None}
    return {"sm_clock": clock, "power": power}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    names = [line.partition(":")[2].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def environment(device: torch.device) -> dict[str, object]:
    """What a result depends on besides the case. `source` changes with the code of the kernels, committed or not."""
    digest = hashlib.sha256()
    for path in sorted([*_ROOT.glob("ttaq_kernels/**/*.py"), *_ROOT.glob("benchmarks/*.py")]):
        digest.update(path.read_bytes())
    on_gpu = device.type == "cuda"
    driver = "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "driver": _output(*driver).partition("\n")[0] if on_gpu else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "git_sha": _output("git", "rev-parse", "HEAD") or None,
        "source": digest.hexdigest()[:12],
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
