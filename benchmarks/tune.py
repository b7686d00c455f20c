"""Finds the launch configurations of a GPU and writes the table that `ttaq_kernels` looks them up in.

    python -m benchmarks.tune [--op NAME,...] [--budget-s SECONDS] [--out FOLDER]

Times candidates at the shapes of the suite `cuda` and keeps one only where it returns the same bits as the default and
is faster by more than the noise. Called again it goes on where the time ran out. The file it writes, one for each GPU,
is used where TTAQ_KERNEL_CONFIGS names its folder; `ttaq_kernels/configs` is for those that are shipped.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import fake_quantize, measure, qgemm
from benchmarks.registry import Op, problem
from ttaq_kernels import _config, _gemm_tiles
from ttaq_kernels import fake_quant as _fake_quant

Config = dict[str, int]

# A candidate must be faster than the default by this share: repeated measurements differ by less.
_NOISE = 0.03


def _gemm_candidates() -> list[Config]:
    shapes = {(tile.rows, tile.outputs) for tile in _gemm_tiles._TILES} | {(128, 256), (256, 64), (256, 128)}
    return [
        {"BLOCK_M": rows, "BLOCK_N": outputs, "num_warps": warps, "num_stages": stages}
        for (rows, outputs), warps, stages in itertools.product(sorted(shapes), (4, 8), (2, 3, 4))
    ]


def _elementwise_candidates() -> list[Config]:
    return [{"TILE": tile, "num_warps": warps} for tile in (1024, 2048, 4096, 8192) for warps in (2, 4, 8)]


# Op in the table -> benchmark, the module that asks for the configuration, candidates.
TUNABLE: dict[str, tuple[Op, Any, Callable[[], list[Config]]]] = {
    "packed_linear": (qgemm.OP, _gemm_tiles, _gemm_candidates),
    "fake_quantize": (fake_quantize.OP, _fake_quant, _elementwise_candidates),
}


def search(default: Config, candidates: Iterable[Config], time_of: Callable[[Config], float | None]) -> Config | None:
    """The fastest candidate if it beats the default by more than the noise; `time_of` is None for one that is out."""
    base = time_of(default)
    if base is None:
        raise ValueError(f"search: the default {default} gave no time")
    limit, best = base * (1 - _NOISE), None
    for candidate in candidates:
        taken = None if candidate == default else time_of(candidate)
        if taken is not None and taken < limit:
            limit, best = taken, candidate
    return best


@contextmanager
def _asked(module: Any) -> Iterator[list[tuple[str, Config]]]:
    """The keys that `module` asks for while it is entered, each with its default."""
    asked: list[tuple[str, Config]] = []

    def remember(op: str, key: str, default: Config, x: Tensor) -> Config:
        asked.append((key, dict(default)))
        return _config.tuned(op, key, default, x)

    with mock.patch.object(module, "tuned", remember):
        yield asked


def read_table(path: Path) -> dict[str, Any]:
    """The table at `path`, or an empty one."""
    table: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"configs": {}, "tried": {}}
    return table


def tune(
    table: dict[str, Any],
    names: list[str],
    device: torch.device,
    suite: str,
    seconds_left: Callable[[], float],
    timer: Callable[[Callable[[], None]], float],
    say: Callable[[str], None],
) -> bool:
    """Fill `table`, of which `tried` lists the keys that are done; False if the time ran out before the last."""
    for name in names:
        op, module, candidates = TUNABLE[name]
        for case in op.cases(suite):
            if case.step:
                continue
            if seconds_left() <= 0:
                return False
            made = problem(op, case, device, seed=0)
            inputs = made.copies[0][0]
            with torch.no_grad(), _asked(module) as asked, _config.forced(name, {}):
                expected = op.ours(*inputs)
            if not asked:
                continue
            (key, default), *_ = asked
            if key in table["tried"].setdefault(name, []):
                continue
            run = made.timed("ttaq")

            def time_of(config: Config) -> float | None:
                try:
                    with torch.no_grad(), _config.forced(name, config):  # noqa: B023 (used within this iteration)
                        if not torch.equal(op.ours(*inputs), expected):  # noqa: B023
                            return None
                        return timer(run)  # noqa: B023
                except Exception as error:
                    # Tiles that do not fit a GPU fail in many ways; they are no candidates there.
                    say(f"{name} {key} {config}: {error!s:.100}")  # noqa: B023
                    return None

            best = search(default, candidates(), time_of)
            table["tried"][name].append(key)
            if best is not None:
                table["configs"].setdefault(name, {})[key] = best
            say(f"{name} {key}: {best or 'default'}")
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.partition("\n")[0])
    parser.add_argument("--op", default=",".join(TUNABLE), help="what to tune, separated by commas")
    parser.add_argument("--budget-s", type=float, default=540.0, help="start no shape after this many seconds")
    folder = Path(os.environ.get(_config.FOLDER_VARIABLE, "ttaq_kernels/configs"))
    parser.add_argument("--out", type=Path, default=folder, help="folder of the table")
    options = parser.parse_args(arguments)
    names = options.op.split(",")
    if unknown := set(names) - set(TUNABLE):
        parser.error(f"--op: unknown {sorted(unknown)}, expected some of {','.join(TUNABLE)}")
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was tuned", file=sys.stderr)
        return 2
    device, start = torch.device("cuda", torch.cuda.current_device()), time.perf_counter()
    gpu, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    path = options.out / _config.table_name(gpu, capability)
    table = {**read_table(path), "gpu": gpu, "capability": capability, **measure.environment(device)}
    measure.warm_up(device)
    finished = tune(
        table,
        names,
        device,
        "cuda",
        lambda: options.budget_s - (time.perf_counter() - start),
        lambda run: measure.time_us(run, device, 0.0)[0][1],
        lambda line: print(line, flush=True),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")
    print(f"table in {path}" + ("" if finished else "; not finished, run again to go on"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
