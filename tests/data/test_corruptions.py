"""`corrupt` from outside: what it accepts and refuses, what it returns, and what its randomness depends on."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from corruption_images import pictures
from PIL import Image

from ttaq.data import to_float
from ttaq.data.corruptions import CORRUPTIONS, VALIDATION_CORRUPTIONS, corrupt, frost_source
from ttaq.errors import DataError, InputError

ALL = (*CORRUPTIONS, *VALIDATION_CORRUPTIONS)
DRAWS_NOTHING = {
    *("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"),
    *("gaussian_blur", "saturate"),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(count: int = 4, side: int = 32) -> torch.Tensor:
    """uint8 (count, 3, side, side)."""
    return torch.from_numpy(np.ascontiguousarray(pictures(side, 192)[:count].transpose(0, 3, 1, 2)))


def test_names() -> None:
    assert " ".join(CORRUPTIONS) == (
        "gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow frost fog "
        "brightness contrast elastic_transform pixelate jpeg_compression"
    )
    assert " ".join(VALIDATION_CORRUPTIONS) == "speckle_noise gaussian_blur spatter saturate"


@pytest.mark.parametrize("severity", [1, 5])
@pytest.mark.parametrize("name", ALL)
def test_result(name: str, severity: int) -> None:
    """fp32 on the levels, deterministic, the same for bytes and for any memory layout; the input stays as it is."""
    images = batch()
    floats = to_float(images)
    before = floats.clone()
    result = corrupt(floats, name, severity, seeded())
    assert result.dtype is torch.float32
    assert result.shape == images.shape
    assert torch.equal(floats, before)
    assert torch.equal(result, to_float((result * 255).round().byte()))
    assert not torch.equal(result, floats)
    assert torch.equal(result, corrupt(images, name, severity, seeded()))
    assert torch.equal(result, corrupt(images.contiguous(memory_format=torch.channels_last), name, severity, seeded()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(result, corrupt(floats.requires_grad_(), name, severity, seeded()))
    assert not result.requires_grad


@pytest.mark.parametrize("name", ALL)
def test_randomness(name: str) -> None:
    """Comes from the generator alone, differs between the images of a batch; kinds without it leave the generator."""
    images = batch(1).expand(6, -1, -1, -1)
    generator = seeded()
    before, shared = generator.get_state(), torch.get_rng_state()
    first, second = (corrupt(images, name, 4, generator) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), shared)
    different = {image.numpy().tobytes() for image in torch.cat((first, second))}
    if name in DRAWS_NOTHING:
        assert len(different) == 1
        assert torch.equal(generator.get_state(), before)
    else:
        # Directions close to each other smear a small image in the same way.
        assert len(different) >= (9 if name == "motion_blur" else 12)
        assert torch.equal(corrupt(images, name, 4, seeded()), first)
        assert not torch.equal(corrupt(images, name, 4, seeded(1)), first)


@pytest.mark.parametrize(("height", "width"), [(11, 64), (11, 65), (33, 47), (70, 96)])
@pytest.mark.parametrize("name", ALL)
def test_other_sizes(name: str, height: int, width: int) -> None:
    images = torch.rand(2, 3, height, width, generator=seeded())
    result = corrupt(images, name, 5, seeded())
    assert result.shape == images.shape
    assert bool(((result >= 0) & (result <= 1)).all())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("level", [0, 255])
def test_black_and_white_images(name: str, level: int) -> None:
    """No division by zero, no hue, nothing brighter than white."""
    result = corrupt(torch.full((2, 3, 32, 32), level, dtype=torch.uint8), name, 5, seeded())
    assert bool(((result >= 0) & (result <= 1)).all())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_empty_batch(name: str, dtype: torch.dtype) -> None:
    result = corrupt(torch.empty(0, 3, 32, 32, dtype=dtype), name, 1, seeded())
    assert result.shape == (0, 3, 32, 32)
    assert result.dtype is torch.float32


def test_long_batches_are_worked_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    images = batch(7)
    whole = corrupt(images, "zoom_blur", 3, seeded())
    monkeypatch.setattr("ttaq.data.corruptions.apply.PIECE", 2 * 32 * 32)
    assert torch.equal(corrupt(images, "zoom_blur", 3, seeded()), whole)
    noisy = corrupt(images[:1].expand(7, -1, -1, -1), "gaussian_noise", 3, seeded())
    assert len({image.numpy().tobytes() for image in noisy}) == 7


# The kinds whose parameters grow in one direction; of the others some trade one parameter against another.
GROWING = {
    "cifar": (
        *(
            "gaussian_noise",
            "shot_noise",
            "impulse_noise",
            "speckle_noise",
            "gaussian_blur",
            "defocus_blur",
            "zoom_blur",
        ),
        *("snow", "fog", "brightness", "contrast", "pixelate", "jpeg_compression"),
    ),
    "imagenet": (
        *(
            "gaussian_noise",
            "shot_noise",
            "impulse_noise",
            "speckle_noise",
            "gaussian_blur",
            "defocus_blur",
            "zoom_blur",
        ),
        *("motion_blur", "brightness", "contrast", "pixelate", "jpeg_compression"),
    ),
}


@pytest.mark.parametrize(("table", "name"), [(table, name) for table, names in GROWING.items() for name in names])
def test_damage_grows_with_severity(table: str, name: str) -> None:
    images = batch(48) if table == "cifar" else batch(4, 224)
    damage = [
        float((corrupt(images, name, severity, seeded()) - to_float(images)).abs().mean()) for severity in range(1, 6)
    ]
    assert all(low < high for low, high in pairwise(damage)), damage


GOOD = torch.zeros(1, 3, 16, 16)
NAN = GOOD.clone()
NAN[0, 1, 2, 3] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "rain"}, "got name='rain', expected one of gaussian_noise, shot_noise"),
        ({"severity": 0}, "got severity=0, expected a whole number from 1 to 5"),
        ({"severity": 6}, "severity=6"),
        ({"severity": 2.0}, "severity=2.0"),
        ({"severity": True}, "severity=True"),
        ({"generator": None}, "expected a torch.Generator"),
        ({"images": [0.5]}, "of type list"),
        ({"images": GOOD.double()}, "torch.float64, expected float32"),
        ({"images": GOOD.int()}, "torch.int32"),
        ({"images": GOOD[0]}, r"shape \(3, 16, 16\), expected \(N, 3, H, W\)"),
        ({"images": torch.zeros(2, 1, 16, 16)}, r"shape \(2, 1, 16, 16\)"),
        ({"images": torch.zeros(2, 3, 16, 10)}, "16 x 10 pixels, expected at least 11"),
        ({"images": GOOD + 1.001}, r"expected all in \[0, 1\]"),
        ({"images": GOOD - 0.001}, r"expected all in \[0, 1\]"),
        ({"images": NAN}, "from nan to nan"),
        ({"images": GOOD + float("inf")}, "inf"),
    ],
)
def test_refused(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"images": GOOD, "name": "fog", "severity": 1, "generator": seeded()}
    with pytest.raises(InputError, match=message):
        corrupt(**(arguments | change))


def test_frost_source(tmp_path: Path) -> None:
    assert frost_source(None) == "procedural"
    with pytest.raises(DataError, match="is not a folder"):
        frost_source(tmp_path / "nowhere")
    for number in (1, 2, 3, 5):
        Image.new("RGB", (100, 90)).save(tmp_path / f"frost{number}.{'png' if number < 4 else 'jpg'}")
    with pytest.raises(DataError, match="has no frost4"):
        frost_source(tmp_path)
    with pytest.raises(DataError, match="has no frost4"):
        corrupt(GOOD, "frost", 1, seeded(), frost_textures=tmp_path)
    (tmp_path / "frost4.jpeg").write_bytes(b"no picture")
    assert frost_source(tmp_path) == "textures"
    with pytest.raises(DataError, match=r"frost4.jpeg could not be read"):
        corrupt(GOOD.expand(64, -1, -1, -1), "frost", 1, seeded(), frost_textures=tmp_path)
    Image.new("RGB", (100, 90)).save(tmp_path / "frost4.jpeg")
    assert corrupt(GOOD, "frost", 1, seeded(), frost_textures=tmp_path).sum() == 0
    with pytest.raises(InputError, match="gives 18 x 20 pixels of frost, expected at least 32 x 32"):
        corrupt(batch(1), "frost", 1, seeded(), frost_textures=tmp_path)


def test_frost_with_real_textures(data_folder: Path) -> None:
    images = batch(16)
    drawn = corrupt(images, "frost", 3, seeded())
    photographed = corrupt(images, "frost", 3, seeded(), frost_textures=data_folder / "frost")
    assert not torch.equal(drawn, photographed)
    assert float((photographed - to_float(images)).mean()) > 0.1


# Share of the values that may be over one level apart on a GPU. Sums in another order move a value over the edge of its
# level, and where a level decides something (an edge of a drop, a coefficient of JPEG) a whole spot differs.
GPU_APART = dict.fromkeys(ALL, 0.0) | {
    **dict.fromkeys(("glass_blur", "motion_blur", "snow", "elastic_transform", "frost"), 0.001),
    **dict.fromkeys(("jpeg_compression", "spatter"), 0.01),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("severity", [1, 3, 5])
@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize("name", ALL)
def test_on_the_gpu(name: str, side: int, severity: int) -> None:
    """A CPU generator gives the CPU's result but for roundings; a CUDA generator serves images on any device."""
    images = batch(8, side) if side == 32 else batch(2, side)
    expected = corrupt(images, name, severity, seeded())
    result = corrupt(images.cuda(), name, severity, seeded())
    assert result.device.type == "cuda"
    assert result.shape == expected.shape
    difference = ((result.cpu() - expected) * 255).abs().round()
    assert float((difference > 1).float().mean()) <= GPU_APART[name]
    assert float((difference > 0).float().mean()) <= 0.02
    generator = torch.Generator("cuda").manual_seed(0)
    first = corrupt(images.cuda(), name, severity, generator)
    generator.manual_seed(0)
    assert torch.equal(corrupt(images.cuda(), name, severity, generator), first)
    generator.manual_seed(0)
    assert corrupt(images, name, severity, generator).device.type == "cpu"
