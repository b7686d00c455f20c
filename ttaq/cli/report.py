"""Turn row files into Markdown tables, plots and a table for other programs.

The files are those of ttaq adapt, all of one stream; with --kernels those of python -m benchmarks.run. The tables and
plots hold nothing but what is in the files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ttaq.cli.arguments import check_output
from ttaq.errors import DataError, InputError
from ttaq.eval import (
    Report,
    build_report,
    csv_table,
    kernel_markdown,
    markdown,
    plot,
    plot_cost,
    plot_stream,
    read_kernel_rows,
    read_rows,
)
from ttaq.io.atomic import write_atomically

__all__ = ["IF_INTERRUPTED", "add_arguments", "execute"]

IF_INTERRUPTED = "run the command again"

_PLOTS = {"domains.png": plot, "stream.png": plot_stream, "cost.png": plot_cost}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ttaq report`."""
    parser.add_argument("rows", type=Path, nargs="+", metavar="ROWS", help="row files of ttaq adapt")
    parser.add_argument("--baseline", default="source", help="method that the paired differences refer to")
    parser.add_argument(
        "--baseline-group",
        metavar="TEXT",
        help="part of the name of the group of models (such as W8A8) that the differences between groups refer to; "
        "without it float, or the first group where there is no float one",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="Markdown file to write; without it the terminal")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="table to write, one line per domain of each run")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="picture of the error by domain to write (.png, .svg or .pdf)"
    )
    parser.add_argument(
        "--plots",
        type=Path,
        metavar="DIR",
        help=f"folder to write all pictures to: {', '.join(_PLOTS)} "
        "(error by domain, error over the stream, accuracy against latency and memory)",
    )
    parser.add_argument(
        "--kernels", action="store_true", help="the files hold times of kernels: a table for each device and op"
    )


def execute(args: argparse.Namespace) -> None:
    """Run the command."""
    taken = list(args.rows)
    for path, flag in ((args.out, "--out"), (args.csv, "--csv"), (args.plot, "--plot")):
        if path is not None:
            check_output(path, flag, taken)
            taken.append(path)
    if args.kernels:
        _kernels(args)
        return
    if args.plots is not None:
        _make_folder(args.plots)
    rows = [row for path in args.rows for row in read_rows(path)]
    report = build_report(rows, args.baseline, args.baseline_group)
    _write_text(markdown(report), args.out)
    if args.csv is not None:
        _write_text(csv_table(report), args.csv)
    _write_plots(report, args)


def _kernels(args: argparse.Namespace) -> None:
    for value, flag in ((args.csv, "--csv"), (args.plot, "--plot"), (args.plots, "--plots")):
        if value is not None:
            raise InputError(f"{flag}: --kernels makes Markdown tables only; leave {flag} out")
    _write_text(kernel_markdown([row for path in args.rows for row in read_kernel_rows(path)]), args.out)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--plots: cannot use the folder {folder} ({error.strerror}); choose another one") from None
    for name in _PLOTS:
        check_output(folder / name, "--plots")


def _write_text(text: str, path: Path | None) -> None:
    if path is None:
        print(text, end="")
        return
    write_atomically("report", path, text.encode(), DataError)
    print(f"wrote {path}")


def _write_plots(report: Report, args: argparse.Namespace) -> None:
    pictures = [] if args.plot is None else [(plot, args.plot)]
    if args.plots is not None:
        pictures += [(draw, args.plots / name) for name, draw in _PLOTS.items()]
    for draw, path in pictures:
        draw(report, path)
        print(f"wrote {path}")
