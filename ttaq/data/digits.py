"""A data set that needs no download: the 1,797 handwritten digits that come with scikit-learn."""

from __future__ import annotations

import torch
from torch.nn import functional

from ttaq.data.images import Images
from ttaq.errors import require

__all__ = ["load_digits"]

_TRAIN = 1197


def load_digits() -> tuple[Images, Images]:
    """Training (1,197) and test (600) images 3x32x32 of ten digits, grey in all three channels; always the same.

    The 8x8 images with values 0 to 16 are enlarged four times (bilinear) and scaled to 0 to 255; at this factor the
    interpolation is exact in fp32, so every machine makes the same bytes. The files are ordered by writer: the test
    images are the last 600, by other hands than the training images. Source: E. Alpaydin and C. Kaynak, Optical
    Recognition of Handwritten Digits, UCI (1998). Raises MissingPackageError without scikit-learn.
    """
    digits = require("sklearn.datasets", "demo", "load_digits").load_digits()
    small = torch.from_numpy(digits.images).float().unsqueeze(1)
    large = functional.interpolate(small, scale_factor=4, mode="bilinear", align_corners=False)
    images = (large * (255 / 16)).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(digits.target).long()
    return Images(images[:_TRAIN], labels[:_TRAIN]), Images(images[_TRAIN:], labels[_TRAIN:])
