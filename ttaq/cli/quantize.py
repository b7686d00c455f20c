"""Quantize a float model with calibration images and write a model file.

Beside the model file stands a folder `FILE.units` while units are trained; the same command goes on from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ttaq.cli.arguments import (
    add_data,
    add_device,
    add_preprocessing,
    at_least_one,
    check_output,
    method_options,
    set_up_torch,
)
from ttaq.cli.models import MODEL_HELP, load
from ttaq.cli.progress import ProgressLine
from ttaq.errors import InputError
from ttaq.eval import calibration_images
from ttaq.io import save_model
from ttaq.ptq import METHODS, PRESETS, clear_units, quantize, settings_of
from ttaq.scheme import Scheme

__all__ = ["IF_INTERRUPTED", "add_arguments", "execute"]

IF_INTERRUPTED = "no model was written, finished units are kept; run the same command again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ttaq quantize`."""
    parser.add_argument("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    add_data(parser)
    parser.add_argument(
        "--scheme", required=True, help="bits and exceptions, such as W8A8, W4A4 or W4A4,first_last=none,linear=W8A8"
    )
    parser.add_argument("--method", default="rtn", help=f"how to quantize: {', '.join(METHODS)}")
    parser.add_argument("--preset", default="paper", help=f"length of the training: {', '.join(PRESETS)}")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="METHOD.NAME=VALUE",
        help="setting of the method, such as qdrop.iterations=2000; may be repeated",
    )
    parser.add_argument("--search", default="mse", help="how scales are found: mse or minmax")
    parser.add_argument("--calibration", type=at_least_one, default=1024, metavar="N", help="calibration images")
    parser.add_argument("--seed", type=int, default=0, help="draws the calibration images and the training")
    parser.add_argument("--batch-size", type=at_least_one, default=64, metavar="N", help="images per batch")
    parser.add_argument("--cache-mb", type=float, default=4000, metavar="MB", help="memory for the inputs of a unit")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="model file to write")
    add_preprocessing(parser)
    add_device(parser)


def execute(args: argparse.Namespace) -> None:
    """Run the command."""
    check_output(args.out, "--out", [Path(args.model), Path(args.model.rpartition(":")[2])])
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed: {args.seed}, expected an integer from 0 below 2^63")
    scheme = Scheme.parse(args.scheme)
    options = method_options(args.option, [args.method])[args.method]
    settings = settings_of(args.method, args.preset, options)  # wrong ones are found before anything is loaded
    units = args.out.with_name(f"{args.out.name}.units")
    device = set_up_torch(args)
    loaded = load(args.model)
    if loaded.info.scheme != "float":
        raise InputError(f"quantize: {args.model} is already quantized ({loaded.info.scheme}); give its float model")
    preprocessing = None if args.preprocessing == "auto" else args.preprocessing
    images = calibration_images(args.dataset, args.data, args.calibration, args.seed, preprocessing)
    with ProgressLine(f"{args.method} {scheme}") as progress:
        model = quantize(
            loaded.model.to(device),
            images,
            scheme,
            args.method,
            preset=args.preset,
            settings=options,
            checkpoint=units,
            cache_mb=args.cache_mb,
            search=args.search,
            seed=args.seed,
            batch_size=args.batch_size,
            progress=progress,
        )
    save_model(
        args.out,
        model,
        architecture=loaded.architecture,
        kwargs=loaded.kwargs,
        method=args.method,
        extra={
            "calibration_seed": args.seed,
            "quantization": {
                "calibration": f"{args.calibration}x{args.dataset}",
                "search": args.search,
                **({} if settings is None else settings.changed()),
            },
            "source_hash": loaded.info.model_hash,
        },
    )
    clear_units(units)
    quantized = sum(layer.weight_bits is not None for layer in model.report)
    print(f"{args.out}: {scheme} by {args.method}, {quantized} quantized layers, {args.calibration} calibration images")
