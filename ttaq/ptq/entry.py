"""`quantize`: one call from a float model and calibration images to a quantized model."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ttaq.errors import InputError
from ttaq.nn import QuantizedModel, convert
from ttaq.ptq.calibration import gather_images
from ttaq.ptq.observe import Progress
from ttaq.ptq.rtn import rtn
from ttaq.scheme import Scheme

__all__ = ["METHODS", "quantize"]

METHODS: dict[str, Callable[..., None]] = {"rtn": rtn}


def quantize(
    model: nn.Module,
    calibration: Tensor | Iterable[object],
    scheme: Scheme | str,
    method: str = "rtn",
    *,
    search: str = "mse",
    seed: int = 0,
    batch_size: int = 64,
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
        search: how scales are found, "mse" or "minmax" (`ttaq_kernels.search_scale`).
        seed: draws what the method draws, such as the images that set the activation scales.
        batch_size: images per forward pass.
        progress: called as `progress(steps done, steps in total, what)`.

    Raises:
        InputError: a model, images or options that cannot be used.
    """
    if method not in METHODS:
        raise InputError(f"quantize: method is {method!r}, expected {' or '.join(map(repr, METHODS))}")
    if search not in ("mse", "minmax"):
        raise InputError(f"quantize: search is {search!r}, expected 'mse' or 'minmax'")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"quantize: batch_size is {batch_size!r}, expected 1 or more")
    # A model made in inference mode could not be adapted later.
    with torch.inference_mode(False), torch.no_grad():
        quantized = convert(model, scheme).eval()
        images = gather_images(calibration, "quantize")
        METHODS[method](quantized, images, search=search, seed=seed, batch_size=batch_size, progress=progress)
    return quantized
