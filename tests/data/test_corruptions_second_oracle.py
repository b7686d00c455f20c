"""The corruptions at 224 pixels against the package `imagecorruptions`, where it is installed.

It goes back to the same published code but is not ours; a few of its kinds do not run with today's NumPy and
scikit-image, and are skipped.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from corruption_images import pictures
from fidelity_table import figures

from ttaq.data.corruptions import CORRUPTIONS, VALIDATION_CORRUPTIONS, corrupt

IMAGES = 8
MORE = {"frost": 64}  # Its five textures differ much in brightness.
# Kinds that draw nothing: the share of values that may differ, by one level.
EXACT = {
    "defocus_blur": 0.1,
    "zoom_blur": 0.005,
    "brightness": 0.05,
    "contrast": 0.005,
    "pixelate": 0.0,
    "gaussian_blur": 0.02,
    "saturate": 0.2,
}
# Kinds that draw: relative tolerance of the mean absolute difference to the clean image, and of PSNR in dB.
DRAWN = {
    "gaussian_noise": (0.01, 0.1),
    "shot_noise": (0.01, 0.1),
    "impulse_noise": (0.02, 0.15),
    "speckle_noise": (0.01, 0.1),
    "glass_blur": (0.03, 0.3),
    "motion_blur": (0.15, 1.5),
    "snow": (0.06, 0.5),
    "frost": (0.2, 1.2),
    "fog": (0.25, 2.0),
    "spatter": (0.25, 1.5),
}
# The package's elastic transform has parameters of its own and no affine part.
OTHER = {"elastic_transform"}


@pytest.fixture(scope="module")
def package() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reason = "imagecorruptions, an optional second oracle, is not installed or not importable"
        return pytest.importorskip("imagecorruptions", reason=reason, exc_type=ImportError)


def theirs(package: ModuleType, clean: np.ndarray, kind: str, severity: int) -> np.ndarray:
    """uint8 (N, 224, 224, 3)."""
    state = np.random.get_state()  # noqa: NPY002, it draws from the global generator
    np.random.seed(severity)  # noqa: NPY002
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.stack([package.corrupt(image, corruption_name=kind, severity=severity) for image in clean])
    except (AttributeError, TypeError) as error:
        pytest.skip(f"imagecorruptions cannot make {kind} with the packages installed: {error}")
    finally:
        np.random.set_state(state)  # noqa: NPY002


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", [*EXACT, *DRAWN, "jpeg_compression"])
def test_like_imagecorruptions(kind: str, severity: int, package: ModuleType) -> None:
    clean = pictures(224, 64)[: MORE.get(kind, IMAGES)]
    expected = theirs(package, clean, kind, severity)
    textures = Path(str(package.__file__)).parent / "frost" if kind == "frost" else None
    images = torch.from_numpy(np.ascontiguousarray(clean.transpose(0, 3, 1, 2)))
    result = corrupt(images, kind, severity, torch.Generator().manual_seed(severity), frost_textures=textures)
    got = (result * 255).round().byte().permute(0, 2, 3, 1).numpy()
    difference = np.abs(got.astype(int) - expected.astype(int))
    if kind in EXACT:
        assert difference.max() <= 1
        assert (difference > 0).mean() <= EXACT[kind]
    elif kind == "jpeg_compression":
        assert 10 * np.log10(255**2 / (difference**2).mean()) >= 51
    else:
        (mae, psnr), (mae_wanted, psnr_wanted) = figures(got, clean).mean(1), figures(expected, clean).mean(1)
        print(f"{kind} {severity}: {mae:.2f} / {mae_wanted:.2f} levels, {psnr:.2f} / {psnr_wanted:.2f} dB")
        assert mae == pytest.approx(mae_wanted, rel=DRAWN[kind][0])
        assert psnr == pytest.approx(psnr_wanted, abs=DRAWN[kind][1])


def test_all_kinds_are_named() -> None:
    assert {*EXACT, *DRAWN, *OTHER, "jpeg_compression"} == {*CORRUPTIONS, *VALIDATION_CORRUPTIONS}
