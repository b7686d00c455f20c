"""Streams of corrupted images, runs that write rows, and reports made from rows."""

from ttaq.eval.csv_table import csv_table
from ttaq.eval.datasets import calibration_images
from ttaq.eval.domains import Domains
from ttaq.eval.kernel_report import kernel_markdown, read_kernel_rows
from ttaq.eval.markdown import markdown
from ttaq.eval.plot import plot
from ttaq.eval.plot_cost import plot_cost
from ttaq.eval.plot_stream import plot_stream
from ttaq.eval.report import Report, build_report
from ttaq.eval.rows import RowFile, read_rows
from ttaq.eval.run import ModelInfo, run
from ttaq.eval.stream import Stream
from ttaq.eval.table import table

__all__ = [
    "Domains",
    "ModelInfo",
    "Report",
    "RowFile",
    "Stream",
    "build_report",
    "calibration_images",
    "csv_table",
    "kernel_markdown",
    "markdown",
    "plot",
    "plot_cost",
    "plot_stream",
    "read_kernel_rows",
    "read_rows",
    "run",
    "table",
]
