"""Corrupted copies of clean images, in the layouts of CIFAR-10-C and ImageNet-C (Hendrycks and Dietterich, 1903.12261).

Every file is made once, whole or not at all, and its bytes depend on the settings alone: not on the number of worker
processes, nor on where an earlier run was interrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ttaq.data.class_names import INDEX
from ttaq.data.corrupted_sets_jobs import (
    FORMATS,
    SCRATCH,
    ChunkJob,
    ImageJob,
    Job,
    Noise,
    Workers,
    write_array,
    write_atomically,
)
from ttaq.data.corrupted_sets_settings import claim
from ttaq.data.corruptions import CORRUPTIONS, VALIDATION_CORRUPTIONS, frost_source
from ttaq.data.corruptions.frost import texture_files
from ttaq.data.corruptions.parameters import SEVERITIES
from ttaq.data.image_folder import ImageFolder
from ttaq.data.images import Images
from ttaq.errors import DataError, InputError

__all__ = ["Noise", "Written", "write_cifar_c", "write_imagenet_c"]

Progress = Callable[[int, int, str], object]
# Images of CIFAR that are corrupted together, and the length of the files that wait to be joined.
_CHUNK = 500


@dataclass(frozen=True)
class Written:
    """What a call did. folder: the set; made, kept: corrupted images made now, and found there from earlier calls."""

    folder: Path
    made: int
    kept: int


def write_cifar_c(
    out: str | os.PathLike[str],
    images: Images,
    rows: Tensor,
    corruptions: Sequence[str],
    noise: Noise,
    *,
    num_classes: int = 10,
    settings: Mapping[str, Any] | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Written:
    """`{out}/CIFAR-{num_classes}-C/{corruption}.npy`, uint8 (5 m, 32, 32, 3), severity s in the rows (s - 1) m to s m,
    and `labels.npy`, uint8 (5 m); `ttaq.data.read_cifar_c` reads it.

    images: the whole clean set. rows: int64 (m), the places of those that are written, ascending; a corrupted image
    does not depend on which others are. Five severities in one array are the layout, so all are always made. settings:
    more of what decides the content, by the names of the flags that a message should speak of. progress: called with
    (images done in this call, images to do, corruption).

    Called again with the same arguments, also after being killed, it makes what is missing; corruptions may be added.
    Raises InputError for an unknown corruption and images of another size, DataError for a folder that holds something
    else or was made with other settings, and for files that cannot be written.
    """
    who = "write_cifar_c"
    if images.images.shape[1:] != (3, 32, 32):
        raise InputError(f"{who}: got images of shape {tuple(images.images.shape)}, expected (N, 3, 32, 32)")
    count = len(images.labels)
    if not len(rows) or rows[0] < 0 or rows[-1] >= count or bool((rows.diff() <= 0).any()):
        raise InputError(
            f"{who}: got rows {rows.tolist()[:5]}, ..., expected at least one of 0 to {count - 1}, ascending"
        )
    pixels = images.images.numpy()
    digest = hashlib.sha256(pixels.tobytes() + images.labels.numpy().tobytes()).hexdigest()[:16]
    folder = Path(out) / f"CIFAR-{num_classes}-C"
    labels = images.labels[rows].to(torch.uint8).repeat(len(SEVERITIES)).numpy()
    layout = _CifarLayout(folder, pixels, rows.numpy(), noise)
    description = {**(settings or {}), "data": digest, **_describe(corruptions, noise)}
    beside = {"labels.npy": partial(write_array, arrays=[labels])}
    return _write(who, layout, description, beside, len(labels), corruptions, workers, progress)


def write_imagenet_c(
    out: str | os.PathLike[str],
    images: ImageFolder,
    corruptions: Sequence[str],
    noise: Noise,
    *,
    severities: Sequence[int] = SEVERITIES,
    format: str = "png",
    settings: Mapping[str, Any] | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Written:
    """`{out}/ImageNet-C/{corruption}/{severity}/{class}/{stem}.png`, 224x224, and `wnids.txt` with the names of the
    classes in their order; `ttaq.data.open_imagenet_c` reads it.

    images: the clean ones; their size must be 224, which is what the layout holds. format: "png", which loses nothing,
    or "jpeg" of quality 85 with the suffix .JPEG, as the published set is stored. Each image draws its noise by its
    class and name, so that it does not depend on the others. The rest as `write_cifar_c`; severities may be added too.

    Raises besides: InputError for another size or format, DataError for two images of one class and name, for class
    names that an index file cannot hold, and `decode_image`'s errors.
    """
    who = "write_imagenet_c"
    if format not in FORMATS:
        raise InputError(f"{who}: format is {format!r}, expected {' or '.join(FORMATS)}")
    if images.size != 224 or not len(images):
        raise InputError(f"{who}: got {len(images)} images of size {images.size}, expected at least 1 of size 224")
    wrong = [severity for severity in severities if severity not in SEVERITIES]
    if wrong or not severities:
        raise InputError(f"{who}: severities are {list(severities)}, expected some of 1 to 5")
    split = next((name for name in images.classes if name.split() != [name]), None)
    if split is not None:
        raise DataError(
            f"{who}: the class {split!r} has a space in its name, which {INDEX} cannot hold; rename its folder"
        )
    names = _names(who, images)
    # Of the names only: a damaged file that stopped a call is to be replaced, and the call repeated.
    digest = hashlib.sha256("\n".join((*images.classes, *names)).encode()).hexdigest()[:16]
    layout = _FolderLayout(Path(out) / "ImageNet-C", images, names, tuple(severities), format, noise)
    description = {
        **(settings or {}),
        "data": digest,
        "preprocessing": images.preprocessing,
        "format": format,
        **_describe(corruptions, noise),
    }
    index = "".join(f"{name}\n" for name in images.classes).encode()
    beside = {INDEX: lambda file: file.write(index)}
    return _write(who, layout, description, beside, len(names) * len(severities), corruptions, workers, progress)


class _Layout(Protocol):
    @property
    def folder(self) -> Path: ...

    def missing(self, corruption: str) -> Iterator[Job]:
        """The jobs whose files are not there."""

    def finish(self, corruption: str) -> None:
        """What is left once all of them are done."""


@dataclass(frozen=True)
class _CifarLayout:
    """Severity and chunk by chunk into files of their own, which are joined when the corruption is complete."""

    folder: Path
    pixels: np.ndarray[Any, np.dtype[np.uint8]]
    rows: np.ndarray[Any, np.dtype[np.int64]]
    noise: Noise

    def _parts(self, corruption: str) -> Iterator[tuple[int, int, Path]]:
        """(severity, first image, file) in the order in which they are joined."""
        for severity in SEVERITIES:
            for chunk in np.unique(self.rows // _CHUNK).tolist():
                first = chunk * _CHUNK
                yield severity, first, self.folder / SCRATCH / corruption / f"{severity}-{first:06}.npy"

    def missing(self, corruption: str) -> Iterator[ChunkJob]:
        if (self.folder / f"{corruption}.npy").exists():
            return
        for severity, first, part in self._parts(corruption):
            if not part.exists():
                # The whole chunk is corrupted, so that an image is the same whichever others are wanted.
                keep = self.rows[self.rows // _CHUNK == first // _CHUNK] - first
                images = self.pixels[first : first + _CHUNK]
                yield ChunkJob(images, str(first), keep, corruption, severity, part, self.noise)

    def finish(self, corruption: str) -> None:
        target = self.folder / f"{corruption}.npy"
        if not target.exists():
            arrays = (np.load(part, allow_pickle=False) for _, _, part in self._parts(corruption))
            length = len(SEVERITIES) * len(self.rows)
            write_atomically(target, self.folder / SCRATCH, partial(write_array, arrays=arrays, length=length))
        shutil.rmtree(self.folder / SCRATCH / corruption, ignore_errors=True)


@dataclass(frozen=True)
class _FolderLayout:
    folder: Path
    images: ImageFolder
    names: tuple[str, ...]
    severities: tuple[int, ...]
    format: str
    noise: Noise

    def missing(self, corruption: str) -> Iterator[ImageJob]:
        listed: dict[Path, set[str]] = {}  # One listing of a folder is quicker than asking for each of its files.
        suffix = FORMATS[self.format][0]
        for file, name in zip(self.images.files, self.names, strict=True):
            targets = {}
            for severity in self.severities:
                target = self.folder / corruption / str(severity) / f"{name}{suffix}"
                if target.parent not in listed:
                    listed[target.parent] = _listing(target.parent)
                if target.name not in listed[target.parent]:
                    targets[severity] = target
            if targets:
                scratch = self.folder / SCRATCH
                how = (self.images.preprocessing, name, corruption, targets, scratch, self.format, self.noise)
                yield ImageJob(file, *how)

    def finish(self, corruption: str) -> None:
        pass


def _write(
    who: str,
    layout: _Layout,
    description: Mapping[str, Any],
    beside: Mapping[str, Callable[[Any], object]],
    per_corruption: int,
    corruptions: Sequence[str],
    workers: int,
    progress: Progress | None,
) -> Written:
    unknown = [name for name in corruptions if name not in (*CORRUPTIONS, *VALIDATION_CORRUPTIONS)]
    if unknown or not corruptions:
        known = ", ".join((*CORRUPTIONS, *VALIDATION_CORRUPTIONS))
        raise InputError(f"{who}: unknown corruption {', '.join(map(repr, unknown))}, expected some of: {known}")
    if workers < 1:
        raise InputError(f"{who}: workers is {workers}, expected at least 1")
    folder = layout.folder
    made = 0
    try:
        claim(who, folder, description)
        for name, write in beside.items():
            if not (folder / name).exists():
                write_atomically(folder / name, folder / SCRATCH, write)
        todo = sum(job.count for corruption in corruptions for job in layout.missing(corruption))
        with Workers(workers) as pool:
            for corruption in corruptions:
                for count in pool.run(layout.missing(corruption)):
                    made += count
                    if progress is not None:
                        progress(made, todo, corruption)
                layout.finish(corruption)
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"{who}: cannot write {error.filename or folder}: {error.strerror or error}; "
            f"what is finished stays, and the same call goes on with the rest once this is mended"
        ) from error
    return Written(folder, made, per_corruption * len(corruptions) - made)


def _describe(corruptions: Sequence[str], noise: Noise) -> dict[str, Any]:
    """What of the noise decides the content. Frost is left open until a set has some."""
    description: dict[str, Any] = {"seed": noise.seed, "torch": torch.__version__.partition("+")[0]}
    if "frost" in corruptions:
        description["frost"] = frost_source(noise.frost_textures)
        if noise.frost_textures is not None:
            content = b"".join(file.read_bytes() for file in texture_files(Path(noise.frost_textures)))
            description["frost"] += f" {hashlib.sha256(content).hexdigest()[:16]}"
    return description


def _names(who: str, images: ImageFolder) -> tuple[str, ...]:
    """`class/stem` of each image."""
    first: dict[str, Path] = {}
    for file, label in zip(images.files, images.labels.tolist(), strict=True):
        name = f"{images.classes[label]}/{file.stem}"
        if first.setdefault(name, file) != file:
            raise DataError(f"{who}: {first[name]} and {file} would both become {name}; rename one of them")
    return tuple(first)


def _listing(folder: Path) -> set[str]:
    with contextlib.suppress(FileNotFoundError):
        return set(os.listdir(folder))
    return set()
