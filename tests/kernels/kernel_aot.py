"""Compiles the kernels of a launcher for a GPU that is not there, and reads what came out.

Only for the process of the tests marked `aot`: the driver of Triton is replaced for good.
"""

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes per block
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class _NoGpuDriver:
    """Answers what Triton asks its driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        """One device per GPU: Triton keeps what it compiled by device, and would hand it out for the next GPU."""
        return int(self._target.arch)

    def get_current_stream(self, device: int = 0) -> int:
        return 0


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel."""

    name: str
    ptx: str
    cubin: bytes
    shared: int

    def _dump(self, what: str) -> str:
        with NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            return subprocess.run([_CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout

    @cached_property
    def sass(self) -> str:
        return self._dump("-sass")

    @cached_property
    def usage(self) -> dict[str, int]:
        """REG, STACK, LOCAL, ... of the kernel."""
        return {key: int(number) for key, number in re.findall(r"(\w+):(\d+)", self._dump("-res-usage"))}


def compile_launches(capability: int, launcher: Callable[[], object]) -> list[Compiled]:
    """Every kernel that `launcher` launches on CPU tensors, compiled with its real arguments instead of run."""
    built = []

    def warm_up(kernel: JITFunction[Any], *arguments: Any, warmup: bool, **options: Any) -> None:
        built.append((kernel.__name__, run(kernel, *arguments, warmup=True, **options)))

    run = JITFunction.run
    triton.runtime.driver.set_active(_NoGpuDriver(capability))
    with mock.patch.object(JITFunction, "run", warm_up):
        launcher()
    return [Compiled(name, one.asm["ptx"], one.asm["cubin"], one.metadata.shared) for name, one in built]
