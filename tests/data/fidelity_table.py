"""The table `fidelity.csv`: how much each corruption changes 64 images by the oracle and by ttaq, and how far the two
may be apart.

A row: side, kind, severity; by the oracle the mean over the images of the mean absolute difference to the clean image
`mae` (levels of 255) and of PSNR `psnr` (dB), each image corrupted DRAWS times; the bounds `mae_within` and
`psnr_within` on the difference to these figures; and the figures of ttaq, `ttaq_mae` and `ttaq_psnr`. Kinds that draw
nothing are bound by 0.1 levels and 0.05 dB, some blurs by SLACK; to that, random kinds add four standard errors of the
difference between two such means on the same images, found from four draws of ttaq.

    python tests/data/fidelity_table.py [--side SIDE] [KIND ...]    makes rows again, by default all (15 minutes)
    python tests/data/fidelity_table.py --ttaq                      only the figures of ttaq, the others stay
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import corruption_oracle as oracle
import numpy as np
import torch
from corruption_images import pictures
from PIL import Image
from scipy import ndimage

from ttaq.data.corruptions import CORRUPTIONS, VALIDATION_CORRUPTIONS, corrupt

FILE = Path(__file__).with_name("fidelity.csv")
IMAGES = 64
KINDS = (*CORRUPTIONS, *VALIDATION_CORRUPTIONS)
SIDES = (32, 224)
DRAWS = {32: 8, 224: 1}  # More would narrow the bounds; at 224 pixels the oracle takes seconds per image.
SPREAD_DRAWS = 4
# In dB. Where an image is smooth, a blur leaves values on their level. Rounding errors of fp64 drop some of them by one
# level (see `truncate_to_level`), which in such an image is much of the little damage there is.
SLACK = {"defocus_blur": 0.3, "gaussian_blur": 0.3, "glass_blur": 0.45}


class Row(NamedTuple):
    mae: float
    psnr: float
    mae_within: float
    psnr_within: float
    ttaq_mae: float
    ttaq_psnr: float


@lru_cache(maxsize=1)
def textures() -> list[np.ndarray]:
    """Five coloured clouds, uint8 (300, 400, 3), in place of photographs of frost."""
    rng = np.random.default_rng(5)
    clouds = ndimage.gaussian_filter(rng.random((5, 300, 400, 3)), (0, 8, 8, 0))
    low, high = clouds.min((1, 2, 3), keepdims=True), clouds.max((1, 2, 3), keepdims=True)
    return list(np.uint8(255 * (clouds - low) / (high - low)))


def write_textures(folder: Path) -> Path:
    for number, texture in enumerate(textures(), start=1):
        Image.fromarray(texture).save(folder / f"frost{number}.png")
    return folder


def figures(images: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """(2, N): mean absolute difference in levels and PSNR in dB of each image. Both uint8 (N, H, W, 3)."""
    difference = images.astype(np.float64) - clean
    error = (difference**2).mean((1, 2, 3)).clip(1e-3)
    return np.stack([np.abs(difference).mean((1, 2, 3)), 10 * np.log10(255**2 / error)])


def by_oracle(side: int, kind: str, severity: int) -> np.ndarray:
    """Mean absolute difference and PSNR of the oracle: (2)."""
    clean, options = pictures(side, IMAGES), {}
    if kind == "frost":
        layers = [texture / 255 for texture in textures()]
        options["textures"] = [oracle.shrunk_texture(layer) for layer in layers] if side == 32 else layers
    seeds = range(severity, 10 * DRAWS[side], 10)
    draws = [oracle.corrupt_images(clean, kind, severity, seed, **options) for seed in seeds]
    return np.mean([figures(images, clean) for images in draws], (0, 2))


def by_ttaq(side: int, kind: str, severity: int, seeds: Iterable[int], frost: Path) -> np.ndarray:
    """Mean absolute difference and PSNR of ours for each draw and image: (seeds, 2, N)."""
    clean, found = pictures(side, IMAGES), []
    images = torch.from_numpy(np.ascontiguousarray(clean.transpose(0, 3, 1, 2)))
    for seed in seeds:
        result = corrupt(images, kind, severity, torch.Generator().manual_seed(seed), frost_textures=frost)
        found.append(figures((result * 255).round().byte().permute(0, 2, 3, 1).numpy(), clean))
    return np.stack(found)


def found(side: int, kind: str, severity: int, frost: Path) -> tuple[float, float]:
    """Mean absolute difference and PSNR of ours, as the table has them."""
    mae, psnr = by_ttaq(side, kind, severity, range(DRAWS[side]), frost).mean((0, 2)).tolist()
    return mae, psnr


def read_table() -> dict[tuple[int, str, int], Row]:
    """(side, kind, severity) to its row."""
    with FILE.open(newline="") as file:
        return {
            (int(row["side"]), row["kind"], int(row["severity"])): Row(*(float(row[field]) for field in Row._fields))
            for row in csv.DictReader(file)
        }


def write_table(table: dict[tuple[int, str, int], Row]) -> None:
    order = [(side, kind, severity) for side in SIDES for kind in KINDS for severity in range(1, 6)]
    with FILE.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("side", "kind", "severity", *Row._fields))
        rows.writerows((*key, *(f"{value:.3f}" for value in table[key])) for key in order if key in table)


def make_row(side: int, kind: str, severity: int, frost: Path) -> Row:
    mae, psnr = by_oracle(side, kind, severity)
    draws = by_ttaq(side, kind, severity, range(100, 100 + SPREAD_DRAWS), frost)
    errors = 4 * np.sqrt(2 / DRAWS[side] * draws.var(0, ddof=1).mean(1) / IMAGES)
    bounds = 0.1 + errors[0], SLACK.get(kind, 0.05) + errors[1]
    return Row(mae, psnr, *bounds, *found(side, kind, severity, frost))


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes rows of fidelity.csv again.")
    parser.add_argument("kinds", nargs="*", metavar="KIND", default=KINDS, help="default: all")
    parser.add_argument("--side", type=int, choices=SIDES, help="default: both")
    parser.add_argument("--ttaq", action="store_true", help="only the figures of ttaq")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = read_table() if FILE.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        frost = write_textures(Path(folder))
        for side in SIDES if options.side is None else (options.side,):
            for kind in options.kinds:
                for key in [(side, kind, severity) for severity in range(1, 6)]:
                    if options.ttaq:
                        mae, psnr = found(*key, frost)
                        table[key] = table[key]._replace(ttaq_mae=mae, ttaq_psnr=psnr)
                    else:
                        table[key] = make_row(*key, frost)
                    print(*key, *(f"{value:.2f}" for value in table[key]), flush=True)
    write_table(table)


if __name__ == "__main__":
    main()
