"""Run adaptation methods over a stream of corrupted images; one JSON line per domain, resumable."""

from __future__ import annotations

import argparse
from pathlib import Path

from ttaq.cli.arguments import (
    add_data,
    add_device,
    add_preprocessing,
    at_least_one,
    check_output,
    integers,
    method_options,
    names,
    set_up_torch,
)
from ttaq.cli.models import MODEL_HELP, Loaded, load
from ttaq.cli.progress import ProgressLine
from ttaq.data.corruptions import CORRUPTIONS, VALIDATION_CORRUPTIONS, frost_source
from ttaq.errors import InputError
from ttaq.eval import Domains, RowFile, Stream, run
from ttaq.eval.datasets import choose_preprocessing
from ttaq.eval.stream import SETTINGS, SPLITS
from ttaq.tta import METHODS, build

__all__ = ["IF_INTERRUPTED", "add_arguments", "execute"]

IF_INTERRUPTED = "finished domains are kept, the same command continues behind them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ttaq adapt`."""
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="MODEL",
        help=f"{MODEL_HELP}; may be repeated; {{seed}} in it becomes each seed, to pair calibration and stream",
    )
    add_data(parser)
    parser.add_argument("--methods", type=names, default="source,norm,tent", help=f"of {', '.join(METHODS)}")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="METHOD.NAME=VALUE",
        help="option of a method, such as tent.lr=1e-3; may be repeated",
    )
    parser.add_argument(
        "--seeds", type=integers, default="0", help="draw noise and order of the images; 0,1,2 for three"
    )
    parser.add_argument("--severity", type=int, choices=range(1, 6), default=5, help="strength of the corruptions")
    parser.add_argument(
        "--corruptions",
        type=names,
        default="all",
        help="all (the 15), validation (the four held-out ones), or names; clean stands for none",
    )
    parser.add_argument(
        "--images", type=at_least_one, metavar="N", help="images per domain; without it the whole split"
    )
    parser.add_argument("--split", choices=SPLITS, default="report", help="which test images")
    parser.add_argument("--batch-size", type=at_least_one, default=200, metavar="N", help="images per batch")
    parser.add_argument(
        "--setting",
        choices=SETTINGS,
        default="continual",
        help="one domain after the other, resetting before each, with severities going up and down, all mixed, or a "
        "long walk in which one corruption fades into the next",
    )
    parser.add_argument("--rounds", type=at_least_one, default=1, metavar="N", help="how often the corruptions recur")
    parser.add_argument(
        "--delta", type=float, metavar="D", help="classes come in bursts (Dirichlet), such as 0.1; 0 sorts by class"
    )
    parser.add_argument(
        "--tail", type=float, metavar="T", help="long-tailed: images of the rarest class per one of the most frequent"
    )
    parser.add_argument(
        "--window", type=at_least_one, default=1, metavar="N", help="with --batch-size 1, the images a method sees"
    )
    parser.add_argument("--length", type=at_least_one, metavar="N", help="transitions of --setting ccc")
    add_preprocessing(parser)
    parser.add_argument(
        "--stored",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="read the CIFAR-10-C, CIFAR-100-C or ImageNet-C folder in --data instead of corrupting the clean images",
    )
    parser.add_argument(
        "--frost", type=Path, metavar="DIR", help="textures for frost; without it DIR/frost of --data, else procedural"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="row file (JSON lines) to append to")
    add_device(parser)


def execute(args: argparse.Namespace) -> None:
    """Run the command."""
    check_output(args.out, "--out")
    options = method_options(args.option, args.methods)
    unknown = [method for method in args.methods if method not in METHODS]
    if unknown:
        raise InputError(f"--methods: unknown {', '.join(unknown)}, expected some of: {', '.join(METHODS)}")
    device = set_up_torch(args)
    frost = _frost(args)
    preprocessing = args.preprocessing
    if preprocessing == "auto":
        preprocessing = "none" if args.stored else choose_preprocessing(args.dataset, args.data)
    streams = [_stream(args, seed, frost, preprocessing) for seed in args.seeds]
    models = {(text, seed): text.replace("{seed}", str(seed)) for seed in args.seeds for text in args.model}
    loaded: dict[str, Loaded] = {}
    for text in dict.fromkeys(models.values()):
        loaded[text] = load(text)
        for method in args.methods:  # Wrong options are found now, not hours into the run.
            build(method, loaded[text].model, **options[method])
    done = 0
    with RowFile(args.out) as rows:
        for stream in streams:
            domains = Domains(stream, args.data, frost)
            for text in args.model:
                model = loaded[models[text, stream.seed]]
                for method in args.methods:
                    title = f"{model.info.scheme} {method} seed {stream.seed}"
                    with ProgressLine(title) as progress:
                        new = run(
                            model.model,
                            method,
                            domains,
                            rows,
                            options=options[method],
                            info=model.info,
                            device=device,
                            progress=progress,
                        )
                    done += bool(new)
                    print(
                        f"{title}: " + (f"mean error {new[-1]['error']:.2f} %" if new else "already complete"),
                        flush=True,
                    )
    if not done:
        print(f"nothing to do: {args.out} already holds every row of this command")


def _frost(args: argparse.Namespace) -> Path | None:
    if args.frost is None and args.data is not None and (Path(args.data) / "frost").is_dir():
        return Path(args.data) / "frost"
    return args.frost if args.frost is None else Path(args.frost)


def _stream(args: argparse.Namespace, seed: int, frost: Path | None, preprocessing: str) -> Stream:
    sets = {("all",): CORRUPTIONS, ("validation",): VALIDATION_CORRUPTIONS}
    return Stream(
        dataset=args.dataset,
        corruptions=tuple(sets.get(tuple(args.corruptions), args.corruptions)),
        severity=args.severity,
        images=args.images,
        split=args.split,
        batch_size=args.batch_size,
        seed=seed,
        setting=args.setting,
        source="stored" if args.stored else "generated",
        frost=frost_source(frost),
        rounds=args.rounds,
        delta=args.delta,
        tail=args.tail,
        window=args.window,
        length=args.length,
        preprocessing=preprocessing,
    )
