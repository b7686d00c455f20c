"""Every kernel, with the configurations it ships, compiled for sm_80, sm_89, sm_90 and sm_100 without a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from kernel_budget import BUDGET, SMALLEST, streams
from kernel_golden import GOLDEN, read_golden
from kernel_launch import launches

if TYPE_CHECKING:
    from kernel_aot import Compiled, Compilers

    Compile = Callable[[str, int], list[Compiled]]

_INLINE = re.compile(r"// begin inline asm.*?// end inline asm", re.DOTALL)

CASES = [(name, capability) for capability in (80, 89, 90, 100) for name in launches()]


def every_case(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.aot(pytest.mark.parametrize(("name", "capability"), CASES, ids=str)(test))


@pytest.fixture(scope="module")
def compilers(request: pytest.FixtureRequest) -> Iterator[list[Compilers]]:
    """Empty until the first test compiles: the process that only reports has nothing to compile."""
    started: list[Compilers] = []
    yield started
    for one in started:
        one.close()


@pytest.fixture
def compile_case(request: pytest.FixtureRequest, compilers: list[Compilers]) -> Compile:
    """Compiles a case; the first call starts all that this run will ask for."""

    def compiled(name: str, capability: int) -> list[Compiled]:
        # Not importable without Triton, where these tests are skipped.
        from kernel_aot import Compilers

        if not compilers:
            compilers.append(Compilers())
            for item in request.session.items:
                if "compile_case" in getattr(item, "fixturenames", ()):
                    compilers[0].start(**item.callspec.params)
        return compilers[0].start(name, capability).result()

    return compiled


@every_case
def test_compiled_kernel(name: str, capability: int, compile_case: Compile) -> None:
    from kernel_aot import SHARED_LIMIT

    launch, kernels = launches()[name], compile_case(name, capability)
    assert kernels, f"{name} launches nothing"
    for kernel in kernels:
        assert re.search(rf"^\.target sm_{capability}", kernel.ptx, re.MULTILINE), f"{kernel.name} is for another GPU"
        assert kernel.usage["REG"] <= launch.registers, f"{kernel.name} uses {kernel.usage['REG']} registers"
        assert kernel.usage["LOCAL"] == kernel.usage["STACK"] == 0, f"{kernel.name} spills: {kernel.usage}"
        assert kernel.shared <= SHARED_LIMIT[capability], f"{kernel.name} uses {kernel.shared} bytes of shared memory"
        if launch.rounds:
            assert "div.full" not in kernel.ptx, f"{kernel.name} divides with an error of 2 ulp"
            # Inline assembly fuses on purpose.
            compiled = _INLINE.sub("", kernel.ptx)
            assert "fma.rn" not in compiled, f"{kernel.name} fuses a multiplication and an addition"
            assert not kernel.rounds_fused, f"{kernel.name} rounds by a fused multiplication and addition"
        for instruction, limit in launch.sass_limits.items():
            count = len(re.findall(rf"\b{instruction}\b", kernel.sass))
            assert count <= limit, f"{kernel.name} has {count} {instruction}"
    if capability in launch.required:
        pattern = launch.required[capability]
        assert any(re.search(pattern, kernel.ptx) for kernel in kernels), f"{name} has no {pattern}"


@pytest.mark.aot
@pytest.mark.parametrize("capability", [90])
@pytest.mark.parametrize("name", [name for name in launches() if streams(name, "")])
def test_instructions_per_byte(name: str, capability: int, compile_case: Compile) -> None:
    """A kernel that goes over its tensors once does not compute for longer than their bytes take to move."""
    for kernel in compile_case(name, capability):
        if kernel.elements < SMALLEST:
            continue
        if kernel.loops:
            each = kernel.loop * kernel.threads / kernel.programs / kernel.tile
            per_byte = each * kernel.elements / kernel.bytes_moved
            assert per_byte > 0, f"{kernel.name}: its loop was not found"
        elif streams(name, kernel.name):
            per_byte = kernel.instructions * kernel.threads / kernel.bytes_moved
        else:
            continue
        assert per_byte <= BUDGET, f"{kernel.name}: {per_byte:.2f} instructions for each byte, allowed {BUDGET}"


@every_case
def test_numbers_are_those_of_the_golden_file(name: str, capability: int, compile_case: Compile) -> None:
    import triton

    golden = read_golden().get(triton.__version__)
    if golden is None:
        pytest.skip(f"{GOLDEN.name} has no numbers of Triton {triton.__version__}")
    got = [kernel.row for kernel in compile_case(name, capability)]
    assert got == golden[f"sm_{capability}"].get(name), "run make golden if this is meant, and read what changed"


def test_the_golden_file_has_no_other_launches() -> None:
    for version, gpus in read_golden().items():
        for gpu, rows in gpus.items():
            assert rows.keys() <= launches().keys(), f"{version}, {gpu}: launches that no table has; run make golden"


@pytest.mark.aot
def test_a_fused_rounding_is_found() -> None:
    import torch
    from kernel_aot import compile_launches

    from ttaq_kernels import fake_quant

    x, scale, zero_point = torch.zeros(2048), torch.ones(1), torch.zeros(1, dtype=torch.int32)
    sizes, blocks = (1, 1, 2048, 1, 0, 15, 1), {"CHANNEL": "tensor", "BLOCK_ROWS": 1, "BLOCK_COLS": 2048, "BITS": 0}

    def launch(fused: bool) -> Callable[[], object]:
        kernel = fake_quant._forward_kernel[(1,)]
        return lambda: kernel(x, scale, zero_point, None, x, *sizes, **blocks, enable_fp_fusion=fused)

    assert [compile_launches(90, launch(fused))[0].rounds_fused for fused in (True, False)] == [True, False]
