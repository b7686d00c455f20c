"""Peak memory of a stretch of work."""

from __future__ import annotations

from pathlib import Path

import torch

__all__ = ["PeakMemory"]

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Starts a new high-water mark when created; `read` gives (MB, where the figure comes from), 1 MB = 1e6 bytes.

    On CUDA: `torch.cuda.max_memory_allocated`, tensors only. On the CPU: the resident set of the whole process with its
    libraries and data; Linux can restart that mark (VmHWM), elsewhere it is the mark of the process's whole life.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._restarted = False
        self._before: float | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            _CLEAR.write_text("5")
            self._restarted = True
        except OSError:
            pass  # Not Linux, or a container that forbids it: the source that `read` names says so.

    def include(self, peak: float | None) -> None:
        """Of the same work, the peak in an earlier process."""
        self._before = peak

    def read(self) -> tuple[float | None, str]:
        """The peak since creation, or the one included."""
        peak, source = self._own()
        peaks = [value for value in (peak, self._before) if value is not None]
        return max(peaks, default=None), source

    def _own(self) -> tuple[float | None, str]:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 1e6, "torch.cuda.max_memory_allocated"
        if self._restarted:
            for line in _STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024 / 1e6, "resident set of the process (VmHWM of this domain)"
        return self._whole_life()

    @staticmethod
    def _whole_life() -> tuple[float | None, str]:
        try:
            import resource
            import sys
        except ImportError:
            return None, "not measured on this system"
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
        return peak, "resident set of the process (ru_maxrss of its whole life)"
