"""Turn row files into Markdown tables and a plot."""

from __future__ import annotations

import argparse
from pathlib import Path

from ttaq.cli.arguments import check_output
from ttaq.eval import build_report, markdown, plot, read_rows

__all__ = ["IF_INTERRUPTED", "add_arguments", "execute"]

IF_INTERRUPTED = "run the command again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ttaq report`."""
    parser.add_argument("rows", type=Path, nargs="+", metavar="ROWS", help="row files of ttaq adapt")
    parser.add_argument("--baseline", default="source", help="method that the paired differences refer to")
    parser.add_argument("--out", type=Path, metavar="FILE", help="Markdown file to write; without it the terminal")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture to write (.png, .svg or .pdf)")


def execute(args: argparse.Namespace) -> None:
    """Run the command."""
    for path, flag in ((args.out, "--out"), (args.plot, "--plot")):
        if path is not None:
            check_output(path, flag)
    report = build_report([row for path in args.rows for row in read_rows(path)], args.baseline)
    text = markdown(report)
    if args.out is None:
        print(text, end="")
    else:
        args.out.write_text(text, encoding="utf-8")
        print(f"wrote {args.out}")
    if args.plot is not None:
        plot(report, args.plot)
        print(f"wrote {args.plot}")
