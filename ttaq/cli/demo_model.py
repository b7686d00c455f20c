"""The small network of `ttaq demo`: trained in seconds, then kept in the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttaq.data import load_digits, to_float
from ttaq.errors import CheckpointError
from ttaq.eval.measure import Progress
from ttaq.io import load_model, save_model
from ttaq.models import build

__all__ = ["ARCHITECTURE", "KWARGS", "cache_file", "demo_model"]

ARCHITECTURE = "cifar_resnet8"
KWARGS = {"num_classes": 10, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
_EPOCHS = 8
_BATCH = 64
_LEARNING_RATE = 0.1
_LARGEST_SHIFT = 3


def cache_file() -> Path:
    """Where the trained network is kept: in $TTAQ_CACHE, or in ttaq under $XDG_CACHE_HOME, or under ~/.cache."""
    own = os.environ.get("TTAQ_CACHE")
    general = os.environ.get("XDG_CACHE_HOME")
    folder = Path(own) if own else (Path(general) if general else Path.home() / ".cache") / "ttaq"
    return folder / "demo_digits.safetensors"


def demo_model(progress: Progress | None = None) -> tuple[nn.Module, str]:
    """A ResNet-8 for the digits in eval mode, and a word on where it came from.

    A cache file that is damaged, or made by another recipe, is replaced by training again; a cache folder that cannot
    be written only means that the next call trains again.
    """
    path = cache_file()
    recipe = {"epochs": _EPOCHS, "batch": _BATCH, "learning_rate": _LEARNING_RATE, "shift": _LARGEST_SHIFT}
    try:
        model, header = load_model(path)
        if (header["architecture"], header["kwargs"], header["extra"]) == (ARCHITECTURE, KWARGS, recipe):
            return model, f"from {path}"
    except CheckpointError:
        pass
    model = _train(progress)
    try:
        save_model(path, model, architecture=ARCHITECTURE, kwargs=KWARGS, extra=recipe)
    except CheckpointError as error:
        return model, f"trained now, not kept ({error})"
    return model, f"trained now, kept in {path}"


def _train(progress: Progress | None) -> nn.Module:
    """SGD with a one-cycle learning rate on randomly shifted images; the same weights on every call."""
    train = load_digits()[0]
    images, labels = to_float(train.images), train.labels
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(ARCHITECTURE, **KWARGS)
    epoch = len(images) // _BATCH
    steps = _EPOCHS * epoch
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=5e-4, nesterov=True)
    model.train()
    for step in range(steps):
        if step % epoch == 0:
            order = torch.randperm(len(images), generator=generator)
        picked = order[step % epoch * _BATCH :][:_BATCH]
        optimizer.param_groups[0]["lr"] = _LEARNING_RATE * min(
            (step + 1) / (0.3 * steps), (steps - step) / (0.7 * steps)
        )
        loss = functional.cross_entropy(model(_shift(images[picked], generator)), labels[picked])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if progress is not None:
            progress(step + 1, steps, "training")
    return model.eval()


def _shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """The batch moved by a few pixels, zeros coming in from the sides."""
    right, down = torch.randint(-_LARGEST_SHIFT, _LARGEST_SHIFT + 1, (2,), generator=generator).tolist()
    return functional.pad(images, (right, -right, down, -down))
