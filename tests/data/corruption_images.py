"""Images for the corruption tests: crops of scikit-learn's two photographs, smooth colour fields, and real sets."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from ttaq.data import read_cifar10


@lru_cache(maxsize=2)
def pictures(side: int, count: int) -> np.ndarray:
    """uint8 (count, side, side, 3): three in four are crops of photographs (shrunk to a third for sides under 100)."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(side)
    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    if side < 100:
        photographs = [photograph.reduce(3) for photograph in photographs]
    images = np.empty((count, side, side, 3), dtype=np.uint8)
    y, x = np.mgrid[0:side, 0:side] / side
    for i in range(count):
        if i % 4 == 3:
            waves = [np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in rng.uniform(-1.5, 1.5, (3, 3))]
            images[i] = np.uint8(np.stack([127 + 127 * wave for wave in waves], -1))
        else:
            photograph = np.asarray(photographs[i % 2])
            top, left = (rng.integers(0, size - side) for size in photograph.shape[:2])
            images[i] = photograph[top : top + side, left : left + side]
    return images


def cifar_images(folder: Path, count: int) -> np.ndarray:
    """uint8 (count, 32, 32, 3), test images 8,000 and on."""
    return read_cifar10(folder, "test").images[8000 : 8000 + count].permute(0, 2, 3, 1).numpy()


def imagenet_images(folder: Path, count: int) -> np.ndarray:
    """uint8 (count, 224, 224, 3): centre crops, spread over the classes."""
    files = sorted((folder / "imagenet" / "val").glob("*/*.JPEG"))
    images = []
    for file in files[:: len(files) // count][:count]:
        image = Image.open(file).convert("RGB")
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        images.append(np.asarray(image.crop((left, top, left + 224, top + 224))))
    return np.stack(images)
