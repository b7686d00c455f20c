"""A file that is written completely or not at all: what stood there stays until the new one is on the disk."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path

from ttaq.errors import CheckpointError, TtaqError

__all__ = ["write_atomically"]


def write_atomically(
    who: str, path: Path, content: bytes, error: type[TtaqError] = CheckpointError, *, make_folders: bool = False
) -> None:
    """Raises `error`, in the name of `who`, for a file that cannot be written."""
    target = Path(os.path.realpath(path))  # a link stays a link
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        if make_folders:
            target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as problem:
        raise error(
            f"{who}: cannot write {path}: {problem.strerror or problem}; what was there before is unchanged"
        ) from problem
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    # The rename itself survives a power cut only once the folder is on the disk; not every system lets a folder be
    # synced.
    with contextlib.suppress(OSError):
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
