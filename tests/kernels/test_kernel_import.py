"""Where Triton is not installed CPU tensors work, and launching a kernel says what to install."""

import subprocess
import sys

import pytest

_USE_ON_CPU = """
import torch
from ttaq_kernels import fake_quantize
scale = torch.ones(1, requires_grad=True)
fake_quantize(torch.randn(5), scale, torch.zeros(1, dtype=torch.int32), 0, 3).sum().backward()
assert scale.grad is not None
"""
SCRIPTS = {
    "without_triton": f"""
import sys
sys.modules["triton"] = None
{_USE_ON_CPU}
from ttaq_kernels import KernelError, fake_quant
try:
    fake_quant._launch_forward(torch.randn(5), scale.detach(), torch.zeros(1, dtype=torch.int32), 0, 3, None)
except KernelError as error:
    assert str(error).startswith("fake_quantize: a tensor on cpu needs Triton, which is not installed;"), error
    assert "pip install triton" in str(error)
else:
    raise AssertionError("launched without Triton")
""",
    "a_broken_triton_is_not_hidden": """
import sys, types
sys.modules["triton"] = types.ModuleType("triton")
try:
    import ttaq_kernels
except ModuleNotFoundError as error:
    assert error.name == "triton.language", error
else:
    raise AssertionError("imported with a broken Triton")
""",
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_import(script: str) -> None:
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
