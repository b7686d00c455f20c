"""Where an unfinished cell stands: the state of its adapter beside the row file, never half written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from ttaq.errors import CheckpointError
from ttaq.eval.rows import RowFile, cell_of
from ttaq.io import load_state, save_state

__all__ = ["Checkpoint", "refuse_what_is_there"]


class Checkpoint:
    """The state file of a cell.

    Args:
        rows: the row file; the state lies in its `state_folder`.
        cell: of `cell_of`.
    """

    def __init__(self, rows: RowFile, cell: str) -> None:
        self.cell = cell
        self.path = rows.state_folder / f"{hashlib.sha256(cell.encode()).hexdigest()[:16]}.safetensors"

    def exists(self) -> bool:
        """Whether the cell was left unfinished."""
        return self.path.exists()

    def load(self) -> dict[str, Any] | None:
        """What was saved last; None without a state. CheckpointError for a state that is damaged or of another run."""
        if not self.exists():
            return None
        try:
            saved = load_state(self.path)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; delete {self.path} to run this method's domains again") from None
        if saved.get("cell") != self.cell:
            raise CheckpointError(f"run: {self.path} belongs to another run; delete it")
        return saved

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace what was saved last. CheckpointError, and what was saved last stays, where it cannot be written."""
        try:
            save_state(self.path, {"cell": self.cell, **state})
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; make room or mend the permissions and run the same command again, it goes on from there"
            ) from error

    def forget(self) -> None:
        """Remove the state with what a kill left of an unfinished one, and the folder once it is empty."""
        folder = self.path.parent
        for path in [self.path, *folder.glob(f".{self.path.name}.*")]:
            path.unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def refuse_what_is_there(rows: RowFile, cell: str) -> None:
    """CheckpointError where a row file holds rows or the state of a cell that is to be run from its beginning."""
    found = sum(cell_of(row) == cell for row in rows.rows)
    state = Checkpoint(rows, cell)
    if found or state.exists():
        what = f"{found} rows" + (f" and the state {state.path}" if state.exists() else "")
        raise CheckpointError(
            f"run: {rows.path} already holds {what} of this run, expected none without resumption; choose another "
            f"file, remove them, or let the run continue (--resume)"
        )
