"""Makes the small run in child processes that are killed (SIGKILL) at every place where it matters, one after another.

Usage: run_and_die.py ROWS [N]. N: batches after which a state is saved. Prints how each child ended; the last one has
to finish the run.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from run_cases import OPTIONS, STREAM, small_model

from ttaq.eval import Domains, RowFile, run
from ttaq.eval.checkpoint import Checkpoint
from ttaq.tta import Tent


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_the_second_batch_of_a_domain() -> None:
    step, calls = Tent.step, []

    def counted(self: Tent, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return step(self, x) if len(calls) < 2 else die() or x

    Tent.step = counted  # type: ignore[method-assign]


def before_the_state_is_in_place() -> None:
    os.replace = die  # type: ignore[assignment]


def between_state_and_row() -> None:
    RowFile.append = die  # type: ignore[method-assign, assignment]


def in_the_middle_of_a_row() -> None:
    write = os.write

    def half(fd: int, content: bytes) -> int:
        write(fd, content[: len(content) // 2])
        die()
        return 0

    os.write = half


def after_a_row() -> None:
    sync = os.fsync

    def last(fd: int) -> None:
        sync(fd)
        if row_file(fd):
            die()

    os.fsync = last  # type: ignore[assignment]


def row_file(fd: int) -> bool:
    return os.readlink(f"/proc/self/fd/{fd}").endswith(".jsonl")


def before_the_state_is_removed() -> None:
    Checkpoint.forget = die  # type: ignore[method-assign, assignment]


DEATHS = [
    in_the_second_batch_of_a_domain,
    before_the_state_is_in_place,
    between_state_and_row,
    in_the_second_batch_of_a_domain,
    in_the_middle_of_a_row,
    after_a_row,
    between_state_and_row,
    in_the_middle_of_a_row,
    before_the_state_is_removed,
    None,
]


def main(path: Path, every: int | None) -> None:
    torch.set_num_threads(1)  # A child has none of its parent's other threads.
    model, domains = small_model(), Domains(STREAM)
    Tent(model)  # Loads what an optimizer needs, once for all children.
    for death in DEATHS:
        child = os.fork()
        if child == 0:
            if death is not None:
                death()
            with RowFile(path) as rows:
                run(model, "tent", domains, rows, options=OPTIONS, checkpoint_every=every)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print("finished" if death is None else death.__name__, os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
