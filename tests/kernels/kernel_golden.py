"""Registers, spills, shared memory and instructions of every compiled kernel, kept in a file that the tests compare.

    python tests/kernels/kernel_golden.py     (make golden: with each supported Triton)

compiles every launch for every GPU with the Triton that is installed and rewrites its part of `golden.json`; the parts
of other versions stay. Triton's cache makes the second time quick.
"""

import json
import sys
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).with_name("golden.json")

# Triton version -> GPU -> launch -> a row for each kernel
Golden = dict[str, dict[str, dict[str, list[dict[str, Any]]]]]


def read_golden() -> Golden:
    golden: Golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    return golden


def write_golden(golden: Golden) -> None:
    """One launch per line, so that a change can be read as a difference."""
    versions = []
    for version in sorted(golden):
        gpus = []
        for gpu, rows in golden[version].items():
            lines = (f"   {json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows))
            gpus.append(f'  "{gpu}": {{\n' + ",\n".join(lines) + "\n  }")
        versions.append(f' "{version}": {{\n' + ",\n".join(gpus) + "\n }")
    GOLDEN.write_text("{\n" + ",\n".join(versions) + "\n}\n")


def main() -> None:
    # Not importable without Triton; the tests read the golden file without it.
    import triton
    from kernel_aot import CAPABILITIES, Compilers
    from kernel_launch import launches

    compilers = Compilers()
    started = {gpu: {name: compilers.start(name, gpu) for name in launches()} for gpu in CAPABILITIES}
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for gpu, futures in started.items():
        rows[f"sm_{gpu}"] = {name: [kernel.row for kernel in future.result()] for name, future in futures.items()}
        print(f"Triton {triton.__version__}: {len(futures)} launches for sm_{gpu}", file=sys.stderr, flush=True)
    compilers.close()
    write_golden({**read_golden(), triton.__version__: rows})


if __name__ == "__main__":
    main()
