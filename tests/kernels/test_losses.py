"""The losses of one softmax as users call them: values, gradients, edges, errors, torch.compile; on CPU and GPU."""

import math
import os
import shutil
from collections.abc import Callable
from typing import Any

import losses_oracle as oracle
import numpy as np
import pytest
import torch
from kernel_layouts import LAYOUTS, same_bits
from torch import Tensor

from ttaq_kernels import KernelError, soft_likelihood_ratio, softmax_entropy
from ttaq_kernels.reference import losses as reference

INF, NAN = float("inf"), float("nan")
LAYOUT_NAMES = ["contiguous", "permuted", "sliced"]
LOSSES = {
    "entropy": (softmax_entropy, oracle.entropy),
    "likelihood_ratio": (soft_likelihood_ratio, oracle.likelihood_ratio),
}
Loss = Callable[..., Tensor]


@pytest.fixture(params=LOSSES.values(), ids=LOSSES)
def pair(request: pytest.FixtureRequest) -> tuple[Loss, Loss]:
    """A loss and its oracle."""
    return request.param


def assert_equal_to_float64(
    pair: tuple[Loss, Loss],
    logits: Tensor,
    device: torch.device,
    layout: str = "contiguous",
    weights: Tensor | None = None,
    offset: Tensor | None = None,
) -> None:
    """Values and gradients, for gradients of the losses of both signs. 1 - p costs the likelihood ratio some digits."""
    loss, expected_loss = pair
    given = LAYOUTS[layout](logits.to(device)).detach().requires_grad_()
    grad = torch.randn(len(logits), generator=torch.Generator().manual_seed(1))
    values = loss(given, *(None if t is None else t.to(device) for t in (weights, offset)))
    values.backward(grad.to(device))
    wide = logits.detach().double().requires_grad_()
    expected = expected_loss(wide, weights, offset)
    expected.backward(grad.double())
    digits = 5 if loss is soft_likelihood_ratio else 1
    torch.testing.assert_close(values.detach().cpu().double(), expected.detach(), rtol=1e-6, atol=digits * 2e-6)
    torch.testing.assert_close(given.grad.cpu().double(), wide.grad, rtol=1e-5, atol=digits * 1e-6)


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


def test_likelihood_ratio_worked_by_hand(op_device: torch.device) -> None:
    """p = (1/4, 3/4): l = -(1/4 ln(1/3) + 3/4 ln 3) = -ln(3) / 2 without the 1e-5. With u = -(ln r + 1 / (1 - p)), that
    is u = (ln 3 - 4/3, -ln 3 - 4), dl/dz = p (u - sum p u) = +-(3/16) (2 ln 3 + 8/3). Above 0.99 nothing changes."""
    ln3 = math.log(3)
    logits = torch.tensor([[0.0, ln3], [0.0, 9.0]], device=op_device, requires_grad=True)
    loss = soft_likelihood_ratio(logits)
    assert loss[0].item() == pytest.approx(-0.5 * ln3, abs=2e-5)
    assert loss[1].item() == pytest.approx(-0.99 * math.log(99), abs=2e-3)
    loss.sum().backward()
    slope = 3 / 16 * (2 * ln3 + 8 / 3)
    assert logits.grad[0].tolist() == pytest.approx([slope, -slope], abs=1e-4)
    assert logits.grad[1].abs().max() < 2e-3


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("shape", [(1, 2), (5, 10), (3, 1000), (2, 22_000)], ids="{0[0]}x{0[1]}".format)
def test_values_and_gradients_equal_float64(
    shape: tuple[int, int], layout: str, pair: tuple[Loss, Loss], op_device: torch.device
) -> None:
    assert_equal_to_float64(pair, oracle.logits(*shape), op_device, layout)


@pytest.mark.parametrize("given", ["weights", "offset", "both"])
@pytest.mark.parametrize("shape", [(1, 2), (6, 10), (3, 1000)], ids="{0[0]}x{0[1]}".format)
def test_weights_and_offset(
    shape: tuple[int, int], given: str, pair: tuple[Loss, Loss], op_device: torch.device
) -> None:
    weights, offset = oracle.weights_and_offset(*shape)
    chosen = {"weights": weights} if given == "weights" else {"offset": offset}
    chosen = {"weights": weights, "offset": offset} if given == "both" else chosen
    assert_equal_to_float64(pair, oracle.logits(*shape), op_device, **chosen)


def test_a_mask_is_a_weight_of_0_or_1(pair: tuple[Loss, Loss], op_device: torch.device) -> None:
    loss, logits = pair[0], oracle.logits(4, 10).to(op_device).requires_grad_()
    mask = torch.tensor([True, False, True, False], device=op_device)
    values = loss(logits, mask)
    assert same_bits(values.detach(), loss(logits, mask.float()).detach())
    assert same_bits(values[mask].detach(), loss(logits)[mask].detach())
    values.sum().backward()
    assert values[~mask].eq(0).all()
    assert logits.grad[~mask].eq(0).all()
    assert logits.grad[mask].ne(0).any()


def test_an_offset_is_added_before_the_softmax(pair: tuple[Loss, Loss], op_device: torch.device) -> None:
    logits, offset = torch.zeros(2, 3, device=op_device), torch.tensor([0.0, 1.0, -INF], device=op_device)
    torch.testing.assert_close(pair[0](logits, None, offset), pair[0](logits + offset))


def test_the_gradient_is_found_only_where_it_is_needed() -> None:
    op = torch.ops.ttaq_kernels.softmax_loss
    logits = oracle.logits(2, 3)
    assert op(logits, None, None, "entropy", False)[1].shape == (0,)
    loss, gradient = op(logits.requires_grad_(), None, None, "entropy", True)
    assert loss.requires_grad
    assert not gradient.requires_grad


def test_equal_to_numpy() -> None:
    z = oracle.logits(6, 20).double().numpy()
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    ours = softmax_entropy(torch.from_numpy(z).float()).numpy()
    np.testing.assert_allclose(ours, -(p * np.log(p)).sum(axis=1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", LOSSES)
def test_reference_in_float64(kind: str) -> None:
    logits = oracle.logits(4, 7).double()
    options = [t.double() for t in oracle.weights_and_offset(4, 7)]

    class Loss64(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            loss, gradient = reference.softmax_loss(z, *options, kind, True)
            ctx.save_for_backward(gradient)
            return loss

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad.unsqueeze(1) * ctx.saved_tensors[0]

    assert torch.autograd.gradcheck(Loss64.apply, (logits.requires_grad_(),))


def test_large_logits(pair: tuple[Loss, Loss], op_device: torch.device) -> None:
    """At 1e4 float32 is spaced by 1e-3: p must come from differences of logits."""
    assert_equal_to_float64(pair, 1e4 + oracle.logits(6, 50).round(decimals=1), op_device)


def test_certain_rows_have_no_entropy(op_device: torch.device) -> None:
    certain = torch.tensor([[1e4, -1e4, 0.0]], device=op_device, requires_grad=True)
    entropy = softmax_entropy(certain)
    entropy.sum().backward()
    assert entropy.item() == 0
    assert certain.grad.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    ("row", "defined"),
    [
        ([0.0, NAN, 1.0], False),
        ([0.0, INF, 1.0], False),
        ([-INF, -INF, -INF], False),
        ([0.0, -INF, 0.0], True),
        ([-INF, -3.0, -INF], True),
    ],
)
def test_what_is_not_finite(row: list[float], defined: bool, pair: tuple[Loss, Loss], op_device: torch.device) -> None:
    """NaN in, NaN out, also for a weight of 0; a class of probability 0 counts for nothing."""
    logits = torch.tensor([row, [0.0, 1.0, 2.0]], device=op_device, requires_grad=True)
    loss = pair[0](logits)
    expected = pair[1](logits.detach().cpu())
    assert loss.tolist() == pytest.approx(expected.tolist(), abs=1e-5, nan_ok=True)
    assert loss.isnan().tolist() == [not defined, False]
    assert pair[0](logits, torch.zeros(2, device=op_device)).isnan().tolist() == [not defined, False]
    loss.sum().backward()
    assert logits.grad[0].isfinite().all() if defined else logits.grad[0].isnan().all()
    assert logits.grad[1].isfinite().all()


@pytest.mark.parametrize(("rows", "classes"), [(0, 3), (3, 1), (0, 1)])
def test_smallest_shapes(rows: int, classes: int, pair: tuple[Loss, Loss], op_device: torch.device) -> None:
    logits = torch.randn(rows, classes, device=op_device, requires_grad=True)
    loss = pair[0](logits)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx(pair[1](logits.detach().cpu()).tolist(), abs=1e-5)
    assert logits.grad.tolist() == [[0.0] * classes] * rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(
    dtype: torch.dtype, pair: tuple[Loss, Loss], op_device: torch.device
) -> None:
    narrow = oracle.logits(6, 50).to(op_device, dtype).requires_grad_()
    wide = narrow.detach().float().requires_grad_()
    assert same_bits(pair[0](narrow).detach(), pair[0](wide).detach())
    pair[0](narrow).sum().backward()
    pair[0](wide).sum().backward()
    assert same_bits(narrow.grad, wide.grad.to(dtype))


Z = torch.zeros(2, 3)
ERRORS: list[tuple[tuple[Any, ...], str]] = [
    (([1.0],), "logits is a list, expected a torch.Tensor"),
    ((Z.double(),), "logits has dtype float64, expected float32 or bfloat16 or float16"),
    ((torch.zeros(3),), "logits has shape (3,), expected [B, C] with at least one class"),
    ((torch.zeros(2, 3, 4),), "logits has shape (2, 3, 4), expected [B, C] with at least one class"),
    ((torch.zeros(2, 0),), "logits has shape (2, 0), expected [B, C] with at least one class"),
    ((Z, 0.5), "weights is a float, expected a torch.Tensor"),
    ((Z, torch.zeros(2).long()), "weights has dtype int64, expected float32 or bool; convert it with weights.to(...)"),
    ((Z, torch.zeros(3)), "weights has shape (3,), expected (2,) = (rows of logits,)"),
    ((Z, torch.zeros(2, device="meta")), "weights is on meta, expected cpu like logits; move it with weights.to("),
    ((Z, None, torch.zeros(3).half()), "offset has dtype float16, expected float32; convert it with offset.to(...)"),
    ((Z, None, torch.zeros(1, 3)), "offset has shape (1, 3), expected (3,) = (classes of logits,)"),
    ((Z, None, torch.zeros(3, device="meta")), "offset is on meta, expected cpu like logits; move it with offset.to("),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[message[:40] for _, message in ERRORS])
def test_errors(arguments: tuple[Any, ...], message: str) -> None:
    for loss in (softmax_entropy, soft_likelihood_ratio):
        with pytest.raises(KernelError) as caught:
            loss(*arguments)
        assert str(caught.value).startswith(f"{loss.__name__}: {message}")


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("kind", LOSSES)
def test_opcheck(kind: str, layout: str, op_device: torch.device) -> None:
    op = torch.ops.ttaq_kernels.softmax_loss.default
    logits = LAYOUTS[layout](oracle.logits(3, 5)).to(op_device)
    options = [t.to(op_device) for t in oracle.weights_and_offset(3, 5)]
    torch.library.opcheck(op, (logits.detach().requires_grad_(), *options, kind, True))
    torch.library.opcheck(op, (logits, None, None, kind, False))


def _loss(logits: Tensor) -> Tensor:
    kept = softmax_entropy(logits.detach()) < 1.4
    return (softmax_entropy(logits * 2, kept) + soft_likelihood_ratio(logits)).mean()


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
