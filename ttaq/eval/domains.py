"""The images of a stream, made while they are asked for."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ttaq.data.corruptions import corrupt, frost_source
from ttaq.data.images import to_float
from ttaq.errors import DataError, InputError
from ttaq.eval.datasets import DATASETS, Folder, Pool, calibration_images, open_pool
from ttaq.eval.order import thin_out
from ttaq.eval.plan import Plan, Recipe, domain_names, plan_domain, recipe_name, recipes_of
from ttaq.eval.stream import Stream
from ttaq.tta import METHODS

__all__ = ["Batch", "Domains"]

# Pixels of a chunk: images are corrupted a chunk at a time with a generator of its own, so that any batch can be made
# without those before it, and so that the noise does not depend on the batch size.
_CHUNK = 1 << 20

Batch = tuple[Tensor, Tensor, Tensor]
"""images fp32 [B, 3, H, W] in [0, 1]; labels int64 [B]; recipe int64 [B], the place in the recipes of the plan."""


class Domains:
    """An opened stream: the same batches for every method.

    Images are made a chunk of a few at a time and kept as bytes (corrupted images are multiples of 1 / 255) if the
    whole stream fits into `keep_mb`, so that methods that follow each other on one stream do not make them again;
    otherwise one chunk is in memory at a time, however long the stream.

    Args:
        stream: what to open.
        data: folder of the data set; digits need none.
        frost_textures: folder of the frost textures; must be there exactly if the stream says frost=textures.
        keep_mb: memory for images that were made, in 1e6 bytes.

    Raises:
        DataError: folder or files missing, or fewer images than the stream asks for.
        InputError: the textures given are not what the stream says, or a long tail that the images cannot have.
    """

    def __init__(
        self,
        stream: Stream,
        data: Folder = None,
        frost_textures: str | os.PathLike[str] | None = None,
        *,
        keep_mb: float = 2500.0,
    ) -> None:
        self.stream = stream
        self.names = domain_names(stream)
        self._textures = None if frost_textures is None else Path(frost_textures)
        if stream.frost_in_use in ("textures", "procedural") and frost_source(self._textures) != stream.frost:
            raise InputError(
                f"Domains: the stream says frost={stream.frost}, but the textures given make it "
                f"{frost_source(self._textures)}; set Stream.frost to that or give other textures"
            )
        self._data = data
        self._pools = self._open(data)
        first = next(iter(self._pools.values()))
        self.labels, self.num_classes = first.labels, first.num_classes
        for recipe, pool in self._pools.items():
            if recipe is not None and not torch.equal(pool.labels, self.labels):
                raise DataError(
                    f"Domains: the stored images of {recipe_name(recipe)} are not those of the other corruptions: "
                    f"their labels differ; the set is damaged or incomplete"
                )
        self._keep_bytes = 1e6 * keep_mb
        self._chunks: dict[tuple[int, int], Tensor] = {}
        self._plan: tuple[int, Plan] | None = None
        self._source: tuple[str | None, int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def plan(self, index: int) -> Plan:
        """Which images domain `index` holds, in which order, how corrupted."""
        if self._plan is None or self._plan[0] != index:
            self._plan = (index, plan_domain(self.stream, self.labels, index))
        return self._plan[1]

    @property
    def images_per_domain(self) -> int:
        """Number of images in each domain."""
        if self.stream.setting == "ccc":
            return self.stream.images or len(self.labels)
        return len(self.labels) * (len(self.stream.corruptions) if self.stream.setting == "mixed" else 1)

    @property
    def batches_per_domain(self) -> int:
        """Number of batches in each domain, the last of which may be smaller."""
        return -(-self.images_per_domain // self.stream.batch_size)

    def batches(self, index: int, start: int = 0) -> Iterator[Batch]:
        """The batches of domain `index` from batch `start` on, in the order that the seed draws."""
        plan, size = self.plan(index), self.stream.batch_size
        for first in range(start * size, len(plan), size):
            last = min(first + size, len(plan))
            images = self._images(index, plan, first, last)
            yield to_float(images), self.labels[plan.images[first:last]], plan.recipe[first:last]

    def source_images(self, most: int, preprocessing: str | None = None) -> Tensor:
        """Up to `most` images of the data that models were trained on, fp32 [N, 3, H, W], drawn by the stream's seed.

        preprocessing: as in `calibration_images`, which draws them. InputError for a data set without such images.
        """
        dataset = self.stream.dataset
        if not DATASETS[dataset].train:
            raise InputError(
                f"Domains: the method wants images that the model was trained on, but {dataset} has none; choose a "
                f"method that works without: {', '.join(name for name in METHODS if not METHODS[name].source_images)}"
            )
        # Kept, since methods and models follow each other on a stream; a smaller draw is the beginning of a larger one.
        if self._source is None or self._source[0] != preprocessing or self._source[1] < most:
            images = calibration_images(dataset, self._data, most, self.stream.seed, preprocessing, at_most=True)
            self._source = (preprocessing, most, images)
        return self._source[2][:most]

    def _open(self, data: Folder) -> dict[Recipe | None, Pool]:
        """The clean images, under None, or the stored ones of each recipe."""
        stream = self.stream
        stored: list[Recipe | None] = [None] if stream.source == "generated" else [*sorted(recipes_of(stream))]
        pools = {}
        for recipe in stored:
            pool = open_pool(stream.dataset, data, stream.split, stream.preprocessing, recipe[0] if recipe else None)
            if not len(pool.labels):
                raise DataError(f"Domains: split {stream.split!r} of {stream.dataset} has no images in {data}")
            if stream.images is not None and stream.setting != "ccc":
                if stream.images > len(pool.labels):
                    raise InputError(
                        f"Domains: {stream.images} images asked for, but split {stream.split!r} of {stream.dataset} "
                        f"has {len(pool.labels)}"
                    )
                pool = pool.take(torch.arange(stream.images))
            if stream.tail is not None:
                pool = pool.take(thin_out(pool.labels, stream.tail, stream.number("tail")))
            pools[recipe] = pool
        return pools

    @cached_property
    def _shape(self) -> tuple[int, int]:
        pool = next(iter(self._pools.values()))
        height, width = pool.fetch(torch.zeros(1, dtype=torch.int64)).shape[2:]
        return height, width

    @cached_property
    def _keeps(self) -> bool:
        return 3 * math.prod(self._shape) * self.images_per_domain * len(self) <= self._keep_bytes

    def _images(self, index: int, plan: Plan, first: int, last: int) -> Tensor:
        size = max(1, _CHUNK // math.prod(self._shape))
        parts = []
        for number in range(first // size, (last - 1) // size + 1):
            start = number * size
            parts.append(self._chunk(index, plan, number, size)[max(0, first - start) : last - start])
        return torch.cat(parts)

    def _chunk(self, index: int, plan: Plan, number: int, size: int) -> Tensor:
        key = (index, number)
        if key not in self._chunks:
            if not self._keeps:
                self._chunks.clear()
            self._chunks[key] = self._make(plan, number, slice(number * size, (number + 1) * size))
        return self._chunks[key]

    def _make(self, plan: Plan, number: int, places: slice) -> Tensor:
        images, recipe = plan.images[places], plan.recipe[places]
        chunk = torch.empty(len(images), 3, *self._shape, dtype=torch.uint8)
        for place in sorted(set(recipe.tolist())):
            mine, chosen = recipe == place, plan.recipes[place]
            if None not in self._pools:
                chunk[mine] = self._pools[chosen].fetch(images[mine])
                continue
            made = self._pools[None].fetch(images[mine])
            noise = self.stream.generator("noise", plan.name, number, recipe_name(chosen))
            for corruption, severity in chosen:
                corrupted = corrupt(made, corruption, severity, noise, frost_textures=self._textures)
                made = (corrupted * 255).round().to(torch.uint8)
            chunk[mine] = made
        return chunk
