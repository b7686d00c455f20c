"""The published variants of ImageNet in the layouts of their archives."""

from __future__ import annotations

import os
from pathlib import Path

from ttaq.data.class_names import INDEX, Classes, class_folders, find_index
from ttaq.data.image_folder import ImageFolder, open_image_folder
from ttaq.errors import DataError, InputError

__all__ = ["open_imagenet_c", "open_imagenet_sketch"]

_CLASSES = 1000
_SEVERITIES = 5


def open_imagenet_c(
    root: str | os.PathLike[str], corruption: str, severity: int = 5, *, classes: Classes | None = None
) -> ImageFolder:
    """One corruption of ImageNet-C as its authors stored it, `{root}/{corruption}/{severity}/{wnid}/*`: images of
    224x224, used as they are (Hendrycks and Dietterich, 1903.12261).

    root: that folder or its parent. classes: as in `open_image_folder`; None takes `wnids.txt` from root or its parent.
    Where there is none all 1,000 class folders must be there, since a part of them does not tell the order.

    Raises DataError as `open_image_folder` and for a corruption that is not there, InputError for a severity that is
    not 1 to 5.
    """
    who, place = "open_imagenet_c", _child(Path(root), "ImageNet-C")
    if severity not in range(1, _SEVERITIES + 1):
        raise InputError(f"{who}: severity is {severity}, expected 1 to {_SEVERITIES}")
    folder = place / corruption / str(severity)
    if not folder.is_dir():
        there = ", ".join(path.name for path in class_folders(who, place))
        raise DataError(
            f"{who}: there is no folder {folder}, expected {{corruption}}/{{severity}}; {place} has {there}"
        )
    return open_image_folder(folder, "none", classes=_order(who, folder, (place, place.parent), classes))


def open_imagenet_sketch(root: str | os.PathLike[str], *, classes: Classes | None = None) -> ImageFolder:
    """ImageNet-Sketch, `{root}/{wnid}/*`, the shorter side resized to 256, centre crop 224 (Wang et al., 1905.13549).

    root: that folder, or the one above its `sketch` or `ImageNet-Sketch/sketch`. classes, errors: as `open_imagenet_c`.
    """
    folder = _child(_child(Path(root), "ImageNet-Sketch"), "sketch")
    order = _order("open_imagenet_sketch", folder, (folder, folder.parent), classes)
    return open_image_folder(folder, "resize256crop224", classes=order)


def _order(who: str, folder: Path, homes: tuple[Path, ...], classes: Classes | None) -> Classes | None:
    order = find_index(*homes) if classes is None else classes
    if order is None and (count := len(class_folders(who, folder))) != _CLASSES:
        raise DataError(
            f"{who}: {folder} has {count} of {_CLASSES:,} classes, and no {INDEX} tells their order; put that file "
            f"(one folder name per line, in the order of the model's outputs) into {homes[0]}, or name one: classes="
        )
    return order


def _child(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_dir() else folder
