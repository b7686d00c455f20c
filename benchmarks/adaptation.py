"""The experiments of adaptation.toml: streams through methods, and rows that `ttaq report` reads.

    python -m benchmarks.adaptation --table methods --model w4a4-{seed}.safetensors --out rows
    python -m benchmarks.adaptation --table abl --arms off,gradient_soft --model w4a4-0.safetensors --seeds 0 --out rows

Every stream has its own file in the folder `--out`: rows of different streams are not compared. Rows that are there are
not run again; interrupted, the same command goes on. `--arms` gives the methods that learn the norms arms of `abl`, of
any table; `--base ARM` is what those of `abl.answer` add to. The table `abl` runs on the validation images and
corruptions.
"""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path
from typing import Any

from ttaq.cli import main as ttaq
from ttaq.tta import METHODS
from ttaq.tta.norm_learner import NormLearner

PLAN = Path(__file__).with_suffix(".toml")
VALIDATION = ["--split", "validate", "--corruptions", "validation"]


def options_of(arm: str, plan: dict[str, Any], base: str | None) -> dict[str, Any]:
    """What an arm of `abl` sets; `off` sets nothing, the others everything that the plan changes."""
    if arm in plan["loss"]:
        own = plan["loss"][arm]
        return {"abl_loss": "soft", "abl_answer": 0.0} | own if own else {}
    if arm not in plan["answer"] or not plan["loss"].get(base):
        raise SystemExit(f"no arm is named {arm!r}, or its --base {base!r} is none of {', '.join(plan['loss'])}")
    return options_of(str(base), plan, None) | plan["answer"][arm]


def main() -> None:
    """Read the flags and run every stream."""
    plan = tomllib.loads(PLAN.read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=plan, required=True)
    parser.add_argument("--model", action="append", required=True, help="as for ttaq adapt; may be repeated")
    parser.add_argument("--arms", default="off", help="of abl.loss or abl.answer")
    parser.add_argument("--base", help="the arm of abl.loss that those of abl.answer add to")
    parser.add_argument("--methods", help="instead of those of the table")
    parser.add_argument("--streams", help="some of the table's")
    parser.add_argument("--seeds", help="instead of those of the table")
    parser.add_argument("--images", help="of each corruption, instead of those of the table")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--option", action="append", default=[], help="as for ttaq adapt; may be repeated")
    parser.add_argument("--guards", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the row files")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    table = plan[args.table]
    methods = args.methods.split(",") if args.methods else table.get("methods", ["tent", "eata"])
    settings = [options_of(arm, plan["abl"], args.base) for arm in args.arms.split(",")]
    streams = {name: table["streams"][name] for name in (args.streams or ",".join(table["streams"])).split(",")}
    common = ["--dataset", args.dataset, "--threads", "1", "--seeds", args.seeds or table.get("seeds", "0,1,2")]
    common += VALIDATION if args.table == "abl" else []
    common += [f"--model={model}" for model in args.model] + ([] if args.guards else ["--no-guards"])
    images = ["--images", args.images] if args.images else []
    for name, flags in streams.items():
        out = ["--out", str(args.out / f"{args.table}_{name}.jsonl")]
        for arm in settings:
            running = [name for name in methods if not arm or issubclass(METHODS[name], NormLearner)]
            if not running:
                continue
            own = [f"--option={method}.{key}={value}" for method in running for key, value in arm.items()]
            given = [f"--option={option}" for option in args.option]
            print(name, ",".join(running), arm, flush=True)
            if code := ttaq(["adapt", *common, "--methods", ",".join(running), *flags, *images, *own, *given, *out]):
                raise SystemExit(code)


if __name__ == "__main__":
    main()
