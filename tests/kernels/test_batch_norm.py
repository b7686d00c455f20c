"""batch_norm and batch_norm_moments as users call them: values, gradients, layouts, errors, torch.compile."""

import os
import shutil
from typing import Any

import batch_norm_oracle as oracle
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernel_layouts import LAYOUTS, layouts_of, same_bits
from torch import Tensor

from ttaq_kernels import KernelError, batch_norm, batch_norm_moments
from ttaq_kernels.reference import batch_norm as reference

SHAPES: list[tuple[int, ...]] = [(8, 3), (4, 3, 6), (3, 5, 4, 6), (2, 3, 2, 3, 4)]
SHAPE_IDS = ["x".join(map(str, shape)) for shape in SHAPES]


def test_worked_by_hand(op_device: torch.device) -> None:
    """Channel 0: values 1 and 3, mean 2, variance 1. Channel 1: 0 and 4, mean 2, variance 4. Here eps is 1e-9."""
    x = torch.tensor([[1.0, 0.0], [3.0, 4.0]], device=op_device, requires_grad=True)
    weight = torch.tensor([2.0, 1.0], device=op_device, requires_grad=True)
    bias = torch.tensor([0.0, 10.0], device=op_device, requires_grad=True)
    batch = batch_norm(x, weight, bias, None, None, 1.0, 1e-9)
    torch.testing.assert_close(batch.tolist(), [[-2.0, 9.0], [2.0, 11.0]])
    batch.backward(torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=op_device))
    # Two values normalise to -1 and 1 whatever they are, so no change of them changes y.
    torch.testing.assert_close(x.grad.cpu(), torch.zeros(2, 2), rtol=0, atol=1e-6)
    assert weight.grad.tolist() == pytest.approx([-1, 1])
    assert bias.grad.tolist() == [1, 1]
    # Half of each: means (2 + 0) / 2 = 1 and (2 + 2) / 2 = 2, variances (1 + 7) / 2 = 4 and (4 + 28) / 2 = 16.
    source = torch.tensor([0.0, 2.0], device=op_device), torch.tensor([7.0, 28.0], device=op_device)
    assert batch_norm(x, None, None, *source, 0.5, 1e-9).tolist() == [[0, -0.5], [1, 0.5]]
    mean, var = batch_norm_moments(x)
    assert (mean.tolist(), var.tolist()) == ([2, 2], [1, 4])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_equal_to_torch(shape: tuple[int, ...], alpha: float, affine: bool, op_device: torch.device) -> None:
    """alpha 0 is torch's evaluation mode, alpha 1 its training mode."""
    weight, bias, mean, var = oracle.vectors(shape[1], op_device, affine)
    grad = oracle.values(shape, seed=3).to(op_device)
    results = []
    for ours in (True, False):
        inputs = [oracle.values(shape).to(op_device), weight, bias]
        x, w, b = (None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs)
        if ours:
            y = batch_norm(x, w, b, mean, var, alpha)
        else:
            y = F.batch_norm(x, None if alpha else mean, None if alpha else var, w, b, training=alpha == 1)
        results.append((y, *torch.autograd.grad(y, [t for t in (x, w, b) if t is not None], grad)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", layouts_of(4))
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_values_and_gradients_equal_float64(alpha: float, layout: str, op_device: torch.device) -> None:
    """Against the definition, differentiated by autograd in float64."""
    given = oracle.vectors(5)
    x = LAYOUTS[layout](oracle.values((3, 5, 4, 6)).to(op_device)).detach().requires_grad_()
    grad = oracle.values((3, 5, 4, 6), seed=3)
    weight, bias, mean, var = (vector.to(op_device) for vector in given)
    y = batch_norm(x, weight.requires_grad_(), bias.requires_grad_(), mean, var, alpha)
    assert y.stride() == torch.empty_like(x).stride()
    ours = (y, *torch.autograd.grad(y, (x, weight, bias), grad.to(op_device)))

    wide = oracle.double(given)
    inputs = (x.detach().cpu().double().requires_grad_(), wide[0].requires_grad_(), wide[1].requires_grad_())
    y64 = oracle.formula(inputs[0], wide, alpha)
    expected = (y64, *torch.autograd.grad(y64, inputs, grad.double()))
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got.detach().cpu().double(), want.detach(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_reference_in_float64(alpha: float, affine: bool) -> None:
    """The oracle of the kernels has no error of its own beyond rounding."""
    x = oracle.values((3, 5, 4, 6)).double().requires_grad_()
    grad = oracle.values((3, 5, 4, 6), seed=3).double()
    given = oracle.double(oracle.vectors(5, affine=affine))
    inputs = [x, *(vector.requires_grad_() for vector in given[:2] if vector is not None)]
    y = oracle.formula(x, given, alpha)
    expected = torch.autograd.grad(y, inputs, grad)
    with torch.no_grad():
        ours, statistics = reference.batch_norm_forward(x, *given, None, alpha, 1e-5)
        dx, affine_grads = reference.batch_norm_backward(grad, x, given[0], statistics, None, alpha, True, True)
    torch.testing.assert_close(ours, y.detach(), rtol=1e-12, atol=1e-12)
    for got, want in zip((dx, *affine_grads), expected, strict=False):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_reference_walks_over_large_batches_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x, given = oracle.values((7, 3, 4, 5)), oracle.vectors(3)
    mask = torch.arange(7) % 3 != 1
    whole, statistics = reference.batch_norm_forward(x, *given, mask, 0.3, 1e-5)
    gradients = reference.batch_norm_backward(x, x, given[0], statistics, mask, 0.3, True, True)
    monkeypatch.setattr("ttaq_kernels.reference.moments._PIECE", 130)
    in_pieces, _ = reference.batch_norm_forward(x, *given, mask, 0.3, 1e-5)
    torch.testing.assert_close(in_pieces, whole)
    torch.testing.assert_close(
        reference.batch_norm_backward(x, x, given[0], statistics, mask, 0.3, True, True),
        gradients,
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_moments_equal_numpy(shape: tuple[int, ...], op_device: torch.device) -> None:
    x = oracle.values(shape)
    mean, var = batch_norm_moments(x.to(op_device))
    axes = tuple(oracle.others(x))
    np.testing.assert_allclose(mean.cpu().numpy(), x.double().numpy().mean(axis=axes), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(var.cpu().numpy(), x.double().numpy().var(axis=axes), rtol=1e-5)


def test_gradient_of_the_moments(op_device: torch.device) -> None:
    x = oracle.values((3, 5, 4, 6))
    given = x.to(op_device).requires_grad_()
    mean, var = batch_norm_moments(given)
    (mean.square().sum() + var.sqrt().sum()).backward()
    wide = x.detach().double().requires_grad_()
    (wide.mean([0, 2, 3]).square().sum() + wide.var([0, 2, 3], correction=0).sqrt().sum()).backward()
    torch.testing.assert_close(given.grad.cpu().double(), wide.grad, rtol=1e-5, atol=1e-7)


def test_far_from_zero(op_device: torch.device) -> None:
    """Mean 1000, standard deviation 1, where E[x^2] - E[x]^2 in fp32 has no correct digit."""
    x = torch.randn(16, 4, 16, 16, generator=torch.Generator().manual_seed(0)) + 1000
    mean, var = (moment.cpu().double() for moment in batch_norm_moments(x.to(op_device)))
    torch.testing.assert_close(var, x.double().var([0, 2, 3], correction=0), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean, x.double().mean([0, 2, 3]), rtol=1e-6, atol=0)
    y = batch_norm(x.to(op_device), None, None, None, None).cpu()
    assert (y.mean([0, 2, 3]).abs() < 1e-3).all()
    assert ((y.var([0, 2, 3], correction=0) - 1).abs() < 1e-4).all()


def test_one_element_per_channel_has_variance_0(op_device: torch.device) -> None:
    x = torch.tensor([[3.0, -1e4, 0.1]], device=op_device).view(1, 3, 1, 1).requires_grad_()
    mean, var = batch_norm_moments(x)
    assert torch.equal(mean, x.flatten())
    assert var.tolist() == [0, 0, 0]
    bias = torch.tensor([1.0, 2.0, 3.0], device=op_device)
    y = batch_norm(x, None, bias, None, None)
    assert torch.equal(y.flatten(), bias)
    assert torch.autograd.grad(y.sum(), x)[0].flatten().tolist() == [0, 0, 0]


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2, 2), (2, 3, 0, 2), (2, 0, 2, 2)])
def test_nothing_gives_nothing(shape: tuple[int, ...], op_device: torch.device) -> None:
    x = torch.zeros(shape, device=op_device, requires_grad=True)
    weight, bias, mean, var = oracle.vectors(shape[1], op_device)
    for alpha in (0.0, 0.3, 1.0):
        y = batch_norm(x, weight.requires_grad_(), bias.requires_grad_(), mean, var, alpha)
        assert y.shape == x.shape
        gradients = torch.autograd.grad(y.sum(), (x, weight, bias))
        assert [g.shape for g in gradients] == [x.shape, weight.shape, bias.shape]
        assert not any(g.any() for g in gradients)
    assert [moment.tolist() for moment in batch_norm_moments(x)] == [[0.0] * shape[1]] * 2


def test_alpha_0_mixes_no_samples(op_device: torch.device) -> None:
    """The moments of the batch are not even computed, so what is not finite stays in its element."""
    x = oracle.values((2, 3, 4, 4)).to(op_device)
    x[1, 1, 2, 3] = torch.nan
    y = batch_norm(x, *oracle.vectors(3, op_device), 0.0)
    assert y.isnan().sum() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_rounded_once(dtype: torch.dtype, op_device: torch.device) -> None:
    x = oracle.values((3, 5, 4, 6)).to(op_device, dtype)
    given = oracle.vectors(5, op_device)
    y = batch_norm(x, *given, 0.3)
    assert same_bits(y, batch_norm(x.float(), *given, 0.3).to(dtype))
    assert [moment.dtype for moment in batch_norm_moments(x)] == [torch.float32] * 2
    narrow, wide = x.detach().requires_grad_(), x.float().requires_grad_()
    grad = oracle.values((3, 5, 4, 6), seed=3).to(op_device, dtype)
    batch_norm(narrow, *given, 0.3).backward(grad)
    batch_norm(wide, *given, 0.3).backward(grad.float())
    assert same_bits(narrow.grad, wide.grad.to(dtype))


def test_inputs_and_outputs_share_nothing(op_device: torch.device) -> None:
    x, given = torch.randn(2, 3, device=op_device), oracle.vectors(3, op_device)
    before = [tensor.clone() for tensor in (x, *given)]
    batch_norm(x, *given, 0.0).add_(5)
    for moment in batch_norm_moments(x):
        moment.add_(5)
    assert all(torch.equal(*pair) for pair in zip((x, *given), before, strict=True))


def test_no_gradient_reaches_the_source() -> None:
    weight, bias, mean, var = (vector.requires_grad_() for vector in oracle.vectors(3))
    batch_norm(torch.randn(2, 3), weight, bias, mean, var, 0.5).sum().backward()
    assert weight.grad is not None
    assert mean.grad is None
    assert var.grad is None


def _given(**changes: Any) -> dict[str, Any]:
    weight, bias, mean, var = oracle.vectors(4)
    given = {"x": torch.zeros(2, 4, 3, 3), "weight": weight, "bias": bias, "source_mean": mean, "source_var": var}
    return {**given, "alpha": 0.5, **changes}


ERRORS: list[tuple[dict[str, Any], str]] = [
    (_given(x=[1.0]), "x is a list, expected a torch.Tensor"),
    (_given(x=torch.zeros(2, 4).double()), "x has dtype float64, expected float32 or bfloat16 or float16"),
    (_given(x=torch.zeros(4)), "x has shape (4,), expected [N, C] or [N, C, ...]; unsqueeze it"),
    (_given(weight=torch.ones(3)), "weight has shape (3,), expected (4,) = (x.shape[1],)"),
    (_given(bias=torch.ones(1, 4)), "bias has shape (1, 4), expected (4,) = (x.shape[1],)"),
    (_given(weight=torch.ones(4).half()), "weight has dtype float16, expected float32; convert it with weight.to("),
    (_given(source_mean=torch.ones(4, device="meta")), "source_mean is on meta, expected cpu like x; move it with"),
    (_given(source_var=0.5), "source_var is a float, expected a torch.Tensor"),
    (_given(source_mean=None), "source_mean is None, expected source_mean and source_var together, or neither"),
    (_given(source_var=None), "source_var is None, expected source_mean and source_var together, or neither"),
    (
        _given(source_mean=None, source_var=None),
        "alpha is 0.5, expected 1 without source_mean and source_var; give both of them",
    ),
    (_given(alpha=1.5), "alpha is 1.5, expected 0 (source statistics) to 1 (those of the batch)"),
    (_given(alpha=-0.1), "alpha is -0.1, expected 0 (source statistics) to 1 (those of the batch)"),
    (_given(alpha=float("nan")), "alpha is nan, expected 0 (source statistics) to 1 (those of the batch)"),
    (_given(eps=0.0), "eps is 0.0, expected a positive number such as 1e-5"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[message[:40] for _, message in ERRORS])
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError) as caught:
        batch_norm(**arguments)
    assert str(caught.value).startswith(f"batch_norm: {message}")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3), "x has shape (3,), expected [N, C] or [N, C, ...]"),
        (torch.zeros(3, 2, dtype=torch.int32), "x has dtype int32, expected float32 or bfloat16 or float16"),
    ],
)
def test_errors_of_the_moments(x: Tensor, message: str) -> None:
    with pytest.raises(KernelError) as caught:
        batch_norm_moments(x)
    assert str(caught.value).startswith(f"batch_norm_moments: {message}")


@pytest.mark.parametrize("layout", layouts_of(4))
def test_opcheck(layout: str, op_device: torch.device) -> None:
    ops = torch.ops.ttaq_kernels
    x = LAYOUTS[layout](oracle.values((2, 3, 4, 5))).to(op_device)
    weight, bias, mean, var = oracle.vectors(3, op_device)
    tracked = x.detach().requires_grad_(), weight.detach().requires_grad_(), bias.detach().requires_grad_()
    mask = torch.tensor([True, False], device=op_device)
    torch.library.opcheck(ops.batch_norm.default, (*tracked, mean, var, mask, 0.3, 1e-5, True))
    torch.library.opcheck(ops.batch_norm.default, (tracked[0], *[None] * 5, 1.0, 1e-5, False))
    torch.library.opcheck(ops.batch_norm_moments.default, (tracked[0], None))
    torch.library.opcheck(ops.batch_norm_moments.default, (tracked[0], mask))
    statistics = ops.batch_norm(x, weight, bias, mean, var, mask, 0.3, 1e-5, True)[1]
    for need in ((True, True), (True, False), (False, True)):
        arguments = (torch.ones_like(x), x, weight, statistics, mask, 0.3, *need)
        torch.library.opcheck(ops.batch_norm_backward.default, arguments)


def _layer(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    y = batch_norm(x * 2, weight, bias, mean, var, 0.3).relu()
    return y + batch_norm_moments(y)[1].sum()


def _value_and_gradients(function: Any, x: Tensor, given: oracle.Vectors) -> tuple[Tensor, ...]:
    inputs = [tensor.detach().requires_grad_() for tensor in (x, *given[:2])]
    out = function(*inputs, *given[2:])
    return out.detach(), *torch.autograd.grad(out.square().sum(), inputs)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool, op_device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    given = oracle.vectors(3, op_device)
    for batch in (2, 3) if dynamic else (2,):
        for layout in layouts_of(4):
            x = LAYOUTS[layout](oracle.values((batch, 3, 4, 5)).to(op_device))
            eager, ours = (_value_and_gradients(f, x, given) for f in (_layer, compiled))
            torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
# The first import of the code generator touches parts of torch that are deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compiles_to_code(op_device: torch.device) -> None:
    torch._dynamo.reset()
    x = oracle.values((2, 3, 4, 5)).to(op_device, memory_format=torch.channels_last)
    given = oracle.vectors(3, op_device)
    with torch.no_grad():
        out = torch.compile(_layer, fullgraph=True)(x, *given)
    torch.testing.assert_close(out, _layer(x, *given))
    assert out.stride() == x.stride()
