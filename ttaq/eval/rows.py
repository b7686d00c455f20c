"""Result files: one JSON object per line, appended by one writer at a time, readable after a kill at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ttaq.errors import CheckpointError
from ttaq.eval.stream import differing_flags

__all__ = ["FORMAT", "Row", "RowFile", "cell_of", "check_one_stream", "read_rows"]

Row = dict[str, Any]
FORMAT = 2
"""Version of the rows; readers refuse any other one."""

_START = b'{"format": '
_CELL = ("method", "options", "scheme", "model_hash", "stream")
_REQUIRED: dict[str, type | tuple[type, ...]] = {
    "kind": str,
    "method": str,
    "options": dict,
    "model": str,
    "scheme": str,
    "model_hash": str,
    "stream": str,
    "seed": int,
    "versions": dict,
    "device": str,
}
_DOMAIN: dict[str, type | tuple[type, ...]] = {
    "domain": str,
    "index": int,
    "domains": int,
    "n": int,
    "error": (int, float),
    "class_error": (int, float),
    "ece": (int, float),
    "parts": dict,
    "trace": dict,
    "latency_ms": dict,
    "memory": dict,
    "counters": dict,
}


def cell_of(row: Mapping[str, Any]) -> str:
    """What a row is one domain of, as canonical JSON: method, options, whether it is in shadow and what guards it,
    scheme, model hash and stream (with seed)."""
    around = {key: row[key] for key in ("shadow", "guards") if row.get(key)}
    return json.dumps({key: row[key] for key in _CELL} | around, sort_keys=True)


def read_rows(path: Path) -> list[Row]:
    """All complete rows of a file; an unfinished last line is left out.

    Raises:
        CheckpointError: the file is missing, a line is not a row of ttaq, or a row is of another format.
    """
    if not path.is_file():
        raise CheckpointError(f"read_rows: {path} is not a file, expected a row file written by ttaq adapt")
    return _parse(path, path.read_bytes())


def _parse(path: Path, content: bytes) -> list[Row]:
    *lines, tail = content.split(b"\n")
    if (
        tail[: len(_START)] != _START[: len(tail)]
    ):  # Not the beginning of a row: cutting it off would destroy a foreign file.
        raise CheckpointError(f"read_rows: {path} is not a row file of ttaq; choose another file")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CheckpointError(
                f"read_rows: line {number} of {path} is not JSON ({error}); remove the line or choose another file"
            ) from None
        rows.append(_checked(row, f"line {number} of {path}"))
    return rows


def _checked(row: object, where: str) -> Row:
    if not isinstance(row, dict) or not isinstance(row.get("format"), int):
        raise CheckpointError(f"read_rows: {where} is not a row of ttaq, expected an object with a 'format' number")
    if row["format"] != FORMAT:
        what = "install a newer ttaq" if row["format"] > FORMAT else "run it again: such streams are made otherwise now"
        raise CheckpointError(f"read_rows: {where} has format {row['format']}, this version reads {FORMAT}; {what}")
    required = _REQUIRED | (_DOMAIN if row.get("kind") == "domain" else {})
    for key, kind in required.items():
        if not isinstance(row.get(key), kind):
            raise CheckpointError(
                f"read_rows: {where} has no usable {key!r} (got {row.get(key)!r}); it was edited or cut"
            )
    return row


def check_one_stream(streams: Sequence[str], who: str) -> None:
    """Refuse descriptions that differ from the first one in more than the seed, naming the flags that differ."""
    for stream in dict.fromkeys(streams[1:]):
        if flags := differing_flags(streams[0], stream):
            raise CheckpointError(
                f"{who}: rows of different streams cannot be compared: {'; '.join(flags)}; "
                f"keep each stream in a file of its own"
            )


class RowFile:
    """A row file held open for writing by this process only.

    Entering locks the file (released by the system when the process ends, however it ends; systems without `fcntl`
    have no lock), drops an unfinished last line and reads the rows that are there. `append` returns after the row has
    reached the disk.

    Raises:
        CheckpointError: another process writes the file, it cannot be opened, or it holds something else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.rows: list[Row] = []
        self._fd: int | None = None

    def __enter__(self) -> RowFile:
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise CheckpointError(
                f"RowFile: cannot write {self.path} ({error.strerror}); choose a file in an existing, writable folder"
            ) from None
        try:
            _lock(fd, self.path)
            content = self.path.read_bytes()
            self.rows = _parse(self.path, content)
            os.ftruncate(fd, content.rfind(b"\n") + 1)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def append(self, row: Row) -> Row:
        """Write one row, wait until it is on disk, and return it as it is read back. All of it or nothing."""
        if self._fd is None:
            raise CheckpointError(f"RowFile: {self.path} is not open; use it in a with statement")
        row = {"format": FORMAT, **row}
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        end = os.fstat(self._fd).st_size
        try:
            while line:
                line = line[os.write(self._fd, line) :]
            os.fsync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, end)
            raise CheckpointError(
                f"RowFile: cannot write {self.path}: {error.strerror or error}; the rows before are unchanged: make "
                f"room and run the same command again"
            ) from error
        self.rows.append(row)
        return row

    @property
    def state_folder(self) -> Path:
        """Where the adapter states of unfinished cells lie, beside the file."""
        return self.path.with_name(self.path.name + ".state")


def _lock(fd: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise CheckpointError(
            f"RowFile: another process is writing {path}; wait until it ends or choose another file"
        ) from None
