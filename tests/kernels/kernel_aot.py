"""Compiles the kernels of launchers for GPUs that are not there, in processes of their own, and reads what came out.

Only for the process of the tests marked `aot` and for `kernel_golden.py`: the driver of Triton is replaced for good.
"""

import math
import multiprocessing
import os
import re
import struct
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from unittest import mock

import torch
import triton
from kernel_launch import launches
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

CAPABILITIES = (80, 89, 90, 100)
SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes per block
DISASSEMBLED = 90  # disassembling takes longer than compiling, so it is done for one GPU, and where a launch asks
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# An instruction has 16 bytes. The lowest 9 bits say what it is, the next 3 where its operands are; bits 32 to 63 may be
# an operand.
_INSTRUCTION = struct.Struct("<IIQ")
_NOP = 0x918  # fills a kernel up to a multiple of 128 bytes
_FFMA = 0x023
_MAGIC = 0x4B400000  # 1.5 * 2**23, which rounds what it is added to
# Directives begin with a dot.
_PTX_INSTRUCTION = re.compile(r"^\s*(?:@!?%\w+\s+)?[a-z]", re.MULTILINE)
_SASS_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
_WORKERS = 8  # at most: each holds torch and Triton


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
    """One compiled kernel.

    sass: where it was asked for, or the kernel has a loop. usage: REG, STACK, LOCAL, ... of cuobjdump. shared: bytes
    per block. instructions: of the kernel, without padding. rounds_fused: whether a fused multiply-add rounds. threads:
    of all programs. elements: of the largest tensor. bytes_moved: of all tensors, each once. tile: the product of the
    sizes of its blocks.
    """

    name: str
    ptx: str
    sass: str
    usage: dict[str, int]
    shared: int
    instructions: int
    rounds_fused: bool
    threads: int
    elements: int
    bytes_moved: int
    tile: int
    programs: int

    @property
    def loops(self) -> bool:
        """Whether it jumps back: then the instructions in it do not say how many are executed."""
        return _jumps_back(self.ptx)

    @property
    def loop(self) -> int:
        """The instructions of its longest loop, where it was disassembled."""
        code = [(int(place, 16), text) for place, text in _SASS_INSTRUCTION.findall(self.sass)]
        longest = 0
        for place, text in code:
            jump = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
            if jump and int(jump[1], 16) < place:
                longest = max(longest, sum(int(jump[1], 16) <= other <= place for other, _ in code))
        return longest

    @property
    def row(self) -> dict[str, object]:
        """What the golden file says about the kernel; per element the executed instructions, where nothing loops."""
        return {
            "kernel": self.name,
            "registers": self.usage["REG"],
            "spilled": self.usage["LOCAL"] + self.usage["STACK"],
            "shared": self.shared,
            "sass": self.instructions,
            "ptx": len(_PTX_INSTRUCTION.findall(self.ptx)),
            "sass_per_element": None if self.loops else round(self.instructions * self.threads / self.elements, 2),
            "bytes_per_element": round(self.bytes_moved / self.elements, 2),
        }


def _jumps_back(ptx: str) -> bool:
    seen: set[str] = set()
    for line in ptx.splitlines():
        if label := re.match(r"(\$L\w+):", line):
            seen.add(label[1])
        elif (jump := re.search(r"\bbra(?:\.uni)?\s+(\$L\w+)", line)) and jump[1] in seen:
            return True
    return False


def _instructions(cubin: bytes, kernel: str) -> list[tuple[int, int]]:
    """The low words of the instructions of section .text.KERNEL, an ELF file of 64 bits, without padding."""
    (sections,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + index * size) for index in range(count)]
    strings = headers[names][4]
    for name, _, _, _, start, length in headers:
        end = cubin.index(b"\0", strings + name)
        if cubin[strings + name : end].decode() == f".text.{kernel}":
            words = _INSTRUCTION.iter_unpack(cubin[start : start + length])
            return [(low, high) for low, high, _ in words if low & 0xFFF != _NOP]
    raise LookupError(f"the cubin has no section .text.{kernel}")


def _dump(cubin: bytes, what: str) -> str:
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout


def _tensors(arguments: Iterable[Any]) -> list[torch.Tensor]:
    """All tensors among the arguments of a kernel, which may be tuples of tensors."""
    found = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            found.append(argument)
        elif isinstance(argument, tuple):
            found += _tensors(argument)
    return found


def compile_launches(capability: int, launcher: Callable[[], object], disassemble: bool = False) -> list[Compiled]:
    """Every kernel that `launcher` launches on CPU tensors, compiled with its real arguments instead of run."""
    built: list[Compiled] = []

    def warm_up(kernel: JITFunction[Any], *arguments: Any, warmup: bool, grid: tuple[int], **options: Any) -> None:
        one = run(kernel, *arguments, warmup=True, grid=grid, **options)
        cubin, tensors = one.asm["cubin"], _tensors(arguments)
        instructions = _instructions(cubin, kernel.__name__)
        loops = capability == DISASSEMBLED and _jumps_back(one.asm["ptx"])
        built.append(
            Compiled(
                name=kernel.__name__,
                ptx=one.asm["ptx"],
                sass=_dump(cubin, "-sass") if disassemble or loops else "",
                usage={key: int(number) for key, number in re.findall(r"(\w+):(\d+)", _dump(cubin, "-res-usage"))},
                shared=one.metadata.shared,
                instructions=len(instructions),
                rounds_fused=any(low & 0x1FF == _FFMA and high == _MAGIC for low, high in instructions),
                threads=32 * one.metadata.num_warps * grid[0],
                elements=max(tensor.numel() for tensor in tensors),
                bytes_moved=sum(min(t.untyped_storage().nbytes(), t.nbytes) for t in tensors),
                tile=math.prod(size for name, size in options.items() if name.startswith("BLOCK_")),
                programs=grid[0],
            )
        )

    run = JITFunction.run
    triton.runtime.driver.set_active(_NoGpuDriver(capability))
    with mock.patch.object(JITFunction, "run", warm_up):
        launcher()
    return built


def _compile(name: str, capability: int) -> list[Compiled]:
    launch = launches()[name]
    return compile_launches(capability, launch.call, capability == DISASSEMBLED and bool(launch.sass_limits))


class Compilers:
    """Compiles launches of the tables in as many processes as there are cores, each launch for each GPU once."""

    def __init__(self) -> None:
        workers = min(_WORKERS, len(os.sched_getaffinity(0)))
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,))
        self._futures: dict[tuple[str, int], Future[list[Compiled]]] = {}

    def start(self, name: str, capability: int) -> Future[list[Compiled]]:
        if (name, capability) not in self._futures:
            self._futures[name, capability] = self._pool.submit(_compile, name, capability)
        return self._futures[name, capability]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
