"""Are the corruptions as hard for a network, relative to each other, as the published ImageNet-C tables say?

    python -m benchmarks.corruption_difficulty ROWS ...

ROWS: files of `ttaq adapt` on ImageNet, one severity each. Prints, per file and model, Spearman's rank correlation over
the 15 corruptions between the error of method `source` and that of published networks on ImageNet-C: AlexNet at every
severity, ResNet-50 at severity 5.

Sources: AlexNet: Hendrycks and Dietterich (arXiv 1903.12261), the normalisation of the corruption error. ResNet-50 of
torchvision: the row without adaptation of Niu et al., EATA (arXiv 2204.02610).
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from ttaq.errors import TtaqError
from ttaq.eval import read_rows
from ttaq.eval.stream import parse_description

# Error in percent at severities 1 to 5.
ALEXNET = {
    "gaussian_noise": (69.5, 82.5, 93.6, 98.1, 99.5),
    "shot_noise": (71.2, 85.1, 93.6, 98.2, 99.1),
    "impulse_noise": (78.4, 89.8, 94.9, 98.7, 99.5),
    "defocus_blur": (65.6, 73.2, 85.0, 91.4, 94.7),
    "glass_blur": (64.3, 75.1, 88.8, 91.6, 93.3),
    "motion_blur": (58.4, 70.0, 82.1, 89.8, 92.6),
    "zoom_blur": (70.0, 77.0, 80.8, 84.2, 87.2),
    "snow": (71.7, 88.4, 86.5, 91.9, 95.0),
    "frost": (61.4, 79.7, 88.8, 89.9, 93.4),
    "fog": (67.5, 76.1, 84.4, 87.3, 94.5),
    "brightness": (45.1, 48.5, 54.0, 62.2, 72.4),
    "contrast": (64.5, 76.2, 88.9, 97.8, 99.3),
    "elastic_transform": (52.6, 70.1, 55.7, 64.1, 80.6),
    "pixelate": (52.2, 54.6, 73.7, 87.1, 91.3),
    "jpeg_compression": (51.0, 54.7, 57.3, 65.5, 74.8),
}
RESNET50 = dict(
    zip(
        ALEXNET,
        (97.8, 97.1, 98.1, 82.1, 90.2, 85.2, 77.5, 83.1, 76.7, 75.6, 41.1, 94.6, 83.0, 79.4, 68.4),
        strict=True,
    )
)  # at severity 5


def ranks(values: list[float]) -> np.ndarray:
    """The place of each value in ascending order; equal values share the mean of their places."""
    array = np.array(values)
    return np.array([(array < value).sum() + ((array == value).sum() - 1) / 2 for value in array])


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's coefficient: the correlation of the ranks."""
    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


def report(path: Path) -> list[str]:
    """One line per model of a row file."""
    errors: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read_rows(path):
        if row["kind"] == "domain" and row["method"] == "source" and row["domain"] in ALEXNET:
            severity = parse_description(row["stream"])["severity"]
            errors[f"{row['model']}, {row['scheme']}", severity][row["domain"]].append(row["error"])
    lines = []
    for (model, severity), by_name in errors.items():
        names = [name for name in ALEXNET if name in by_name]
        if len(names) < 3:
            lines.append(f"{model}, severity {severity}: {len(names)} corruptions are too few")
            continue
        ours = [float(np.mean(by_name[name])) for name in names]
        published = {"AlexNet": [ALEXNET[name][int(severity) - 1] for name in names]}
        if severity == "5":
            published["ResNet-50"] = [RESNET50[name] for name in names]
        found = ", ".join(f"{rank_correlation(ours, theirs):+.2f} with {net}" for net, theirs in published.items())
        lines.append(f"{model}, severity {severity}, {len(names)} corruptions: rank correlation {found}")
    return lines or [f"{path} has no row of method source on an ImageNet-C corruption"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.corruption_difficulty", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("rows", type=Path, nargs="+", metavar="ROWS", help="row files of ttaq adapt")
    try:
        for path in parser.parse_args(arguments).rows:
            print("\n".join(report(path)))
        networks = [errors[-1] for errors in ALEXNET.values()], list(RESNET50.values())
        print(f"AlexNet with ResNet-50 at severity 5: {rank_correlation(*networks):+.2f}")
    except TtaqError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
