"""Every kernel, with the configurations it ships, compiled for sm_80, sm_89, sm_90 and sm_100 without a GPU."""

import importlib
import re
from pathlib import Path

import pytest
from kernel_launch import Launch

pytestmark = pytest.mark.aot

_TABLES = sorted(path.stem for path in Path(__file__).parent.glob("launches_*.py"))
LAUNCHES: list[Launch] = [launch for table in _TABLES for launch in importlib.import_module(table).LAUNCHES]


@pytest.mark.parametrize("capability", [80, 89, 90, 100], ids="sm_{}".format)
@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: launch.name)
def test_compiled_kernel(launch: Launch, capability: int) -> None:
    # Not importable without Triton, where this test is skipped.
    from kernel_aot import SHARED_LIMIT, compile_launches

    kernels = compile_launches(capability, launch.call)
    assert kernels, f"{launch.name} launches nothing"
    for kernel in kernels:
        assert re.search(rf"^\.target sm_{capability}", kernel.ptx, re.MULTILINE), f"{kernel.name} is for another GPU"
        assert kernel.usage["REG"] <= launch.registers, f"{kernel.name} uses {kernel.usage['REG']} registers"
        assert kernel.usage["LOCAL"] == kernel.usage["STACK"] == 0, f"{kernel.name} spills: {kernel.usage}"
        assert kernel.shared <= SHARED_LIMIT[capability], f"{kernel.name} uses {kernel.shared} bytes of shared memory"
        if launch.rounds:
            assert "div.full" not in kernel.ptx, f"{kernel.name} divides with an error of 2 ulp"
            assert "fma.rn" not in kernel.ptx, f"{kernel.name} fuses a multiplication and an addition"
        # Disassembling takes longer than compiling, so it is done for one GPU.
        if launch.rounds and capability == 90:
            fused = re.search(r"\bFFMA\b.*\b12582912\b", kernel.sass)
            assert not fused, f"{kernel.name} rounds after a fused addition: {fused}"
