"""A progress line with the time left, on a terminal that has one."""

from __future__ import annotations

from types import TracebackType
from typing import Any

__all__ = ["ProgressLine"]


class ProgressLine:
    """Shows (done, total, what) calls on stderr through tqdm; silent when piped and where tqdm is not installed."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: Any = None
        try:
            import tqdm
        except ImportError:
            self._tqdm: Any = None
        else:
            self._tqdm = tqdm.tqdm

    def __enter__(self) -> ProgressLine:
        return self

    def __call__(self, done: int, total: int, what: str) -> None:
        if self._tqdm is None:
            return
        if self._bar is None or self._bar.total != total:
            self._close()
            self._bar = self._tqdm(total=total, desc=self._title, leave=False, disable=None)
        self._bar.set_postfix_str(what, refresh=False)
        self._bar.update(done - self._bar.n)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
