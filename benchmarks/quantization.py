"""The experiment of quantization.toml: quantizes, adapts, and appends rows that `ttaq report` reads.

    python -m benchmarks.quantization --arms known,mode --schemes W2A4,W3A3 --seeds 0,1,2 --stage choose

`--stage choose` runs on the validation images and corruptions, `--stage report` on the reporting images and the 15
corruptions, `--stage clean` on the clean reporting images, without adaptation. A model that is there is not quantized
again, a row that is there not run again: interrupted, the same command goes on. `--base ARM` is what the arms of
`parts` change.
"""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path
from typing import Any

from ttaq.cli import main as ttaq

PLAN = Path(__file__).with_suffix(".toml")
STAGES = {
    "choose": ["--corruptions", "validation", "--split", "validate"],
    "report": ["--corruptions", "all", "--split", "report"],
    "clean": ["--corruptions", "clean", "--split", "report"],
}


def arms(wanted: list[str], base: str) -> dict[str, dict[str, Any]]:
    """The settings of each arm that is named, by itself or by its section; `a+b` joins parts."""
    plan = tomllib.loads(PLAN.read_text())
    single = {**plan["known"], **plan["components"], **plan["mode"]}
    found: dict[str, dict[str, Any]] = {}
    for name in wanted:
        for arm in plan.get(name, [name]):
            parts = [part for part in arm.split("+") if part in plan["parts"]]
            own: dict[str, Any] = dict(single[arm]) if arm in single else dict(single[base])
            for part in parts:
                own |= plan["parts"][part]
            if arm not in single and len(parts) < len(arm.split("+")):
                raise SystemExit(f"no arm is named {arm!r}, see {PLAN.name}")
            found[arm] = own
    return found


def run(arm: str, settings: dict[str, Any], scheme: str, seed: int, args: argparse.Namespace) -> None:
    """One model: quantized, then adapted by each method."""
    options = dict(settings)
    method = options.pop("method")
    name = f"{args.model.split(':')[0]}-{scheme}-{arm}-{args.preset}-{args.iterations or 0}-{seed}.safetensors"
    model = args.model if method == "float" else args.work / name
    common = ["--dataset", args.dataset, "--threads", "1"]
    if method != "float" and not model.exists():
        if args.iterations and method != "rtn":
            options["iterations"] = args.iterations
        flags = [f"--option={method}.{name}={value}" for name, value in options.items()]
        code = ttaq(
            ["quantize", "--model", args.model, *common, "--scheme", scheme, "--method", method, "--preset",
             args.preset, "--seed", str(seed), "--calibration", str(args.calibration), "--out", str(model), *flags]
        )  # fmt: skip
        if code:
            raise SystemExit(code)
    methods = "source" if args.stage == "clean" else args.methods
    code = ttaq(
        ["adapt", "--model", str(model), *common, *STAGES[args.stage], "--images", str(args.images), "--batch-size",
         str(args.batch_size), "--methods", methods, "--seeds", str(seed), "--out", str(args.out)]
    )  # fmt: skip
    if code:
        raise SystemExit(code)


def main() -> None:
    """Read the flags and run every cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default="known,mode", help="sections or names of quantization.toml; a+b joins parts")
    parser.add_argument("--base", default="batch_affine", help="what `parts` change")
    parser.add_argument("--schemes", default="W2A4,W3A3,W2A2")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--stage", choices=STAGES, default="choose")
    parser.add_argument("--model", required=True, help="as for ttaq quantize")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--iterations", type=int, help="instead of those of the preset")
    parser.add_argument("--calibration", type=int, default=1024)
    parser.add_argument("--images", type=int, default=2000, help="of each corruption")
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--methods", default="norm,tent")
    parser.add_argument("--work", type=Path, required=True, help="folder for the models")
    parser.add_argument("--out", type=Path, required=True, help="row file to append to")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds.split(","):
        for scheme in args.schemes.split(","):
            for arm, settings in arms(args.arms.split(","), args.base).items():
                print(f"{scheme} {arm} seed {seed}", flush=True)
                run(arm, settings, scheme, int(seed), args)


if __name__ == "__main__":
    main()
