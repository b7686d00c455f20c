"""The file that says how a corrupted set was made, so that it is never continued in another way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttaq.data.corrupted_sets_jobs import SCRATCH, write_atomically
from ttaq.errors import DataError

__all__ = ["SETTINGS", "claim"]

SETTINGS = "settings.json"


def claim(who: str, folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder and note the settings in it, or compare them with those noted there.

    settings: values that JSON keeps. One that only one side has is not compared, and is noted. Raises DataError for a
    folder with other settings, naming those that differ; with files and without settings, since they are somebody
    else's; and for a settings file that is not one. OSError for a folder that cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    noted: dict[str, Any] = {}
    if path.exists():
        noted = _read(who, path)
        differing = [
            f"{name} (there {noted[name]}, now {value})"
            for name, value in settings.items()
            if name in noted and noted[name] != value
        ]
        if differing:
            raise DataError(
                f"{who}: {folder} was made with other settings: {', '.join(differing)}; "
                f"give the same ones to continue it, or another folder"
            )
    elif strangers := sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".")):
        raise DataError(
            f"{who}: {folder} holds {strangers[0]} but no {SETTINGS}, so it was not made by this command; "
            f"choose another folder"
        )
    if not settings.keys() <= noted.keys():
        content = json.dumps({**noted, **settings}, indent=1).encode() + b"\n"
        write_atomically(path, folder / SCRATCH, lambda file: file.write(content))


def _read(who: str, path: Path) -> dict[str, Any]:
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{who}: {path} is not JSON ({error}); choose another folder or remove this one") from error
    if not isinstance(noted, dict):
        raise DataError(f"{who}: {path} holds no settings; choose another folder or remove this one")
    return noted
