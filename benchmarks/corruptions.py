"""Times every corruption on the CPU: images per second at 32 and 224 pixels, severity 5.

    python -m benchmarks.corruptions [--threads N] [--out FILE] [--render [PAGE]]

Writes one JSON line per kind and size: images per second of the clock and of CPU time, each by the best of many short
repeats. The clock shows what other work on the machine left over; CPU time, what one free core would do. At 32 pixels
500 images are corrupted together, at 224 pixels one at a time, as `ttaq data corrupt` makes its sets. Frost is drawn,
not taken from textures.
"""

import argparse
import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from ttaq.data.corruptions import CORRUPTIONS, VALIDATION_CORRUPTIONS, corrupt

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "benchmarks" / "results" / "corruptions_cpu.jsonl"
PAGE = ROOT / "docs" / "results" / "corruptions.md"
BATCHES = {32: 500, 224: 1}
KINDS = (*CORRUPTIONS, *VALIDATION_CORRUPTIONS)
SEVERITY = 5
SECONDS = 2.0  # of repeating each call, at least REPEATS times
REPEATS = 20


def images(count: int, side: int) -> torch.Tensor:
    """uint8 (count, 3, side, side): coarse coloured fields with some fine noise, as photographs have both."""
    generator = torch.Generator().manual_seed(side)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    fields = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic", align_corners=True)
    fields += 0.05 * torch.randn(fields.shape, generator=generator)
    return (fields.clamp(0, 1) * 255).round().to(torch.uint8)


def repeat(run: Callable[[], object], seconds: float) -> tuple[float, float, int]:
    """The shortest time of a call in seconds, the shortest CPU time, and the number of calls. The first is left out."""
    run()
    times: list[float] = []
    cpu_times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < REPEATS or time.perf_counter() < end:
        start, cpu_start = time.perf_counter(), time.process_time()
        run()
        cpu_times.append(time.process_time() - cpu_start)
        times.append(time.perf_counter() - start)
    return min(times), min(cpu_times), len(times)


def measure_all(threads: int, say: Callable[[str], None]) -> Iterable[dict[str, Any]]:
    """A row per kind and size."""
    torch.set_num_threads(threads)
    environment = measure.environment(torch.device("cpu"))
    digest = hashlib.sha256()
    for path in sorted((ROOT / "ttaq" / "data" / "corruptions").glob("*.py")):
        digest.update(path.read_bytes())
    machine = {name: environment[name] for name in ("device", "torch", "git_sha", "date")}
    machine["source"] = digest.hexdigest()[:12]
    for side, count in BATCHES.items():
        clean = images(count, side)
        for kind in KINDS:
            generator = torch.Generator().manual_seed(0)
            run = functools.partial(corrupt, clean, kind, SEVERITY, generator)
            best, cpu, repeats = repeat(run, SECONDS)
            rates = {"images_per_s": round(count / best, 1), "images_per_cpu_s": round(count / cpu, 1)}
            say(f"{kind:18} {side:4} px " + " ".join(f"{rate:10,.1f} {name}" for name, rate in rates.items()))
            case = {"kind": kind, "side": side, "severity": SEVERITY, "batch": count, "threads": threads}
            yield case | rates | {"repeats": repeats} | machine


def render(rows: list[dict[str, Any]]) -> str:
    """The page of the rows."""
    rate = {(row["kind"], row["side"]): f"{row['images_per_s']:,.0f} | {row['images_per_cpu_s']:,.0f}" for row in rows}
    kinds = dict.fromkeys(row["kind"] for row in rows)
    table = "\n".join(f"| {kind} | {rate[kind, 32]} | {rate[kind, 224]} |" for kind in kinds)
    some = rows[0]
    slowest = min((row for row in rows if row["side"] == 224), key=lambda row: row["images_per_cpu_s"])
    return f"""# Speed of the corruptions

Images per second at severity 5; {some["threads"]} thread, {some["device"].partition(",")[0]},
torch {some["torch"]}, {some["date"][:10]}; 32 pixels in batches of {BATCHES[32]}, 224 pixels one image at a time.
Reading and writing files is not in it. Frost is drawn, not taken from textures.

Other work ran on the same cores. So each call was repeated at least {REPEATS} times and the best repeat counts: by the
clock, which has the waiting for a core in it, and by CPU time, which has not and is the rate of a free core. Slowest
at 224 pixels, by CPU time: {slowest["kind"]}, {slowest["images_per_cpu_s"]:.0f} per second. On a GPU: not measured.

| corruption | 32 px, clock | 32 px, CPU time | 224 px, clock | 224 px, CPU time |
|---|---:|---:|---:|---:|
{table}

Made by `python -m benchmarks.corruptions --threads {some["threads"]} --render`; the rows are in
`benchmarks/results/corruptions_cpu.jsonl`.
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.corruptions", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, default=ROWS, help="file of JSON lines to write")
    parser.add_argument(
        "--render", type=Path, nargs="?", const=PAGE, metavar="PAGE", help="Markdown page to write, too"
    )
    options = parser.parse_args(arguments)
    rows = list(measure_all(options.threads, functools.partial(print, flush=True)))
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if options.render is not None:
        options.render.write_text(render(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
