"""See it work: digits under 15 corruptions, a network in 2 bits, and what training and adaptation bring back."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ttaq.cli.arguments import at_least_one
from ttaq.cli.demo_model import ARCHITECTURE, demo_model
from ttaq.cli.progress import ProgressLine
from ttaq.data import load_digits, to_float
from ttaq.errors import DataError
from ttaq.eval import Domains, ModelInfo, Report, RowFile, Stream, build_report, calibration_images, plot, run, table
from ttaq.eval.metrics import error_percent
from ttaq.io import model_hash
from ttaq.ptq import quantize

__all__ = ["IF_INTERRUPTED", "add_arguments", "execute"]

IF_INTERRUPTED = "run the command again"

_SCHEME = "W2A4"
_SETTINGS: dict[str, dict[str, int]] = {
    "rtn": {},
    "ttaq": {"iterations": 200, "distillation": 100},  # in seconds, not minutes
}
_METHODS = ("source", "norm", "tent")
_CALIBRATION = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ttaq demo`."""
    parser.add_argument("--out", type=Path, default=Path("ttaq-demo"), metavar="DIR", help="folder for rows and plot")
    parser.add_argument("--severity", type=int, choices=range(1, 6), default=5, help="strength of the corruptions")
    parser.add_argument(
        "--images", type=at_least_one, default=300, metavar="N", help="test images per corruption, at most 600"
    )
    parser.add_argument("--threads", type=at_least_one, default=1, metavar="N", help="CPU threads; small tensors")


def execute(args: argparse.Namespace) -> None:
    """Run the command."""
    torch.set_num_threads(args.threads)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        rows_file, picture = args.out / "demo.jsonl", args.out / "demo.png"
        rows_file.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"demo: cannot use the folder {args.out} ({error.strerror}); choose another with --out"
        ) from None
    with ProgressLine("training") as progress:
        model, origin = demo_model(progress)
    print(f"network: {ARCHITECTURE} on 1,197 handwritten digits, {origin}")
    print(f"{_clean_error(model):.1f} % error on 600 clean test images")
    print(f"quantized to {_SCHEME} from {_CALIBRATION} images: by rtn (nearest rounding) and by ttaq (trained)")
    images = calibration_images("digits", None, _CALIBRATION, 0)
    models: dict[str | None, torch.nn.Module] = {None: model}
    for method in _SETTINGS:
        with ProgressLine(f"{_SCHEME} by {method}") as progress:
            models[method] = quantize(
                model, images, _SCHEME, method, preset="fast", settings=_SETTINGS[method], progress=progress
            )
    stream = Stream("digits", severity=args.severity, images=args.images, split="all", batch_size=100)
    domains = Domains(stream)
    with RowFile(rows_file) as rows:
        for quantization, each in models.items():
            scheme, seed = ("float", None) if quantization is None else (_SCHEME, 0)
            info = ModelInfo(ARCHITECTURE, scheme, quantization, seed, model_hash(each))
            for method in _METHODS:
                with ProgressLine(f"{quantization or scheme} {method}") as progress:
                    run(each, method, domains, rows, info=info, progress=progress)
        report = build_report(rows.rows)
    print(_errors(report))
    print(
        f"{args.images} test images per corruption, severity {args.severity}, batches of {stream.batch_size}, "
        f"one seed: differences of a point or two are chance."
    )
    plot(report, picture)
    print(f"rows: {rows_file}\nplot: {picture.resolve()}")


@torch.no_grad()
def _clean_error(model: torch.nn.Module) -> float:
    test = load_digits()[1]
    return error_percent(model(to_float(test.images)).argmax(1) == test.labels)


def _errors(report: Report) -> str:
    entries = [report.entries[group, method] for group in report.groups for method in _METHODS]
    first = [entry.rows[0][0] for entry in entries]
    header = ["error %", *(f"{row['quantization'] or 'float'} {row['method']}" for row in first)]
    lines = [
        [domain, *(f"{entry.rows[0][index]['error']:.1f}" for entry in entries)]
        for index, domain in enumerate(report.domains)
    ]
    return table(header, [*lines, ["mean", *(f"{entry.means()[0]:.1f}" for entry in entries)]])
