"""Batch norm with selected samples, with constant statistics and with running statistics, as users call it."""

from typing import Any

import batch_norm_oracle as oracle
import pytest
import torch
from kernel_layouts import LAYOUTS, layouts_of, same_bits
from torch import Tensor

from ttaq_kernels import KernelError, batch_norm, batch_norm_ema, batch_norm_moments

MASK = torch.tensor([True, False, True, True])


def test_worked_by_hand(op_device: torch.device) -> None:
    """Of 1, 9 and 3 the first and the last are selected: mean 2, variance 1. Here eps is 1e-9."""
    x = torch.tensor([[1.0], [9.0], [3.0]], device=op_device, requires_grad=True)
    mask = torch.tensor([1.0, 0.0, 1.0], device=op_device)
    mean, var = batch_norm_moments(x, mask)
    assert (mean.tolist(), var.tolist()) == ([2], [1])
    y = batch_norm(x, None, None, None, None, 1.0, 1e-9, sample_mask=mask)
    torch.testing.assert_close(y.flatten().tolist(), [-1.0, 7.0, 1.0])
    (dx,) = torch.autograd.grad(y[1], x)
    # d/dx of (9 - mean) / std: 1 for the sample itself, -1/2 and -7 (x - 2) / 2 through mean and variance.
    torch.testing.assert_close(dx.flatten().tolist(), [-0.5 + 3.5, 1.0, -0.5 - 3.5])


@pytest.mark.parametrize("layout", layouts_of(4))
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("mask", [None, MASK])
def test_values_and_gradients_equal_float64(
    mask: Tensor | None, alpha: float, constant: bool, layout: str, op_device: torch.device
) -> None:
    """Against the definition, differentiated by autograd in float64."""
    given = oracle.vectors(5)
    x = LAYOUTS[layout](oracle.values((4, 5, 3, 2)).to(op_device)).detach().requires_grad_()
    grad = oracle.values((4, 5, 3, 2), seed=3)
    weight, bias, mean, var = (vector.to(op_device) for vector in given)
    here = None if mask is None else mask.to(op_device)
    y = batch_norm(
        x, weight.requires_grad_(), bias.requires_grad_(), mean, var, alpha,
        sample_mask=here, statistics_gradient=not constant,
    )  # fmt: skip
    ours = (y, *torch.autograd.grad(y, (x, weight, bias), grad.to(op_device)))

    wide = oracle.double(given)
    inputs = (x.detach().cpu().double().requires_grad_(), wide[0].requires_grad_(), wide[1].requires_grad_())
    y64 = oracle.formula(inputs[0], wide, alpha, mask=mask, constant=constant)
    expected = (y64, *torch.autograd.grad(y64, inputs, grad.double()))
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got.detach().cpu().double(), want.detach(), rtol=1e-5, atol=2e-6)


def test_gradient_of_the_moments(op_device: torch.device) -> None:
    x = oracle.values((4, 5, 3, 2))
    given = x.to(op_device).requires_grad_()
    mean, var = batch_norm_moments(given, MASK.to(op_device))
    (mean.square().sum() + var.sqrt().sum()).backward()
    wide = x.detach().double().requires_grad_()
    (wide[MASK].mean([0, 2, 3]).square().sum() + wide[MASK].var([0, 2, 3], correction=0).sqrt().sum()).backward()
    torch.testing.assert_close(given.grad.cpu().double(), wide.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float16])
def test_types_of_masks(dtype: torch.dtype, op_device: torch.device) -> None:
    x = oracle.values((4, 5, 3, 2)).to(op_device)
    expected = batch_norm_moments(x[MASK])
    for got, want in zip(batch_norm_moments(x, MASK.to(op_device, dtype)), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_samples_not_selected_are_not_read(op_device: torch.device) -> None:
    x = oracle.values((4, 5, 3, 2)).to(op_device)
    expected = batch_norm_moments(x, MASK.to(op_device))
    x[1] = torch.inf
    x[1, 0, 0, 0] = torch.nan
    for got, want in zip(batch_norm_moments(x, MASK.to(op_device)), expected, strict=True):
        assert same_bits(got, want)


def test_far_from_zero(op_device: torch.device) -> None:
    """Mean 1000, standard deviation 1, beside samples of mean -1000."""
    x = torch.randn(16, 4, 16, 16, generator=torch.Generator().manual_seed(0)) + 1000
    mask = torch.arange(16) % 3 > 0
    x[~mask] -= 2000
    mean, var = (moment.cpu().double() for moment in batch_norm_moments(x.to(op_device), mask.to(op_device)))
    torch.testing.assert_close(var, x[mask].double().var([0, 2, 3], correction=0), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean, x[mask].double().mean([0, 2, 3]), rtol=1e-6, atol=0)


def test_no_sample_selected(op_device: torch.device) -> None:
    """The statistics of the source, or mean 0 and variance 1; no gradient through them."""
    x = oracle.values((4, 5, 3, 2)).to(op_device).requires_grad_()
    weight, bias, mean, var = oracle.vectors(5, op_device)
    nobody = torch.zeros(4, dtype=torch.bool, device=op_device)
    grad = oracle.values(x.shape, seed=3).to(op_device)
    assert [moment.tolist() for moment in batch_norm_moments(x, nobody)] == [[0.0] * 5] * 2
    cases = [((mean, var), 0.3), ((mean, var), 1.0), ((None, None), 1.0)]
    for (source_mean, source_var), alpha in cases:
        y = batch_norm(x, weight, bias, source_mean, source_var, alpha, sample_mask=nobody)
        source = (torch.zeros_like(mean), torch.ones_like(var)) if source_mean is None else (mean, var)
        expected = batch_norm(x, weight, bias, *source, 0.0)
        assert same_bits(y, expected)
        assert same_bits(*(torch.autograd.grad(result, x, grad)[0] for result in (y, expected)))


def test_running_statistics(op_device: torch.device) -> None:
    """y, mean and var of three batches against the recurrence in float64."""
    weight, bias, mean, var = oracle.vectors(5, op_device)
    wide_mean, wide_var = mean.cpu().double(), var.cpu().double()
    for seed in range(3):
        x = oracle.values((4, 5, 3, 2), seed)
        before = mean.clone(), var.clone()
        y, new_mean, new_var = batch_norm_ema(
            x.to(op_device), weight, bias, mean, var, 0.1, sample_mask=MASK.to(op_device)
        )
        assert torch.equal(before[0], mean)
        assert torch.equal(before[1], var)
        assert same_bits(y, batch_norm(x.to(op_device), weight, bias, mean, var, 0.1, sample_mask=MASK.to(op_device)))
        mean.copy_(new_mean)
        var.copy_(new_var)
        chosen = x[MASK].double()
        wide_mean = 0.9 * wide_mean + 0.1 * chosen.mean([0, 2, 3])
        wide_var = 0.9 * wide_var + 0.1 * chosen.var([0, 2, 3], correction=0)
        torch.testing.assert_close(mean.cpu().double(), wide_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(var.cpu().double(), wide_var, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("samples", [0, 4])
def test_running_statistics_of_nothing_stay(samples: int, op_device: torch.device) -> None:
    weight, bias, mean, var = oracle.vectors(5, op_device)
    x = oracle.values((samples, 5, 3, 2)).to(op_device)
    nobody = torch.zeros(samples, dtype=torch.bool, device=op_device)
    y, new_mean, new_var = batch_norm_ema(x, weight, bias, mean, var, 0.1, sample_mask=nobody)
    assert same_bits(new_mean, mean)
    assert same_bits(new_var, var)
    assert y.shape == x.shape


def test_running_statistics_have_no_gradient(op_device: torch.device) -> None:
    x = oracle.values((4, 5, 3, 2)).to(op_device).requires_grad_()
    y, mean, var = batch_norm_ema(x, *oracle.vectors(5, op_device), 0.1)
    assert y.requires_grad
    assert not mean.requires_grad
    assert not var.requires_grad


def _step(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, mask: Tensor) -> Tensor:
    y, new_mean, new_var = batch_norm_ema(x * 2, weight, bias, mean, var, 0.1, sample_mask=mask)
    mean.copy_(new_mean)
    var.copy_(new_var)
    return y + batch_norm_moments(y, mask)[1].sum()


def test_compiles_into_one_graph(op_device: torch.device) -> None:
    """In place, with a mask of floats that only the device knows."""
    torch._dynamo.reset()
    compiled = torch.compile(_step, fullgraph=True, backend="aot_eager")
    x, mask = oracle.values((4, 5, 3, 2)).to(op_device), MASK.to(op_device, torch.float32)
    results = []
    for function in (_step, compiled):
        leaf = x.clone().requires_grad_()
        weight, bias, mean, var = (vector.clone() for vector in oracle.vectors(5, op_device))
        y = function(leaf, weight, bias, mean, var, mask)
        results.append((y.detach(), mean, var, torch.autograd.grad(y.square().sum(), leaf)[0]))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


ERRORS: list[tuple[Any, str]] = [
    (torch.ones(3, dtype=torch.bool), "sample_mask has shape (3,), expected (4,) = (x.shape[0],)"),
    (torch.ones(4, dtype=torch.int64), "sample_mask has dtype int64, expected bool; convert it with sample_mask.to("),
    ([True] * 4, "sample_mask is a list, expected a torch.Tensor"),
    (torch.ones(4, device="meta"), "sample_mask is on meta, expected cpu like x; move it with"),
]


@pytest.mark.parametrize(("mask", "message"), ERRORS, ids=[message[:40] for _, message in ERRORS])
def test_errors(mask: Any, message: str) -> None:
    x, vectors = torch.zeros(4, 3), [torch.ones(3)] * 4
    calls = {
        "batch_norm": lambda: batch_norm(x, *vectors, sample_mask=mask),
        "batch_norm_ema": lambda: batch_norm_ema(x, *vectors, sample_mask=mask),
        "batch_norm_moments": lambda: batch_norm_moments(x, mask),
    }
    for who, call in calls.items():
        with pytest.raises(KernelError) as caught:
            call()
        assert str(caught.value).startswith(f"{who}: {message}")


def test_errors_name_the_running_statistics() -> None:
    with pytest.raises(KernelError, match=r"batch_norm_ema: running_var has shape \(2,\), expected \(3,\)"):
        batch_norm_ema(torch.zeros(4, 3), None, None, torch.ones(3), torch.ones(2))
