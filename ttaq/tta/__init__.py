"""Test-time adaptation: one file per method, one interface (`Adapter`) for all."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor, nn

from ttaq.errors import InputError
from ttaq.tta.adapter import Adapter
from ttaq.tta.cotta import CoTTA
from ttaq.tta.delta import DELTA
from ttaq.tta.eata import EATA
from ttaq.tta.eta import ETA
from ttaq.tta.guards import Guarded, Limits
from ttaq.tta.lame import LAME
from ttaq.tta.norm import Norm
from ttaq.tta.norm_ema import NormEMA
from ttaq.tta.rdumb import RDumb
from ttaq.tta.rmt import RMT
from ttaq.tta.roid import ROID
from ttaq.tta.rotta import RoTTA
from ttaq.tta.sar import SAR
from ttaq.tta.shadow import Shadow
from ttaq.tta.source import Source
from ttaq.tta.t3a import T3A
from ttaq.tta.tent import Tent
from ttaq.tta.window import SlidingWindow

__all__ = ["METHODS", "Adapter", "Guarded", "Limits", "Norm", "Shadow", "SlidingWindow", "Source", "Tent", "build"]

METHODS: dict[str, type[Adapter]] = {
    method.method: method
    for method in (Source, Norm, Tent, ETA, EATA, RDumb, SAR, ROID, CoTTA, RMT, RoTTA, NormEMA, DELTA, LAME, T3A)
}


def build(
    name: str, model: nn.Module, *, source_images: Tensor | None = None, seed: int = 0, **options: object
) -> Adapter:
    """The method called `name` on `model`: `build("tent", model, lr=1e-3)` is `Tent(model, lr=1e-3)`.

    source_images: [N, C, H, W] of the data that the model was trained on, for the methods whose `source_images` says
    how many they want; the others ignore them.
    seed: of the method's own random numbers, from 0 below 2^31.

    `InputError`, naming what there is, for an unknown method or option, and for a seed out of range.
    """
    if name not in METHODS:
        raise InputError(f"build: unknown method {name!r}, expected one of {', '.join(sorted(METHODS))}")
    if type(seed) is not int or not 0 <= seed < 2**31:
        raise InputError(f"build: seed is {seed!r}, expected an integer from 0 below 2^31")
    method: Callable[..., Adapter] = METHODS[name]
    if METHODS[name].source_images:
        options = {"source_images": source_images, **options}
    signature = inspect.signature(method)
    try:
        signature.bind(model, **options)
    except TypeError as error:
        known = [str(option.replace(annotation=option.empty)) for option in signature.parameters.values()][1:]
        raise InputError(f"build: {name}: {error}; its options are {', '.join(known)}") from error
    adapter = method(model, **options)
    adapter.seed = seed
    return adapter
