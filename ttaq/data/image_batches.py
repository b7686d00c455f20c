"""Images decoded by threads ahead of their use, batch by batch and in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ttaq.data.images import Images
from ttaq.errors import InputError

__all__ = ["ImageBatches"]


class ImageBatches:
    """Iterates over batches `Images(images uint8 (B, 3, H, W), labels int64 (B))`; the last one may be smaller.

    `len` is the number of batches. decode: makes the image at an index; it runs in `workers` threads (Pillow decodes
    without the interpreter lock), at most two batches ahead, so memory stays bounded. Order and content do not depend
    on the threads, and each pass gives the same. An error in `decode` is raised where the batch of that image would
    come; the threads end with the pass, also one that is given up.

    Raises InputError for a batch size or a number of workers below 1.
    """

    def __init__(self, decode: Callable[[int], Tensor], labels: Tensor, batch_size: int, workers: int = 2) -> None:
        if batch_size < 1 or workers < 1:
            raise InputError(
                f"ImageBatches: batch_size is {batch_size} and workers is {workers}, expected at least 1 of each"
            )
        self._decode, self._labels = decode, labels
        self._batch_size, self._workers = batch_size, workers

    def __len__(self) -> int:
        return -(-len(self._labels) // self._batch_size)

    def __iter__(self) -> Iterator[Images]:
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="ttaq-decode")
        waiting: deque[Future[Tensor]] = deque()
        todo = iter(range(len(self._labels)))
        try:
            for start in range(0, len(self._labels), self._batch_size):
                labels = self._labels[start : start + self._batch_size].clone()
                images = []
                for _ in range(len(labels)):
                    while len(waiting) < 2 * self._batch_size and (index := next(todo, None)) is not None:
                        waiting.append(pool.submit(self._decode, index))
                    images.append(waiting.popleft().result())
                yield Images(torch.stack(images), labels)
        finally:
            pool.shutdown(cancel_futures=True)
