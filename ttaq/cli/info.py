"""Show what a model or state file holds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ttaq.io import load_model, read_header
from ttaq.scheme import Scheme

__all__ = ["IF_INTERRUPTED", "add_arguments", "execute"]

IF_INTERRUPTED = "nothing was changed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ttaq info`."""
    parser.add_argument("file", type=Path, metavar="FILE", help="a file written by ttaq")


def execute(args: argparse.Namespace) -> None:
    """Run the command."""
    header = read_header(args.file)
    fields = {key: value for key, value in header.items() if key != "state"}
    if fields.get("scheme") is not None:
        fields["scheme"] = str(Scheme.from_dict(fields["scheme"]))
    for key, value in {**fields, "size": f"{args.file.stat().st_size:,} bytes"}.items():
        print(f"{key + ':':16}{value if isinstance(value, str) else json.dumps(value)}")
    # Layers of a user's own architecture cannot be built from the file alone.
    if header["kind"] == "model" and header["architecture"] is not None:
        model = load_model(args.file).model
        print(f"{'parameters:':16}{sum(parameter.numel() for parameter in model.parameters()):,}")
        if hasattr(model, "report"):
            print(f"\n{model.report}")
