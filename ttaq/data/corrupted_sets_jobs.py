"""One piece of a corrupted set, from clean pixels to a file on the disk; and many of them, in several processes."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ttaq.data.corruptions import corrupt
from ttaq.data.decode import decode_image
from ttaq.errors import DataError, require

__all__ = ["FORMATS", "SCRATCH", "ChunkJob", "ImageJob", "Job", "Noise", "Workers", "write_array", "write_atomically"]

SCRATCH = ".unfinished"
"""The folder in a set that holds what is not whole yet."""
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "png": (".png", {"format": "PNG", "compress_level": 1}),
    "jpeg": (".JPEG", {"format": "JPEG", "quality": 85}),
}
"""Suffix and Pillow's options. Low compression of noise saves time and costs almost no bytes; 85 is what ImageNet-C was
stored with."""


@dataclass(frozen=True)
class Noise:
    """Where the randomness of a set comes from: `seed`, and for frost a folder of textures (see `corrupt`)."""

    seed: int = 0
    frost_textures: Path | None = None

    def corrupt(self, images: Tensor, corruption: str, severity: int, key: str) -> NDArray[np.uint8]:
        """Images uint8 (N, 3, H, W) corrupted, as uint8 (N, H, W, 3).

        All numbers come from a generator of (seed, corruption, severity, key), so they depend neither on what was made
        before nor on who makes it.
        """
        text = f"{self.seed} {corruption} {severity} {key}"
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
        generator = torch.Generator().manual_seed(number)
        result = corrupt(images, corruption, severity, generator, frost_textures=self.frost_textures)
        levels = (result * 255).round().to(torch.uint8)
        return np.ascontiguousarray(levels.permute(0, 2, 3, 1).numpy())


class Job(Protocol):
    """What a worker can do: make the files of `count` images, each of them whole or not at all."""

    @property
    def count(self) -> int: ...

    def run(self) -> None: ...


@dataclass(frozen=True)
class ChunkJob:
    """A run of CIFAR images, corrupted together and stored as one array.

    images: uint8 (N, 3, 32, 32). key: names their place in the clean set. keep: which of them are stored.
    """

    images: NDArray[np.uint8]
    key: str
    keep: NDArray[np.int64]
    corruption: str
    severity: int
    target: Path
    noise: Noise

    @property
    def count(self) -> int:
        return len(self.keep)

    def run(self) -> None:
        images = self.noise.corrupt(torch.from_numpy(self.images), self.corruption, self.severity, self.key)
        write_atomically(self.target, self.target.parent, partial(write_array, arrays=[images[self.keep]]))


@dataclass(frozen=True)
class ImageJob:
    """One image file at several severities. targets: severity to file; scratch: where unfinished files lie."""

    source: Path
    preprocessing: str
    key: str
    corruption: str
    targets: Mapping[int, Path]
    scratch: Path
    format: str
    noise: Noise

    @property
    def count(self) -> int:
        return len(self.targets)

    def run(self) -> None:
        pillow = require("PIL.Image", "images", "write_imagenet_c")
        clean = decode_image(self.source, self.preprocessing)[None]
        for severity, target in self.targets.items():
            image = pillow.fromarray(self.noise.corrupt(clean, self.corruption, severity, self.key)[0])
            write_atomically(target, self.scratch, partial(image.save, **FORMATS[self.format][1]))


def write_atomically(target: Path, scratch: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Have `write` fill a new file in `scratch` (of the same disk) and give it the name `target` once it is whole."""
    scratch.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = scratch / f".{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "xb") as file:
            write(file)
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_array(file: IO[bytes], arrays: Iterable[NDArray[np.uint8]], length: int | None = None) -> None:
    """Arrays of equal row shape one behind the other as one `.npy`, `length` rows in all; None: those of the first."""
    for place, array in enumerate(arrays):
        if not place:
            shape = (len(array) if length is None else length, *array.shape[1:])
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        # Not np.save: its error on a full disk says neither that the disk is full nor which file it was.
        file.write(array.tobytes())


class Workers:
    """`count` processes that run jobs, each with one torch thread; with a count of 1 the jobs run in this process.

    The number of threads is the same everywhere because sums in fp32 depend on it. The processes end with the `with`
    block, and by themselves where this process is killed.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._threads = torch.get_num_threads()
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self._count > 1:
            # spawn: a forked torch may hang in the locks of threads that were not forked with it.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._count, context, initializer=_start_worker)
        else:
            torch.set_num_threads(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        else:
            torch.set_num_threads(self._threads)

    def run(self, jobs: Iterable[Job]) -> Iterator[int]:
        """Run them all; yields the count of each job when it is done. What a job raises is raised here.

        Raises DataError for a process that dies.
        """
        if self._pool is None:
            for job in jobs:
                job.run()
                yield job.count
            return
        waiting: dict[Future[None], int] = {}
        todo = iter(jobs)
        try:
            while True:
                for job in islice(todo, 2 * self._count - len(waiting)):
                    waiting[self._pool.submit(job.run)] = job.count
                if not waiting:
                    return
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    future.result()
                    yield waiting.pop(future)
        except BrokenProcessPool as error:
            raise DataError(
                "Workers: a worker process was ended from outside, perhaps for lack of memory; "
                "run the same command again, with fewer workers"
            ) from error


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent hears it too and ends its workers.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
