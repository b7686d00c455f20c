"""The errors a user can cause: one sentence each that says who, what it got, what it expected and what to do."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["CheckpointError", "DataError", "InputError", "MissingPackageError", "TtaqError", "require"]


class TtaqError(Exception):
    """Base of every error that a user of ttaq can mend."""


class InputError(TtaqError, ValueError):
    """Images, calibration data or options that cannot be used."""


class DataError(TtaqError):
    """A data folder or data file that is missing, unreadable or not in the expected layout."""


class CheckpointError(TtaqError):
    """A model, adapter or run file that is truncated, foreign, newer than this version or made for something else."""


class MissingPackageError(TtaqError, ImportError):
    """An optional package that the called function needs is not installed."""


def require(package: str, extra: str, who: str) -> ModuleType:
    """Import an optional `package`, or say which extra of ttaq installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingPackageError(
            f"{who}: needs the package {package!r}, which could not be imported ({error}); "
            f"install it with: pip install 'ttaq[{extra}]'"
        ) from error
