"""softmax_entropy as users call it: values, gradients, edges, errors, torch.compile; on the CPU and on a GPU."""

import math
import os
import shutil
from typing import Any

import losses_oracle as oracle
import numpy as np
import pytest
import torch
from kernel_layouts import LAYOUTS, same_bits
from torch import Tensor

from ttaq_kernels import KernelError, softmax_entropy
from ttaq_kernels.reference import losses as reference

INF, NAN = float("inf"), float("nan")
LAYOUT_NAMES = ["contiguous", "permuted", "sliced"]


def test_worked_by_hand(op_device: torch.device) -> None:
    """p = (1/4, 1/4, 1/2): H = 1.5 ln 2 and dH/dz = -p (ln p + H) = (1/4, 1/4, 1/2) ln 2 (0.5, 0.5, -0.5)."""
    ln2 = math.log(2)
    logits = torch.tensor([[0.0, 0.0, ln2], [7.0, 7.0, 7.0]], device=op_device, requires_grad=True)
    entropy = softmax_entropy(logits)
    assert entropy.dtype is torch.float32
    assert entropy.tolist() == pytest.approx([1.5 * ln2, math.log(3)], abs=1e-6)
    entropy.sum().backward()
    assert logits.grad[0].tolist() == pytest.approx([ln2 / 8, ln2 / 8, -ln2 / 4], abs=1e-6)
    assert logits.grad[1].tolist() == pytest.approx([0, 0, 0], abs=1e-6)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("shape", [(1, 2), (5, 10), (3, 1000), (2, 22_000)], ids="{0[0]}x{0[1]}".format)
def test_values_and_gradients_equal_float64(shape: tuple[int, int], layout: str, op_device: torch.device) -> None:
    logits = oracle.logits(*shape)
    given = LAYOUTS[layout](logits.to(op_device)).detach().requires_grad_()
    grad = torch.randn(shape[0], generator=torch.Generator().manual_seed(1))
    entropy = softmax_entropy(given)
    entropy.backward(grad.to(op_device))
    wide = logits.double().requires_grad_()
    expected = oracle.entropy(wide)
    expected.backward(grad.double())
    torch.testing.assert_close(entropy.detach().cpu().double(), expected.detach(), rtol=0, atol=2e-6)
    torch.testing.assert_close(given.grad.cpu().double(), wide.grad, rtol=1e-5, atol=1e-6)


def test_equal_to_numpy() -> None:
    z = oracle.logits(6, 20).double().numpy()
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    ours = softmax_entropy(torch.from_numpy(z).float()).numpy()
    np.testing.assert_allclose(ours, -(p * np.log(p)).sum(axis=1), rtol=0, atol=2e-6)


def test_reference_in_float64() -> None:
    logits = oracle.logits(4, 7).double()

    class Entropy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            parts = reference.softmax_entropy_forward(z)
            ctx.save_for_backward(z, *parts)
            return parts[0]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return reference.softmax_entropy_backward(grad, *ctx.saved_tensors)

    assert torch.autograd.gradcheck(Entropy.apply, (logits.requires_grad_(),))


def test_large_logits(op_device: torch.device) -> None:
    """At 1e4 float32 is spaced by 1e-3: p must come from differences of logits."""
    logits = 1e4 + oracle.logits(6, 50).round(decimals=1)
    given = logits.to(op_device).requires_grad_()
    entropy = softmax_entropy(given)
    entropy.sum().backward()
    wide = logits.detach().double().requires_grad_()
    oracle.entropy(wide).sum().backward()
    torch.testing.assert_close(entropy.detach().cpu().double(), oracle.entropy(logits.detach()), rtol=0, atol=2e-6)
    torch.testing.assert_close(given.grad.cpu().double(), wide.grad, rtol=1e-5, atol=1e-6)
    certain = torch.tensor([[1e4, -1e4, 0.0]], device=op_device, requires_grad=True)
    entropy = softmax_entropy(certain)
    entropy.sum().backward()
    assert entropy.item() == 0
    assert certain.grad.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([0.0, NAN, 1.0], NAN),
        ([0.0, INF, 1.0], NAN),
        ([-INF, -INF, -INF], NAN),
        ([0.0, -INF, 0.0], math.log(2)),
        ([-INF, -3.0, -INF], 0.0),
    ],
)
def test_what_is_not_finite(row: list[float], expected: float, op_device: torch.device) -> None:
    logits = torch.tensor([row, [0.0, 0.0, 0.0]], device=op_device, requires_grad=True)
    entropy = softmax_entropy(logits)
    assert entropy.tolist() == pytest.approx([expected, math.log(3)], abs=1e-6, nan_ok=True)
    entropy.sum().backward()
    assert logits.grad[0].isnan().all() if math.isnan(expected) else logits.grad[0].tolist() == [0, 0, 0]
    assert logits.grad[1].abs().max() < 1e-6


@pytest.mark.parametrize(("rows", "classes"), [(0, 3), (3, 1), (0, 1)])
def test_smallest_shapes(rows: int, classes: int, op_device: torch.device) -> None:
    logits = torch.randn(rows, classes, device=op_device, requires_grad=True)
    entropy = softmax_entropy(logits)
    entropy.sum().backward()
    assert entropy.tolist() == [0.0] * rows
    assert logits.grad.tolist() == [[0.0] * classes] * rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype: torch.dtype, op_device: torch.device) -> None:
    narrow = oracle.logits(6, 50).to(op_device, dtype).requires_grad_()
    wide = narrow.detach().float().requires_grad_()
    assert same_bits(softmax_entropy(narrow).detach(), softmax_entropy(wide).detach())
    softmax_entropy(narrow).sum().backward()
    softmax_entropy(wide).sum().backward()
    assert same_bits(narrow.grad, wide.grad.to(dtype))


ERRORS: list[tuple[Any, str]] = [
    ([1.0], "logits is a list, expected a torch.Tensor"),
    (torch.zeros(2, 3).double(), "logits has dtype float64, expected float32 or bfloat16 or float16"),
    (torch.zeros(3), "logits have shape (3,), expected [B, C] with at least one class"),
    (torch.zeros(2, 3, 4), "logits have shape (2, 3, 4), expected [B, C] with at least one class"),
    (torch.zeros(2, 0), "logits have shape (2, 0), expected [B, C] with at least one class"),
]


@pytest.mark.parametrize(("logits", "message"), ERRORS, ids=[message[:40] for _, message in ERRORS])
def test_errors(logits: Any, message: str) -> None:
    with pytest.raises(KernelError) as caught:
        softmax_entropy(logits)
    assert str(caught.value).startswith(f"softmax_entropy: {message}")


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_opcheck(layout: str, op_device: torch.device) -> None:
    ops = torch.ops.ttaq_kernels
    logits = LAYOUTS[layout](oracle.logits(3, 5)).to(op_device)
    torch.library.opcheck(ops.softmax_entropy.default, (logits.detach().requires_grad_(),))
    grad = torch.ones(3, device=op_device)
    torch.library.opcheck(ops.softmax_entropy_backward.default, (grad, logits, *ops.softmax_entropy(logits)))


def _loss(logits: Tensor) -> Tensor:
    return softmax_entropy(logits * 2).mean()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool, op_device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (2, 3) if dynamic else (2,):
        results = []
        for function in (_loss, compiled):
            logits = oracle.logits(rows, 5).to(op_device).requires_grad_()
            loss = function(logits)
            results.append((loss.detach(), *torch.autograd.grad(loss, logits)))
        torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
# The first import of the code generator touches parts of torch that are deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compiles_to_code(op_device: torch.device) -> None:
    torch._dynamo.reset()
    logits = oracle.logits(3, 5).to(op_device)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(_loss, fullgraph=True)(logits), _loss(logits))
