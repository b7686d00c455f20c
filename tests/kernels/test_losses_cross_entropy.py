"""softmax_cross_entropy: values, gradients, edges, errors, torch.compile, and its kernel against the reference."""

import math
from typing import Any

import losses_oracle as oracle
import pytest
import torch
from kernel_layouts import LAYOUTS, same_bits
from kernel_tolerances import LOSS_GRADIENT, SOFTMAX_CROSS_ENTROPY
from torch import Tensor

from ttaq_kernels import KernelError, cross_entropy, softmax_cross_entropy, softmax_entropy
from ttaq_kernels.reference import cross_entropy as reference

INF, NAN = float("inf"), float("nan")
LAYOUT_NAMES = ["contiguous", "permuted", "sliced"]
DIRECTIONS = pytest.mark.parametrize("symmetric", [False, True], ids=["one_direction", "symmetric"])


def pair_of(rows: int, classes: int) -> tuple[Tensor, Tensor]:
    """Logits of a student, and those of a teacher that half agrees."""
    student = oracle.logits(rows, classes)
    return student, 0.5 * student + oracle.logits(rows, classes, spread=1.0, seed=3)


def test_worked_by_hand(op_device: torch.device) -> None:
    """p = (1/4, 3/4), r = (1/2, 1/2): -sum r ln p = ln 4 - ln(3) / 2, -sum p ln r = ln 2; da = p - r;
    db = -r (ln p + L) = (1/2)(ln(3) / 2)(1, -1)."""
    a = torch.tensor([[0.0, math.log(3)]], device=op_device, requires_grad=True)
    b = torch.zeros(1, 2, device=op_device, requires_grad=True)
    forward, ln2, ln3 = math.log(4) - 0.5 * math.log(3), math.log(2), math.log(3)
    loss = softmax_cross_entropy(a, b)
    assert loss.tolist() == pytest.approx([forward], abs=1e-6)
    by_a, by_b = torch.autograd.grad(loss.sum(), (a, b))
    assert by_a.tolist()[0] == pytest.approx([-0.25, 0.25], abs=1e-6)
    assert by_b.tolist()[0] == pytest.approx([ln3 / 4, -ln3 / 4], abs=1e-6)
    symmetric = softmax_cross_entropy(a, b, symmetric=True)
    assert symmetric.tolist() == pytest.approx([0.5 * forward + 0.5 * ln2], abs=1e-6)


@DIRECTIONS
@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("shape", [(1, 2), (5, 10), (3, 1000), (2, 22_000)], ids="{0[0]}x{0[1]}".format)
def test_values_and_gradients_equal_float64(
    shape: tuple[int, int], layout: str, symmetric: bool, op_device: torch.device
) -> None:
    """Also with weights and an offset, and with logits around 1e4."""
    options = oracle.weights_and_offset(*shape)
    for level, (weights, offset) in ((0.0, (None, None)), (0.0, options), (1e4, (None, None))):
        both = [(level + logits).round(decimals=1) if level else logits for logits in pair_of(*shape)]
        given = [LAYOUTS[layout](logits.to(op_device)).detach().requires_grad_() for logits in both]
        grad = torch.randn(shape[0], generator=torch.Generator().manual_seed(1))
        moved = (None if t is None else t.to(op_device) for t in (weights, offset))
        loss = softmax_cross_entropy(*given, *moved, symmetric=symmetric)
        loss.backward(grad.to(op_device))
        wide = [logits.double().requires_grad_() for logits in both]
        expected = oracle.cross_entropy(*wide, weights, offset, symmetric)
        expected.backward(grad.double())
        torch.testing.assert_close(loss.detach().cpu().double(), expected.detach(), rtol=1e-6, atol=2e-6)
        for ours, theirs in zip(given, wide, strict=True):
            torch.testing.assert_close(ours.grad.cpu().double(), theirs.grad, rtol=1e-5, atol=1e-6)


@DIRECTIONS
def test_reference_in_float64(symmetric: bool) -> None:
    both = [logits.double().requires_grad_() for logits in pair_of(4, 7)]
    options = [t.double() for t in oracle.weights_and_offset(4, 7)]

    class Loss64(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            loss, *gradients = reference.softmax_cross_entropy(a, b, *options, symmetric, True, True)
            ctx.save_for_backward(*gradients)
            return loss

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
            return tuple(grad.unsqueeze(1) * gradient for gradient in ctx.saved_tensors)

    assert torch.autograd.gradcheck(Loss64.apply, both)


@DIRECTIONS
def test_of_itself_it_is_the_entropy(symmetric: bool, op_device: torch.device) -> None:
    logits = oracle.logits(5, 20).to(op_device)
    loss = softmax_cross_entropy(logits, logits, symmetric=symmetric)
    torch.testing.assert_close(loss, softmax_entropy(logits), rtol=0, atol=4e-6)


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
def test_only_the_side_that_requires_a_gradient_gets_one(needed: tuple[bool, bool], op_device: torch.device) -> None:
    sides = [logits.to(op_device).requires_grad_(need) for logits, need in zip(pair_of(3, 5), needed, strict=True)]
    both = [side.detach().clone().requires_grad_() for side in sides]
    loss = softmax_cross_entropy(*sides, symmetric=True)
    assert loss.requires_grad == any(needed)
    expected = softmax_cross_entropy(*both, symmetric=True)
    assert same_bits(loss.detach(), expected.detach())
    expected.sum().backward()
    if any(needed):
        loss.sum().backward()
    for side, other, need in zip(sides, both, needed, strict=True):
        assert same_bits(side.grad, other.grad) if need else side.grad is None


@DIRECTIONS
def test_what_is_not_finite(symmetric: bool, op_device: torch.device) -> None:
    """NaN in, NaN out; a class that both sides exclude counts for nothing, one that only one excludes is infinite."""
    fine = [0.0, 1.0, 2.0]
    rows = [(fine, [0.0, NAN, 1.0]), ([0.0, INF, 0.0], fine), (fine, [-INF] * 3), ([NAN, 0.0, 0.0], [-INF, 0.0, 0.0])]
    rows += [([-INF, 0.0, 0.0], [-INF, 0.0, 0.0]), ([-INF, 0.0, 0.0], fine), (fine, [-INF, 0.0, 0.0]), (fine, fine)]
    both = [torch.tensor(side, device=op_device).requires_grad_() for side in zip(*rows, strict=True)]
    loss = softmax_cross_entropy(*both, symmetric=symmetric)
    assert loss.isnan().tolist() == [True] * 4 + [False] * 4
    assert loss[4].item() == pytest.approx(math.log(2), abs=1e-6)
    assert loss.isinf().tolist() == [False] * 5 + [True, symmetric, False]
    loss.sum().backward()
    for side in both:
        assert side.grad[:4].isnan().all()
        assert side.grad[4].abs().max() < 1e-6
        assert side.grad[7].isfinite().all()


@DIRECTIONS
@pytest.mark.parametrize(("rows", "classes"), [(0, 3), (3, 1), (0, 1)])
def test_smallest_shapes(rows: int, classes: int, symmetric: bool, op_device: torch.device) -> None:
    both = [torch.randn(rows, classes, device=op_device, requires_grad=True) for _ in range(2)]
    loss = softmax_cross_entropy(*both, symmetric=symmetric)
    loss.sum().backward()
    assert loss.tolist() == [0.0] * rows
    assert all(side.grad.tolist() == [[0.0] * classes] * rows for side in both)


Z = torch.zeros(2, 3)
ERRORS: list[tuple[tuple[Any, ...], str]] = [
    (([1.0], Z), "logits is a list, expected a torch.Tensor"),
    ((Z, 1.0), "target is a float, expected a torch.Tensor"),
    ((torch.zeros(2, 0), Z), "logits has shape (2, 0), expected [B, C] with at least one class"),
    ((Z, torch.zeros(3)), "target has shape (3,), expected [B, C] with at least one class"),
    ((Z, torch.zeros(2, 4)), "target is torch.float32 (2, 4) on cpu, expected torch.float32 (2, 3) on cpu like logits"),
    ((Z, Z.half()), "target is torch.float16 (2, 3) on cpu, expected torch.float32 (2, 3) on cpu like logits"),
    ((Z, Z.to("meta")), "target is torch.float32 (2, 3) on meta, expected torch.float32 (2, 3) on cpu like logits"),
    ((Z, Z, torch.zeros(3)), "weights has shape (3,), expected (2,) = (rows of logits,)"),
    ((Z, Z, None, torch.zeros(2)), "offset has shape (2,), expected (3,) = (classes of logits,)"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[message[:40] for _, message in ERRORS])
def test_errors(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(KernelError) as caught:
        softmax_cross_entropy(*arguments)
    assert str(caught.value).startswith(f"softmax_cross_entropy: {message}")


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_opcheck(layout: str, op_device: torch.device) -> None:
    op = torch.ops.ttaq_kernels.softmax_cross_entropy.default
    a, b = (LAYOUTS[layout](logits).to(op_device) for logits in pair_of(3, 5))
    options = [t.to(op_device) for t in oracle.weights_and_offset(3, 5)]
    torch.library.opcheck(op, (a.detach().requires_grad_(), b, None, None, False, True, False))
    both = (a.detach().requires_grad_(), b.detach().requires_grad_())
    torch.library.opcheck(op, (*both, *options, True, True, True))


def _loss(a: Tensor, b: Tensor) -> Tensor:
    return (softmax_cross_entropy(a * 2, b, symmetric=True) + softmax_cross_entropy(a, b.detach())).mean()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool, op_device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (2, 3) if dynamic else (2,):
        results = []
        for function in (_loss, compiled):
            both = [logits.to(op_device).requires_grad_() for logits in pair_of(rows, 5)]
            loss = function(*both)
            results.append((loss.detach(), *torch.autograd.grad(loss, both)))
        torch.testing.assert_close(*results, rtol=0, atol=0)


def assert_matches(
    a: Tensor,
    b: Tensor,
    symmetric: bool,
    out_dtype: torch.dtype | None = None,
    weights: Tensor | None = None,
    offset: Tensor | None = None,
) -> None:
    """The kernel against the reference: loss and both gradients; NaN and infinities where the reference has them."""
    ours = cross_entropy._launch_cross_entropy(a, b, weights, offset, symmetric, True, True, out_dtype)
    options = [None if t is None else t.cpu() for t in (weights, offset)]
    wide = a.cpu().float(), b.cpu().float()
    expected = reference.softmax_cross_entropy(*wide, *options, symmetric, True, True)
    torch.testing.assert_close(ours[0].cpu(), expected[0], rtol=1e-6, atol=SOFTMAX_CROSS_ENTROPY, equal_nan=True)
    # Sums of terms of the size of p and of p times the spread of the logits: those are what is rounded.
    spread = sum(1 + side.nan_to_num(0, 0, 0).abs().amax(1, keepdim=True) for side in wide)
    for side, gradient, want in zip((a, b), ours[1:], expected[1:], strict=True):
        assert gradient.stride() == torch.empty_like(side).stride()
        assert torch.equal(gradient.cpu().isnan(), want.isnan())
        info = torch.finfo(gradient.dtype)
        eps = 0 if gradient.dtype is torch.float32 else info.eps
        bound = LOSS_GRADIENT * spread * sum(z.nan_to_num(0, 0, 0).softmax(1) for z in wide) + eps * want.abs()
        bound += info.smallest_normal
        defined = want.isfinite() & bound.isfinite()
        assert ((gradient.cpu().float() - want).abs() <= bound)[defined].all()


@DIRECTIONS
@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (5, 10), (130, 10), (7, 63), (2, 4097)], ids="{0[0]}x{0[1]}".format)
def test_kernel(shape: tuple[int, int], layout: str, symmetric: bool, kernel_device: torch.device) -> None:
    a, b = (logits.to(kernel_device) for logits in pair_of(*shape))
    weights, offset = (t.to(kernel_device) for t in oracle.weights_and_offset(*shape))
    assert_matches(LAYOUTS[layout](a), b, symmetric)
    assert_matches(a, LAYOUTS[layout](b), symmetric, weights=weights > 0.5, offset=offset)


@DIRECTIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_in_half_types(dtype: torch.dtype, symmetric: bool, kernel_device: torch.device) -> None:
    # The interpreter cuts off instead of rounding when it stores bfloat16, so there only the load is tested.
    interpreted = kernel_device.type == "cpu" and dtype is torch.bfloat16
    a, b = (logits.to(kernel_device, dtype) for logits in pair_of(9, 120))
    assert_matches(a, b, symmetric, torch.float32 if interpreted else None)


@DIRECTIONS
def test_kernel_at_what_is_not_finite(symmetric: bool, kernel_device: torch.device) -> None:
    a, b = pair_of(8, 4200)
    a[0, 3], b[1, -1], a[2, 4], b[3, 5] = NAN, NAN, INF, INF
    a[4] = -INF
    a[5, :4100] = b[5, :4100] = -INF
    a[6, 0] = b[7, 0] = -INF
    a, b = a.to(kernel_device), b.to(kernel_device)
    assert_matches(a, b, symmetric)
    loss, *nothing = cross_entropy._launch_cross_entropy(a, b, None, None, symmetric, False, False)
    assert loss.isnan().tolist() == [True] * 5 + [False] * 3
    assert [gradient.numel() for gradient in nothing] == [0, 0]


@pytest.mark.gpu
@DIRECTIONS
@pytest.mark.parametrize("shape", [(64, 1000), (200, 100), (512, 22_000)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shapes_of_networks(shape: tuple[int, int], dtype: torch.dtype, symmetric: bool) -> None:
    assert_matches(*(logits.cuda().to(dtype) for logits in pair_of(*shape)), symmetric)


@pytest.mark.gpu
def test_capture_in_a_cuda_graph() -> None:
    both = [logits.cuda() for logits in pair_of(64, 1000)]
    expected = [t.clone() for t in cross_entropy._launch_cross_entropy(*both, None, None, True, True, True)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cross_entropy._launch_cross_entropy(*both, None, None, True, True, True)
    graph.replay()
    assert all(same_bits(*pair) for pair in zip(captured, expected, strict=True))
