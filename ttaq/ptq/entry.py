"""`quantize`: one call from a float model and calibration images to a quantized model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttaq.data.augment import augment
from ttaq.errors import InputError
from ttaq.nn import QuantizedModel, convert
from ttaq.nn.hash_tensors import hash_tensors
from ttaq.ptq.adaround import ADAROUND
from ttaq.ptq.brecq import BRECQ
from ttaq.ptq.caches import Budget, chunks
from ttaq.ptq.calibration import gather_images
from ttaq.ptq.distillation import distil
from ttaq.ptq.observe import Progress
from ttaq.ptq.pdquant import PDQUANT
from ttaq.ptq.pem import centre
from ttaq.ptq.qdrop import QDROP
from ttaq.ptq.reconstruct import reconstruct
from ttaq.ptq.rtn import rtn
from ttaq.ptq.settings import PRESETS, Reconstruction
from ttaq.ptq.statistics import batch_statistics, estimate_statistics
from ttaq.ptq.ttaq import TTAQ
from ttaq.ptq.unit_store import UnitStore
from ttaq.scheme import Scheme

__all__ = ["METHODS", "quantize", "settings_of"]

# What each method trains; None is nothing.
METHODS: dict[str, Reconstruction | None] = {
    "rtn": None,
    "adaround": ADAROUND,
    "brecq": BRECQ,
    "qdrop": QDROP,
    "pdquant": PDQUANT,
    "ttaq": TTAQ,
}


def settings_of(method: str, preset: str = "paper", settings: Mapping[str, Any] | None = None) -> Reconstruction | None:
    """What `quantize` trains with: the values of the method, then those of the preset, then `settings`.

    Raises `InputError` for a name that does not exist, and for settings of a method that trains nothing.
    """
    if method not in METHODS:
        raise InputError(f"quantize: method is {method!r}, expected {' or '.join(map(repr, METHODS))}")
    if preset not in PRESETS:
        raise InputError(f"quantize: preset is {preset!r}, expected {' or '.join(map(repr, PRESETS))}")
    own = METHODS[method]
    if own is None:
        if settings:
            raise InputError(f"quantize: {method} has no settings, got {', '.join(settings)}; it trains nothing")
        return None
    changes = {name: value for name, value in PRESETS[preset].items() if getattr(own, name)}  # off stays off
    return own.but(**{**changes, **(settings or {})})


def quantize(
    model: nn.Module,
    calibration: Tensor | Iterable[object],
    scheme: Scheme | str,
    method: str = "rtn",
    *,
    preset: str = "paper",
    settings: Mapping[str, Any] | None = None,
    search: str = "mse",
    seed: int = 0,
    batch_size: int = 64,
    checkpoint: str | Path | None = None,
    cache_mb: float = 4000,
    progress: Progress | None = None,
) -> QuantizedModel:
    """A quantized copy of `model`, in eval mode; `model` is left as it is.

    Args:
        model: a float model that torch.fx can trace (`ttaq.convert` says what becomes of its layers); on any device, to
            which the images are moved batch by batch.
        calibration: float images [N, C, H, W] as the model takes them, at least 2, or an iterable of batches such as a
            DataLoader, of which the first 1,024 images count and labels are ignored.
        scheme: a `Scheme` or its name, such as "W4A4".
        method: a key of `METHODS`.
        preset: "paper" (20,000 steps for each unit of the model) or "fast" (400 larger ones).
        settings: fields of `Reconstruction` that shall differ from those of the method and the preset.
        search: how scales are found, "mse" or "minmax" (`ttaq_kernels.search_scale`).
        seed: draws what the method draws, such as the images that set the activation scales.
        batch_size: images per forward pass while scales are found.
        checkpoint: a folder for the finished units. Called again with the same arguments after an interruption,
            `quantize` goes on behind the last of them and returns the same model, bit for bit, on the same device with
            the same number of threads.
        cache_mb: memory for the inputs of a unit in MB; what exceeds it lies in temporary files.
        progress: called as `progress(steps done, steps in total, what)`, in phases: scales, units, distillation.

    Raises:
        InputError: a model, images or options that cannot be used.
        CheckpointError: a checkpoint of another run, or a damaged one.
    """
    training = settings_of(method, preset, settings)
    if search not in ("mse", "minmax"):
        raise InputError(f"quantize: search is {search!r}, expected 'mse' or 'minmax'")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"quantize: batch_size is {batch_size!r}, expected 1 or more")
    budget = Budget(cache_mb)
    # A model made in inference mode could not be adapted later.
    with torch.inference_mode(False), torch.no_grad():
        quantized = convert(model, scheme).eval()
        images = gather_images(calibration, "quantize")
        teacher = copy.deepcopy(quantized)
        if training is not None and training.centring != "off":
            centre(quantized, training.centring)
        device = next(quantized.parameters()).device
        if training is not None and training.centring in ("channel", "tensor"):
            estimate_statistics(quantized, (images[place].to(device) for place in chunks(images)))
        by_batch = training is not None and training.norm_statistics == "batch"
        shown = images if training is None else _augmented(images, training.augment, seed)
        with batch_statistics(quantized) if by_batch else nullcontext():
            rtn(quantized, shown, search=search, seed=seed, batch_size=batch_size, progress=progress)
        if training is not None:
            store = None
            if checkpoint is not None:
                run = {
                    "model": hash_tensors(teacher.state_dict()),
                    "images": hash_tensors({"images": images}),
                    "scheme": str(quantized.scheme),
                    "settings": training.changed(),
                    "search": search,
                    "seed": seed,
                }
                store = UnitStore(checkpoint, run)
            reconstruct(quantized, teacher, shown, training, seed=seed, budget=budget, store=store, progress=progress)
            if training.distillation:
                with batch_statistics(quantized, teacher) if by_batch else nullcontext():
                    distil(quantized, teacher, shown, training, seed=seed, progress=progress)
        if by_batch:
            parts = (images[place].to(device, torch.float32) for place in chunks(images))
            estimate_statistics(quantized, (part.contiguous(memory_format=torch.channels_last) for part in parts))
    return quantized


def _augmented(images: Tensor, share: float, seed: int) -> Tensor:
    """The images, the first `share` of them each in a random version of its own."""
    count = round(share * len(images))
    if not count:
        return images
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([*(augment(image[None], generator) for image in images[:count]), images[count:]])
