"""Which folders are classes, and which place each class has among the outputs of a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ttaq.errors import DataError

__all__ = ["INDEX", "Classes", "class_folders", "class_names", "find_index"]

INDEX = "wnids.txt"
"""The file that tells the order of the classes where one is there."""

Classes = Sequence[str] | str | os.PathLike[str]
"""The names of the classes in order, or the text file that has them."""


def find_index(*folders: Path) -> Path | None:
    """The index file in the first of these folders that has one."""
    return next((folder / INDEX for folder in folders if (folder / INDEX).is_file()), None)


def class_folders(who: str, root: Path) -> list[Path]:
    """The folders in root by name, without hidden ones. Raises DataError if there are none."""
    try:
        entries = sorted(root.iterdir())
    except FileNotFoundError as error:
        raise DataError(f"{who}: there is no folder {root}") from error
    except OSError as error:
        raise DataError(f"{who}: cannot list {root}: {error.strerror}") from error
    folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    if not folders:
        content = f"only files, such as {entries[0].name}" if entries else "empty"
        raise DataError(
            f"{who}: {root} is {content}; expected one folder per class with the images of that class in it"
        )
    return folders


def class_names(who: str, classes: Classes) -> tuple[str, ...]:
    """The names in order: those given, or the first word of each line of the file given.

    Raises DataError for a file that is missing, unreadable or has an empty line before its end, for no names and for
    one that comes twice.
    """
    names = _read(who, Path(classes)) if isinstance(classes, str | os.PathLike) else list(classes)
    source = f"{classes}" if isinstance(classes, str | os.PathLike) else "the classes given"
    if not names:
        raise DataError(f"{who}: {source} has no names, expected one per class")
    first: dict[str, int] = {}
    for place, name in enumerate(names):
        if first.setdefault(name, place) != place:
            raise DataError(f"{who}: {source} names {name!r} twice, as class {first[name]} and as class {place}")
    return tuple(names)


def _read(who: str, path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{who}: cannot read {path}, expected text with one class per line: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise DataError(f"{who}: line {number} of {path} is empty; the number of its line is the number of a class")
    return [line.split()[0] for line in lines]
