"""Times every op and appends one JSON line per implementation; called again, it goes on where it stopped.

    python -m benchmarks.run --device cpu|cuda [--suite tiny|cpu|cuda] [--impls ttaq,eager,compile,torch,public]
                             [--threads N] [--budget-s SECONDS] [--out FILE]

Nothing is timed of an op that is wrong. The exit status is 1 if an op is, 0 otherwise, also when the time ran out.
"""

import argparse
import functools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    batch_norm,
    fake_quantize,
    group_affine,
    layer_norm,
    lsq_drop,
    measure,
    norm_act_quant,
    perturb,
    qgemm,
    reconstruction,
    scale_search,
    soft_likelihood_ratio,
    soft_round,
    softmax_cross_entropy,
    softmax_entropy,
)
from benchmarks.registry import IMPLEMENTATIONS, SUITES, Case, Op, Problem, floor_us, problem

OPS = (
    batch_norm.OP,
    fake_quantize.OP,
    softmax_entropy.OP,
    soft_likelihood_ratio.OP,
    softmax_cross_entropy.OP,
    perturb.OP,
    lsq_drop.OP,
    soft_round.OP,
    reconstruction.LOSS,
    reconstruction.GATHER_MIX,
    qgemm.OP,
    norm_act_quant.OP,
    norm_act_quant.CODES,
    group_affine.OP,
    layer_norm.OP,
    scale_search.OP,
)
_SEED = 0
_CPU_SECONDS = {"tiny": 0.01, "cpu": 0.3, "cuda": 0.3}  # of repeating each call
_IDENTITY = ("op", "variant", "direction", "model", "shape", "dtype", "layout", "impl", "device", "source")


def _identity(row: dict[str, Any]) -> str:
    return json.dumps([row.get(name) for name in _IDENTITY])


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _append(path: Path, row: dict[str, Any]) -> None:
    cut_off = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a") as file:
        file.write("\n" * cut_off + json.dumps(row) + "\n")


def _ordered(suite: str) -> list[tuple[Op, Case]]:
    """The first case of every op, then the second, ...: if the time runs out, every op has rows."""
    cases = [[(op, case) for case in op.cases(suite)] for op in OPS]
    longest = max(map(len, cases))
    return [of_op[i] for i in range(longest) for of_op in cases if i < len(of_op)]


def _measure(made: Problem, name: str, device: torch.device, cpu_seconds: float) -> dict[str, Any]:
    if name == "compile" and device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return {"p20_us": None, "p50_us": None, "p80_us": None, "note": "not measured: no C++ compiler"}
    try:
        times, timer = measure.time_us(made.timed(name), device, cpu_seconds)
    except Exception as error:
        # Whatever a baseline cannot do on this machine belongs into its row; our own op has been checked before.
        if name == "ttaq":
            raise
        return {"p20_us": None, "p50_us": None, "p80_us": None, "note": f"not measured: {error!s:.200}"}
    p20, p50, p80 = (round(microseconds / len(made.copies), 3) for microseconds in times)
    return {"p20_us": p20, "p50_us": p50, "p80_us": p80, "timer": timer, **measure.gpu_state(device)}


def run(
    device: torch.device, suite: str, implementations: list[str], budget_s: float, out: Path, say: Callable[[str], None]
) -> int:
    """Append rows to `out` until everything is measured or `budget_s` seconds have passed; the number of wrong ops."""
    start = time.perf_counter()
    machine = measure.environment(device)
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {_identity(row) for row in _rows(out)}
    left = wrong = 0
    measure.warm_up(device)
    for op, case in _ordered(suite):
        base = {**case.key, **machine}
        names = [name for name in op.implementations(case) if name in implementations]
        names = [name for name in names if _identity({**base, "impl": name}) not in done]
        if not names:
            continue
        if time.perf_counter() - start > budget_s:
            left += 1
            continue
        made = problem(op, case, device, _SEED)
        right, error, exact = made.check()
        if not right:
            wrong += 1
            say(f"{case.key}: NOT TIMED, the result is wrong by up to {error:.3g}")
            continue
        moved = op.bytes_moved(case)
        floor = floor_us(moved, str(machine["device"]))
        for name in names:
            times = _measure(made, name, device, _CPU_SECONDS[suite])
            row = {**base, "impl": name, **times, "bytes": moved, "seed": _SEED}
            median = row["p50_us"]
            row["floor_us"] = None if floor is None else round(floor, 3)
            row["frac_of_floor"] = None if floor is None or not median else round(floor / median, 4)
            row |= {"max_abs_err": error, "exact": exact} if name == "ttaq" else {}
            _append(out, row)
            shape = "x".join(map(str, case.shape))
            say(f"{op.name:16}{base['direction']:8} {shape:18} {base['dtype']!s:9}{case.layout:14}{name:8} {median} us")
    say(f"results in {out}" + (f"; {left} cases left, run again to measure them" if left else ""))
    return wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--suite", choices=SUITES, help="the shapes to time, by default those for the device")
    parser.add_argument("--impls", default=",".join(IMPLEMENTATIONS), help="what to time, separated by commas")
    # More threads wait for each other, which on a busy machine is all that would be measured.
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, by default 1, which can be repeated")
    parser.add_argument("--budget-s", type=float, default=540.0, help="start no case after this many seconds")
    parser.add_argument("--out", type=Path, help="file of JSON lines to append to")
    options = parser.parse_args(arguments)
    implementations = options.impls.split(",")
    unknown = set(implementations) - set(IMPLEMENTATIONS)
    if unknown:
        parser.error(f"--impls: unknown {sorted(unknown)}, expected some of {','.join(IMPLEMENTATIONS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; use --device cpu")
    out = options.out or Path(os.environ.get("OUT", "benchmarks/results")) / f"kernels_{options.device}.jsonl"
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    say = functools.partial(print, flush=True)
    return 1 if run(device, options.suite or options.device, implementations, options.budget_s, out, say) else 0


if __name__ == "__main__":
    sys.exit(main())
