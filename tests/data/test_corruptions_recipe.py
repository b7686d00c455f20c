"""Every corruption at every severity against the recipe in NumPy, SciPy and PIL, on the same clean images.

Kinds without randomness are compared pixel by pixel. Random kinds are compared in three figures of the damage: mean
absolute difference to the clean image, mean PSNR, mean signed difference; TOLERANCE states how far apart they may be,
about four standard errors of the comparison at the number of images used.
"""

from __future__ import annotations

from pathlib import Path

import corruption_oracle as oracle
import numpy as np
import pytest
import torch
from corruption_images import cifar_images, imagenet_images, pictures
from published_parameters import published

from ttaq.data.corruptions import CORRUPTIONS, VALIDATION_CORRUPTIONS, corrupt
from ttaq.data.corruptions.parameters import parameters_of

# Kinds that draw nothing, and the share of values that may differ (by one level) from the oracle.
EXACT = {
    "defocus_blur": 0.2,
    "zoom_blur": 0.02,
    "brightness": 0.02,
    "contrast": 0.02,
    "pixelate": 0.0,
    "gaussian_blur": 0.02,
    "saturate": 0.02,
}
# Kind: images at 32 px, relative tolerance of the mean absolute difference, of PSNR in dB.
TOLERANCE = {
    "gaussian_noise": (64, 0.01, 0.1),
    "shot_noise": (64, 0.01, 0.1),
    "impulse_noise": (64, 0.05, 0.25),
    "speckle_noise": (64, 0.01, 0.1),
    "glass_blur": (24, 0.03, 0.3),
    "motion_blur": (192, 0.13, 1.0),
    "snow": (64, 0.05, 0.5),
    "fog": (192, 0.08, 0.7),
    "elastic_transform": (64, 0.08, 0.7),
    "spatter": (128, 0.2, 0.9),
}
FROST = (0.5, 0.25, 0.75)


def ours(images: np.ndarray, name: str, severity: int, frost_textures: Path | None = None) -> np.ndarray:
    """uint8 (N, H, W, 3), as the oracle gives them."""
    clean = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    generator = torch.Generator().manual_seed(severity)
    result = corrupt(clean, name, severity, generator, frost_textures=frost_textures)
    return (result * 255).round().byte().permute(0, 2, 3, 1).numpy()


def figures(images: np.ndarray, clean: np.ndarray) -> tuple[float, float, float]:
    """Mean absolute difference in levels, mean PSNR in dB, mean signed difference in levels."""
    difference = images.astype(float) - clean
    error = (difference**2).mean((1, 2, 3)).clip(1e-3)
    return float(np.abs(difference).mean()), float((10 * np.log10(255**2 / error)).mean()), float(difference.mean())


def compare(clean: np.ndarray, name: str, severity: int, slack: float = 1.0) -> None:
    got, expected = ours(clean, name, severity), oracle.corrupt_images(clean, name, severity, seed=severity)
    difference = np.abs(got.astype(int) - expected.astype(int))
    if name in EXACT:
        assert difference.max() <= 1
        assert (difference > 0).mean() <= EXACT[name]
    elif name == "jpeg_compression":
        assert 10 * np.log10(255**2 / (difference**2).mean()) >= 51
        assert (difference > 2).mean() < 0.02
    else:
        _, relative, decibel = TOLERANCE[name]
        (size, psnr, bias), (size_wanted, psnr_wanted, bias_wanted) = figures(got, clean), figures(expected, clean)
        print(f"{name} {severity}: {size:.2f} / {size_wanted:.2f}, {psnr:.2f} / {psnr_wanted:.2f} dB, bias {bias:.2f}")
        assert size == pytest.approx(size_wanted, rel=slack * relative)
        assert psnr == pytest.approx(psnr_wanted, abs=slack * decibel)
        assert bias == pytest.approx(bias_wanted, abs=slack * relative * size_wanted + 0.1)


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", sorted(oracle.RECIPES))
def test_small_images(name: str, severity: int) -> None:
    compare(pictures(32, 192)[: TOLERANCE.get(name, (64,))[0]], name, severity)


@pytest.mark.parametrize("severity", [1, 5])
@pytest.mark.parametrize("name", sorted(set(oracle.RECIPES) - {"glass_blur"}))
def test_real_cifar_images(name: str, severity: int, data_folder: Path) -> None:
    compare(cifar_images(data_folder, 64), name, severity, slack=2.0 if name == "fog" else 1.0)


LARGE = ("gaussian_noise", "gaussian_blur", "defocus_blur", "zoom_blur", "brightness", "pixelate", "jpeg_compression")


@pytest.mark.parametrize("severity", [1, 3, 5])
@pytest.mark.parametrize("name", LARGE)
def test_large_images(name: str, severity: int) -> None:
    compare(pictures(224, 64)[2:4], name, severity)


@pytest.mark.parametrize(("name", "severity"), [(name, 1 + i % 5) for i, name in enumerate(sorted(oracle.RECIPES))])
def test_real_images_of_imagenet(name: str, severity: int, data_folder: Path) -> None:
    images = imagenet_images(data_folder, {"glass_blur": 2, "zoom_blur": 4}.get(name, 12))
    compare(images, name, severity, slack=3.0 if name in ("fog", "motion_blur", "elastic_transform") else 1.5)


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("side", [32, 224])
def test_frost_of_one_colour(severity: int, side: int, tmp_path: Path) -> None:
    """With textures of one colour nothing is left to chance: the mixture itself is compared."""
    from PIL import Image

    colour = tuple(round(255 * value) for value in FROST)
    for number in range(1, 6):
        Image.new("RGB", (300, 240), colour).save(tmp_path / f"frost{number}.png")
    clean = pictures(side, 4 if side == 224 else 192)[:4]
    texture = np.broadcast_to(np.array(colour) / 255, (240, 300, 3))
    expected = oracle.corrupt_images(clean, "frost", severity, seed=0, textures=[texture])
    assert np.abs(ours(clean, "frost", severity, tmp_path).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize("name", [*CORRUPTIONS, *VALIDATION_CORRUPTIONS])
def test_parameters_are_the_published_ones(name: str, side: int) -> None:
    unit = side if name == "elastic_transform" else 1
    for severity in range(1, 6):
        numbers = [unit * number for number in parameters_of(name, severity, side, side)]
        assert numbers == pytest.approx(published(name, severity, side), rel=1e-12)


def test_all_kinds_are_compared() -> None:
    assert {*CORRUPTIONS, *VALIDATION_CORRUPTIONS} == {*oracle.RECIPES, "frost"}
    assert set(oracle.RECIPES) == {*EXACT, *TOLERANCE, "jpeg_compression"}
