"""The batch size with which a stream fits into a given memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ttaq.errors import InputError
from ttaq.eval.measure import Stepper, adapter_of, guarded_of
from ttaq.eval.memory_parts import MemoryParts, StepMemory
from ttaq.nn import AdaptiveBatchNorm2d
from ttaq.tta import Adapter, Limits

__all__ = ["FEWEST_FOR_STATISTICS", "NO_LIMITS", "Need", "choose_batch_size", "measure_need"]

FEWEST_FOR_STATISTICS = 8
"""Of fewer images the statistics of a batch, down to one value per image and channel in the last layers, are noise."""

NO_LIMITS = Limits(entropy=0, classes=0, batch_classes=0, spike=math.inf, drift=math.inf, drift_per_batch=math.inf)
"""Guards that see no alarm but values that are not finite."""

_PROBES = (2, 4)


@dataclass(frozen=True)
class Need:
    """What a method on a model needs for a batch: `fixed + per_image B`, part by part, in tensors.

    Args:
        who: method and model, for messages.
        fixed, per_image: bytes.
        fewest: images that the method needs to see at once.
        layer: bytes per image of the largest layer when it answers. Where a step is not on its batch but on images that
            the method keeps, this is what grows with the batch.
    """

    who: str
    fixed: MemoryParts
    per_image: MemoryParts
    fewest: int
    layer: float = 0

    def at(self, images: int) -> MemoryParts:
        """For a batch of so many images."""
        parts = self.fixed.combine(self.per_image, lambda fixed, each: fixed + each * images)
        return replace(parts, layer=max(parts.layer, self.layer * images))


def measure_need(stepper: Stepper, shape: Sequence[int], who: str, *, keeps_images: bool = False) -> Need:
    """The need of a new adapter for images of `shape` [C, H, W], from steps on 2 and 4 random ones; resets it.

    Guards must be without limits (`NO_LIMITS`), since random images may well be beyond them.

    keeps_images: a window around it will keep the images that it sees.
    """
    adapter = adapter_of(stepper)
    stepper(_images(adapter, _PROBES[0], shape))  # in which layers make what they keep
    first, second = (_step(stepper, count, shape) for count in _PROBES)
    stepper.reset()
    with StepMemory(adapter) as answering:
        adapter.predict(_images(adapter, _PROBES[0], shape))
    per_image = second.combine(first, lambda two, one: (two - one) / (_PROBES[1] - _PROBES[0]))
    fixed = first.combine(per_image, lambda one, each: one - each * _PROBES[0])
    if keeps_images:
        per_image = replace(per_image, state=per_image.state + 4 * math.prod(shape))
    fewest = FEWEST_FOR_STATISTICS if _takes_batch_statistics(adapter) else 1
    return Need(who, fixed, per_image, fewest, answering.parts.layer / _PROBES[0])


def _step(stepper: Stepper, count: int, shape: Sequence[int]) -> MemoryParts:
    """What the largest step on so many images needs."""
    adapter, guarded = adapter_of(stepper), guarded_of(stepper)
    stepper.reset()
    adapter.fill(shape)
    with StepMemory(adapter, stepper) as memory:
        stepper(_images(adapter, count, shape))
    if guarded is not None:
        guarded.keep()
    return memory.parts


def _images(adapter: Adapter, count: int, shape: Sequence[int]) -> Tensor:
    images = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))
    return images.to(next(adapter.model.parameters()).device, memory_format=torch.channels_last)


def _takes_batch_statistics(adapter: Adapter) -> bool:
    layers = [module for module in adapter.model.modules() if isinstance(module, AdaptiveBatchNorm2d)]
    return any(layer.renormalise or layer.prior_n is not None or layer.alpha not in (None, 0) for layer in layers)


def choose_batch_size(needs: Sequence[Need], wanted: int, most_mb: float, window: int = 1) -> tuple[int, str]:
    """The largest of `wanted`, its half, its quarter and so on that every need fits into, and why, in a sentence.

    Halves are taken while they are whole, so that a domain that `wanted` divides is divided too; none is below what a
    method needs to see at once, unless `wanted` is. A window stands for the batch that methods see.

    Raises:
        InputError: not even the smallest one fits.
    """
    fewest = min(wanted, max(need.fewest for need in needs))
    sizes = [wanted]
    while sizes[-1] % 2 == 0 and sizes[-1] // 2 >= fewest:
        sizes.append(sizes[-1] // 2)
    for place, size in enumerate(sizes):
        worst, parts = _worst(needs, size * window)
        if parts.total <= 1e6 * most_mb:
            why = f"{worst.who} needs {_mb(parts)} of {most_mb:g} MB in tensors ({parts.text()})"
            if place:
                why += f", and {_mb(_worst(needs, sizes[place - 1] * window)[1])} MB with {sizes[place - 1]}"
            return size, why
    raise InputError(
        f"--max-memory: {worst.who} needs {_mb(parts)} MB in tensors for batches of {sizes[-1] * window}, the fewest "
        f"that --batch-size {wanted} can be halved to ({parts.text()}), {parts.total / 1e6 - most_mb:.3g} MB more than "
        f"{most_mb:g}; raise it, or choose a smaller --batch-size or model, or a method that keeps less"
    )


def _worst(needs: Sequence[Need], images: int) -> tuple[Need, MemoryParts]:
    worst = max(needs, key=lambda need: need.at(images).total)
    return worst, worst.at(images)


def _mb(parts: MemoryParts) -> str:
    return f"{parts.total / 1e6:.3g}"
