"""Folders with one sub-folder of image files per class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ttaq.data.class_names import Classes, class_folders, class_names, find_index
from ttaq.data.decode import PREPROCESSINGS, decode_image
from ttaq.data.image_batches import ImageBatches
from ttaq.data.images import Images
from ttaq.data.splits import calibration_indices
from ttaq.errors import DataError, InputError

__all__ = ["ImageFolder", "open_image_folder"]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """Image files and their labels; pixels are read when they are asked for.

    files: in the order of classes, inside a class by path. labels: int64 (N), places in `classes`. preprocessing, size:
    as `ttaq.data.decode.decode_image`; every image comes out as uint8 (3, size, size). `len` is the number of images.
    """

    files: tuple[Path, ...]
    labels: Tensor
    classes: tuple[str, ...]
    preprocessing: str
    size: int = 224

    def __post_init__(self) -> None:
        if self.preprocessing not in PREPROCESSINGS:
            raise InputError(
                f"ImageFolder: preprocessing is {self.preprocessing!r}, expected one of {', '.join(PREPROCESSINGS)}"
            )
        if self.size < 1:
            raise InputError(f"ImageFolder: size is {self.size}, expected at least 1 pixel")

    def __len__(self) -> int:
        return len(self.files)

    def take(self, indices: Tensor) -> ImageFolder:
        """The images at these places (int64), in that order."""
        return replace(self, files=tuple(self.files[i] for i in indices.tolist()), labels=self.labels[indices])

    def choose(self, files: Sequence[Path]) -> ImageFolder:
        """These files of the folder, in that order, such as the ones of `imagenet_split(folder.files, "validate")`.
        Raises InputError for a file that is not among them."""
        places = {file: place for place, file in enumerate(self.files)}
        for file in files:
            if file not in places:
                raise InputError(f"ImageFolder: {file} is not one of its {len(self)} files")
        return self.take(torch.tensor([places[file] for file in files], dtype=torch.int64))

    def sample(self, count: int, seed: int) -> ImageFolder:
        """`count` different images, drawn by `calibration_indices`: a given seed always draws the same."""
        return self.take(calibration_indices(len(self), count, seed))

    def batches(self, batch_size: int, *, workers: int = 2, crop_seed: int | None = None) -> ImageBatches:
        """The images in order as uint8 batches with labels, decoded in threads.

        crop_seed: None crops the centre; a number draws the place of each image's crop, uniformly, by a generator of
        its own, so that every pass and every batch size gives the same crops. Raises InputError for crops without
        cropping, and `ImageBatches`' and `decode_image`'s errors.
        """
        positions: list[list[float]] | None = None
        if crop_seed is not None:
            if self.preprocessing == "none":
                raise InputError("ImageFolder: crop_seed is set, but preprocessing 'none' crops nothing; choose 'crop'")
            generator = torch.Generator().manual_seed(crop_seed)
            positions = torch.rand(len(self), 2, generator=generator, dtype=torch.float64).tolist()

        def decode(index: int) -> Tensor:
            position = None if positions is None else (positions[index][0], positions[index][1])
            return decode_image(self.files[index], self.preprocessing, self.size, position)

        return ImageBatches(decode, self.labels, batch_size, workers)

    def read(self, *, workers: int = 2, crop_seed: int | None = None) -> Images:
        """All images in memory; options and errors as `batches`, InputError if there are none."""
        if not len(self):
            raise InputError("ImageFolder: there are no images to read")
        (images,) = self.batches(len(self), workers=workers, crop_seed=crop_seed)
        return images


def open_image_folder(
    root: str | os.PathLike[str], preprocessing: str, *, size: int = 224, classes: Classes | None = None
) -> ImageFolder:
    """The images below `{root}/{class}/`, at any depth, by the suffixes of image files; hidden files are left out.

    preprocessing, size: see `ImageFolder`; "none" for images stored at their final size, "crop" for ones stored a
    little larger, "resize256crop224" for photographs.
    classes: the names of the class folders in the order of the classes, or a text file with one per line (what follows
    the first word of a line is a comment). None takes `wnids.txt` from root or its parent if one is there, else the
    folders in alphabetical order. Classes without a folder or without images are allowed.

    Raises DataError for a folder that is missing, has no images or has a class that the names do not have, and for a
    file of names that is missing, empty or names a class twice; InputError for an unknown preprocessing.
    """
    who, root = "open_image_folder", Path(root)
    folders = class_folders(who, root)
    index = find_index(root, root.parent) if classes is None else classes
    names = tuple(folder.name for folder in folders) if index is None else class_names(who, index)
    places = {name: place for place, name in enumerate(names)}
    for folder in folders:
        if folder.name not in places:
            source = index if isinstance(index, str | os.PathLike) else "the classes given"
            raise DataError(
                f"{who}: the folder {folder.name} of {root} is not among the {len(names)} classes of {source}; "
                f"is {root} the folder that holds the class folders, and are these the names of its classes?"
            )
    files: list[Path] = []
    labels: list[int] = []
    for folder in sorted(folders, key=lambda path: places[path.name]):
        found = _image_files(who, folder)
        files += found
        labels += [places[folder.name]] * len(found)
    if not files:
        raise DataError(
            f"{who}: the {len(folders)} folders of {root} hold no image; files of images end in {', '.join(_SUFFIXES)}"
        )
    return ImageFolder(tuple(files), torch.tensor(labels, dtype=torch.int64), names, preprocessing, size)


def _image_files(who: str, folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"{who}: cannot list {error.filename}: {error.strerror}") from error

    return sorted(
        Path(place, name)
        for place, _, names in os.walk(folder, onerror=refuse, followlinks=True)
        for name in names
        if not name.startswith(".") and name.lower().endswith(_SUFFIXES)
    )
