"""Does a long stream need more memory the longer it runs?

    python -m benchmarks.memory_over_stream ROWS [--from DOMAIN]

ROWS: a file of `ttaq adapt --setting ccc`. Prints the range of the peak memory of its transitions and, by least squares
with a constant for each corruption in a transition, how much it rises from one transition to the next, ± the half width
of the 95 % normal interval. --from: leaves out the transitions before, such as those of an earlier process.
"""

import argparse
from pathlib import Path

import numpy as np

from ttaq.eval import read_rows


def report(path: Path, first: int) -> str:
    rows = [row for row in read_rows(path) if row["kind"] == "domain"]
    peaks = np.array([row["memory"]["peak_mb"] for row in rows])
    pairs = [row["domain"].split("#")[0].split(">") for row in rows][first:]
    names = sorted({name for pair in pairs for name in pair})
    design = np.array([[*(float(name in pair) for name in names), index] for index, pair in enumerate(pairs)])
    found, *_ = np.linalg.lstsq(design, peaks[first:], rcond=None)
    noise = ((peaks[first:] - design @ found) ** 2).sum() / (len(design) - np.linalg.matrix_rank(design))
    half = 1.96 * np.sqrt(noise * np.linalg.pinv(design.T @ design)[-1, -1])
    images = rows[-1]["counters"]["samples"]
    return (
        f"{images} images in {len(rows)} transitions: peak {peaks.min():.0f} to {peaks.max():.0f} MB; "
        f"{found[-1]:+.2f} ± {half:.2f} MB per transition over the last {len(pairs)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--from", dest="first", type=int, default=0, metavar="DOMAIN")
    arguments = parser.parse_args()
    print(report(arguments.rows, arguments.first))


if __name__ == "__main__":
    main()
