"""The images of a stream, domain by domain."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ttaq.data.cifar import read_cifar_c
from ttaq.data.corruptions import corrupt, frost_source
from ttaq.data.images import Images, to_float
from ttaq.errors import DataError, InputError
from ttaq.eval.images import Folder, clean_test_images, split_indices
from ttaq.eval.stream import Stream

__all__ = ["Domains"]

# Corrupted at once. It bounds the memory that takes, and is fixed so that the noise does not depend on the batch size.
_CHUNK = 1000


class Domains:
    """An opened stream: batches (images fp32 [B, 3, H, W] in [0, 1], labels int64 [B]), the same for every method.

    A domain is made once and kept as bytes (corrupted images are multiples of 1 / 255), so that the methods that follow
    each other on one stream do not make it again: N x 3 x H x W bytes per domain.

    Args:
        stream: what to open.
        data: folder of the data set; digits need none.
        frost_textures: folder of the frost textures; must be there exactly if the stream says frost=textures.

    Raises:
        DataError: folder or files missing, or fewer images than the stream asks for.
        InputError: the textures given are not what the stream says.
    """

    def __init__(
        self, stream: Stream, data: Folder = None, frost_textures: str | os.PathLike[str] | None = None
    ) -> None:
        self.stream = stream
        self._data = data
        self._textures = None if frost_textures is None else Path(frost_textures)
        self._made: dict[int, Images] = {}
        if stream.frost_in_use in ("textures", "procedural") and frost_source(self._textures) != stream.frost:
            raise InputError(
                f"Domains: the stream says frost={stream.frost}, but the textures given make it "
                f"{frost_source(self._textures)}; set Stream.frost to that or give other textures"
            )
        indices = split_indices(stream.dataset, stream.split)
        if stream.images is not None and stream.images > len(indices):
            raise InputError(
                f"Domains: {stream.images} images asked for, but split {stream.split!r} of {stream.dataset} has "
                f"{len(indices)}"
            )
        self._indices = indices[: stream.images]
        self._clean = self._choose(clean_test_images(stream.dataset, data)) if stream.source == "generated" else None

    @property
    def images_per_domain(self) -> int:
        """Number of images in each domain."""
        return len(self._indices)

    @property
    def batches_per_domain(self) -> int:
        """Number of batches in each domain, the last of which may be smaller."""
        return -(-len(self._indices) // self.stream.batch_size)

    def batches(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of domain `index` in the order that the seed draws; the images are made before this returns."""
        if index not in self._made:
            self._made[index] = self._make(self.stream.corruptions[index])
        images, labels = self._made[index]
        size = self.stream.batch_size
        return (
            (to_float(part), truth)
            for part, truth in zip(torch.split(images, size), torch.split(labels, size), strict=True)
        )

    def _make(self, corruption: str) -> Images:
        stream = self.stream
        if self._clean is None:
            domain = self._choose(
                read_cifar_c(self._folder(), corruption, stream.severity, num_classes=stream.num_classes)
            )
        else:
            noise = stream.generator("noise", corruption)
            parts = [
                corrupt(to_float(part), corruption, stream.severity, noise, frost_textures=self._textures)
                for part in torch.split(self._clean.images, _CHUNK)
            ]
            domain = Images((torch.cat(parts) * 255).round().to(torch.uint8), self._clean.labels)
        order = torch.randperm(len(domain.labels), generator=stream.generator("order", corruption))
        return domain.take(order)

    def _choose(self, images: Images) -> Images:
        if len(images.labels) <= int(self._indices.max()):
            raise DataError(
                f"Domains: the stream reaches image {int(self._indices.max())}, but there are {len(images.labels)} "
                f"test images of {self.stream.dataset}; the folder holds only part of them"
            )
        return images.take(self._indices)

    def _folder(self) -> str | os.PathLike[str]:
        if self._data is None:
            raise DataError(f"Domains: the stored {self.stream.dataset} needs a folder; give data")
        return self._data
