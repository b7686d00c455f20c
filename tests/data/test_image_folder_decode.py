"""Image files to bytes: colour modes, crops, resizing, and files that are no use."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from ttaq.data.decode import decode_image
from ttaq.errors import DataError, MissingPackageError

RED, GREY = [200, 20, 90], 77


def flat(mode: str, colour: object, **info: object) -> Image.Image:
    image = Image.new(mode, (4, 4), colour)
    image.info.update(info)
    return image


def palette(alpha: bytes | None = None) -> Image.Image:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, *RED])
    if alpha is not None:
        image.info["transparency"] = alpha
    return image


def grey16(level: int, dtype: str = "<u2") -> Image.Image:
    return Image.fromarray(np.full((4, 4), level, dtype))


@pytest.mark.parametrize(
    ("image", "suffix", "expected"),
    [
        (flat("RGB", tuple(RED)), "png", RED),
        (flat("L", GREY), "png", [GREY] * 3),
        (flat("1", 1), "png", [255] * 3),
        (flat("LA", (GREY, 9)), "png", [GREY] * 3),
        (flat("RGBA", (*RED, 0)), "png", RED),
        (palette(), "png", RED),
        (palette(b"\xff\x00"), "png", RED),
        (palette(), "gif", RED),
        (flat("CMYK", (0, 255, 255, 0)), "jpg", [255, 0, 0]),
        (flat("YCbCr", (GREY, 128, 128)), "jpg", [GREY] * 3),
        # Pillow's own conversion would clip all of these but the first to 255.
        (grey16(128), "png", [0] * 3),
        (grey16(129), "png", [1] * 3),
        (grey16(GREY * 257), "png", [GREY] * 3),
        (grey16(65535), "png", [255] * 3),
        (grey16(GREY * 257, ">u2"), "tif", [GREY] * 3),
        (grey16(GREY * 257, "<i4"), "tif", [GREY] * 3),
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, image: Image.Image, suffix: str, expected: list[int]) -> None:
    path = tmp_path / f"image.{suffix}"
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    image.save(path, **options)
    pixels = decode_image(path, "none", 4)
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    difference = (pixels.int() - torch.tensor(expected).view(3, 1, 1)).abs().max()
    assert difference <= (1 if suffix == "jpg" else 0)


def numbered(tmp_path: Path, width: int, height: int) -> Path:
    """An image whose red is the column and whose green is the row."""
    rows, columns = np.mgrid[:height, :width]
    Image.fromarray(np.stack([columns, rows, rows * 0], axis=2).astype(np.uint8)).save(tmp_path / "numbered.png")
    return tmp_path / "numbered.png"


@pytest.mark.parametrize(
    ("width", "height", "position", "left", "top"),
    [
        (8, 8, None, 0, 0),
        (9, 10, None, 0, 1),
        (11, 11, None, 1, 1),  # a margin of 3: torchvision begins at 2
        (16, 9, None, 4, 0),
        (11, 10, (0.0, 0.0), 0, 0),
        (11, 10, (0.999, 0.999), 3, 2),
        (11, 10, (0.34, 0.5), 2, 1),
    ],
)
def test_crop(tmp_path: Path, width: int, height: int, position, left: int, top: int) -> None:
    pixels = decode_image(numbered(tmp_path, width, height), "crop", 8, position)
    assert pixels.shape == (3, 8, 8)
    assert pixels[0, 0].tolist() == list(range(left, left + 8))
    assert pixels[1, :, 0].tolist() == list(range(top, top + 8))


@pytest.mark.parametrize(("width", "height"), [(60, 40), (41, 60), (20, 33), (2, 2)])
def test_resize_is_antialiased_bilinear_then_centre(tmp_path: Path, width: int, height: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "random.png")
    result = decode_image(tmp_path / "random.png", "resize256crop224", 28)
    shorter = min(width, height)
    target = (height * 32 // shorter, width * 32 // shorter)
    image = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
    resized = functional.interpolate(image, target, mode="bilinear", antialias=True)[0]
    top, left = (target[0] - 28) // 2, (target[1] - 28) // 2
    expected = resized[:, top : top + 28, left : left + 28]
    assert (result.int() - expected.int()).abs().max() <= 1


def test_default_size_is_that_of_imagenet(tmp_path: Path) -> None:
    Image.new("RGB", (500, 375)).save(tmp_path / "large.png")
    assert decode_image(tmp_path / "large.png", "resize256crop224").shape == (3, 224, 224)


def damaged(kind: str, path: Path) -> None:
    suffix = path.suffix
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"no image"}[kind])
    assert path.suffix == suffix


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tif"])
@pytest.mark.parametrize("kind", ["cut", "empty", "text"])
def test_damaged_files_are_named(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"bad.{suffix}"
    damaged(kind, path)
    with pytest.raises(DataError, match=rf"cannot read .*bad\.{suffix}: .*; replace the file or remove it"):
        decode_image(path, "none", 32)


@pytest.mark.parametrize(
    ("image", "preprocessing", "message"),
    [
        (Image.new("RGB", (1, 1)), "none", r"image.tif is 1x1, expected 32x32, since preprocessing is 'none'"),
        (Image.new("RGB", (1, 1)), "crop", r"image.tif is 1x1, smaller than the crop of 32x32"),
        (Image.new("RGB", (1, 1)), "resize256crop224", r"image.tif is 1x1, expected at least 2x2"),
        (Image.new("RGB", (33, 31)), "crop", "is 33x31, smaller than the crop of 32x32"),
        (Image.new("RGB", (33, 32)), "none", "is 33x32, expected 32x32"),
        (Image.fromarray(np.full((32, 32), 0.5, np.float32)), "none", "image.tif: .*floating point"),
        (Image.fromarray(np.full((32, 32), 70000, np.int32)), "none", "grey levels are 70000 to 70000, expected 0 to"),
    ],
)
def test_images_of_no_use(tmp_path: Path, image: Image.Image, preprocessing: str, message: str) -> None:
    image.save(tmp_path / "image.tif")
    with pytest.raises(DataError, match=message):
        decode_image(tmp_path / "image.tif", preprocessing, 32)


def test_missing_file_and_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"cannot read .*absent\.png"):
        decode_image(tmp_path / "absent.png", "none")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingPackageError, match="pip install"):
        decode_image(tmp_path / "absent.png", "none")
