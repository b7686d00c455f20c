"""Top-1 on the stored ImageNet images, shared by the tests of the published weights."""

from __future__ import annotations

from pathlib import Path

import torch

from ttaq.data import open_image_folder, to_float
from ttaq.io import load_weights


def count_correct(data: Path, name: str, weights: str, step: int) -> int:
    """How many of every `step`-th validation image (stored at 227x227, centre crop 224) the model gets right."""
    images = open_image_folder(data / "imagenet" / "val", "crop")
    assert len(images) == 1300
    assert len(images.classes) == 1000
    model = load_weights(name, data / "models" / f"{weights}.safetensors")
    with torch.inference_mode():
        batches = images.take(torch.arange(0, len(images), step)).batches(50)
        return sum(int((model(to_float(pixels)).argmax(1) == labels).sum()) for pixels, labels in batches)
