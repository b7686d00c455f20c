"""Streams of corrupted images, runs that write rows, and reports made from rows."""

from ttaq.eval.domains import Domains
from ttaq.eval.images import calibration_images
from ttaq.eval.markdown import markdown, table
from ttaq.eval.plot import plot
from ttaq.eval.report import Report, build_report
from ttaq.eval.rows import RowFile, read_rows
from ttaq.eval.run import ModelInfo, run
from ttaq.eval.stream import Stream

__all__ = [
    "Domains",
    "ModelInfo",
    "Report",
    "RowFile",
    "Stream",
    "build_report",
    "calibration_images",
    "markdown",
    "plot",
    "read_rows",
    "run",
    "table",
]
