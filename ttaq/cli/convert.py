"""Turn a PyTorch checkpoint of another project into a model file; code inside the checkpoint is refused."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ttaq.cli.arguments import at_least_one, check_output, three_numbers
from ttaq.convert_foreign import convert_foreign
from ttaq.models import NAMES
from ttaq.models.external import is_external

__all__ = ["IF_INTERRUPTED", "add_arguments", "execute"]

IF_INTERRUPTED = "no file was written; run the command again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ttaq convert`."""
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a .pth, .pt, .th, .tar or safetensors file")
    parser.add_argument(
        "--architecture",
        type=_architecture,
        required=True,
        metavar="NAME",
        help=f"what the weights belong to: {', '.join(NAMES)}, timm:NAME or torchvision:NAME",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="model file to write")
    parser.add_argument("--entry", metavar="NAME", help="where in the file the weights lie, such as model_ema")
    parser.add_argument("--num-classes", type=at_least_one, metavar="N", help="without it, read from the weights")
    parser.add_argument(
        "--mean",
        type=three_numbers,
        metavar="R,G,B",
        help="mean of the images in [0, 1] that the model was trained with",
    )
    parser.add_argument("--std", type=three_numbers, metavar="R,G,B", help="their standard deviation")


def _architecture(text: str) -> str:
    if text not in NAMES and not is_external(text):
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {', '.join(NAMES)}, timm:NAME, ...)")
    return text


def execute(args: argparse.Namespace) -> None:
    """Run the command."""
    check_output(args.out, "--out", [args.source])
    options: dict[str, Any] = {"num_classes": args.num_classes, "mean": args.mean, "std": args.std}
    options = {name: value for name, value in options.items() if value is not None}
    header = convert_foreign(args.source, args.out, args.architecture, entry=args.entry, **options)
    print(f"{args.out}: {header['architecture']} {header['kwargs']}, hash {header['hash'][:12]}")
