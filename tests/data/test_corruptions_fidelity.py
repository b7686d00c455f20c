"""How much each corruption changes 64 images, in mean absolute difference and PSNR, against the figures that the
oracle found on the same images: every kind and severity, at 32 and at 224 pixels. The bounds are in `fidelity.csv`."""

from __future__ import annotations

from pathlib import Path

import pytest
from corruption_images import pictures
from fidelity_table import IMAGES, KINDS, SIDES, by_oracle, found, read_table, write_textures

TABLE = read_table()
SEVERITIES = (1, 2, 3, 4, 5)
SLOW_ORACLE = {"zoom_blur", "spatter"}


@pytest.fixture(scope="module")
def frost(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_textures(tmp_path_factory.mktemp("frost"))


def check(side: int, kind: str, severity: int, frost: Path) -> None:
    row = TABLE[side, kind, severity]
    mae, psnr = found(side, kind, severity, frost)
    print(f"{side} {kind} {severity}: {mae:.2f} / {row.mae:.2f} levels, {psnr:.2f} / {row.psnr:.2f} dB")
    assert mae == pytest.approx(row.mae, abs=row.mae_within)
    assert psnr == pytest.approx(row.psnr, abs=row.psnr_within)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_small_images(kind: str, severity: int, frost: Path) -> None:
    check(32, kind, severity, frost)


@pytest.mark.parametrize(("kind", "severity"), [(kind, 1 + number % 5) for number, kind in enumerate(KINDS)])
def test_large_images(kind: str, severity: int, frost: Path) -> None:
    """A severity of each kind; the table has the others."""
    check(224, kind, severity, frost)


@pytest.mark.parametrize("kind", sorted({*KINDS} - SLOW_ORACLE))
def test_the_oracle_still_says_so(kind: str) -> None:
    """The stored figures, found again at one severity."""
    assert by_oracle(32, kind, 3) == pytest.approx(TABLE[32, kind, 3][:2], abs=5e-3)


def test_the_table_is_complete_and_within_its_bounds() -> None:
    assert list(TABLE) == [(side, kind, severity) for side in SIDES for kind in KINDS for severity in SEVERITIES]
    assert all(len(pictures(side, IMAGES)) == 64 for side in SIDES)
    for row in TABLE.values():
        assert row.ttaq_mae == pytest.approx(row.mae, abs=row.mae_within)
        assert row.ttaq_psnr == pytest.approx(row.psnr, abs=row.psnr_within)


def test_the_bounds_are_narrow() -> None:
    for (side, kind, _), row in TABLE.items():
        drops = kind == "spatter"  # A few drops in an image, or none.
        assert row.mae_within < (0.4 if drops else 0.17) * row.mae
        assert row.psnr_within < (2.5 if drops else 0.65 if side == 32 else 1.25)
