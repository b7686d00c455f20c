"""Soft rounding as users call it: values, gradients, optimiser step, errors, torch.compile; on the CPU and a GPU."""

from typing import Any

import pytest
import soft_round_oracle as oracle
import torch
from kernel_layouts import LAYOUTS, layouts_of, same_bits
from kernel_tolerances import SOFT_ROUND, SOFT_ROUND_PENALTY, SOFT_ROUND_SLOPE, SOFT_ROUND_STEP
from torch import Tensor

from ttaq_kernels import KernelError, SoftRounding, fake_quantize, rounding_penalty, soft_round, soft_round_step_

SHAPE = (6, 5, 3, 3)


def make(
    grid: str, device: torch.device | str = "cpu", layout: str = "contiguous"
) -> tuple[SoftRounding, tuple[Any, ...]]:
    """The state of a weight; the weight and its grid in float32 on the CPU."""
    qmin, qmax = oracle.GRIDS[grid]
    w, scale, zero_point = oracle.weight(SHAPE, qmin, qmax)
    state = SoftRounding.of(LAYOUTS[layout](w.to(device)), scale.to(device), zero_point.to(device), qmin, qmax)
    return state, (w, scale, zero_point, qmin, qmax)


def test_worked_by_hand(op_device: torch.device) -> None:
    """Scale 0.5, zero point 1, codes 0 to 3: the grid is -0.5, 0, 0.5, 1."""
    w = torch.tensor([[0.1, 0.4, -0.35, 0.75, 1.0, 9.0, -0.6, -9.0]], device=op_device)
    grid = torch.tensor([0.5], device=op_device), torch.tensor([1], dtype=torch.int32, device=op_device)
    state = SoftRounding.of(w, *grid, 0, 3)
    assert state.codes.tolist() == [[1, 1, 0, 2, 2, 2, 0, 0]]
    assert state.bottom.tolist() == [-1]
    expected = torch.tensor([[0.1, 0.4, -0.35, 0.75, 1.0, 1.0, -0.5, -0.5]])
    torch.testing.assert_close(state.w_hat.cpu(), expected, rtol=0, atol=1e-6)
    assert state.rounded().tolist() == [[0.0, 0.5, -0.5, 1.0, 1.0, 1.0, -0.5, -0.5]]
    v = torch.tensor([[0.0, 1.0, 3.0, -3.0]], device=op_device, requires_grad=True)
    codes = torch.ones(1, 4, dtype=torch.uint8, device=op_device)
    w_hat = soft_round(v, codes, torch.tensor([0.5], device=op_device), torch.tensor([-1.0], device=op_device))
    # sigmoid(1) = 0.7310586, times 1.2 minus 0.1 is 0.7772703; sigmoid(+-3) leaves the clamp.
    torch.testing.assert_close(w_hat.detach().cpu(), torch.tensor([[0.25, 0.38863515, 0.5, 0.0]]))
    w_hat.sum().backward()
    # 0.5 * 1.2 * sigmoid (1 - sigmoid)
    torch.testing.assert_close(v.grad.cpu(), torch.tensor([[0.15, 0.11796716, 0.0, 0.0]]))
    penalty = rounding_penalty(v.detach(), torch.tensor(2.0, device=op_device))
    assert penalty.item() == pytest.approx(1.0 + 1 - 0.5545406**2, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", oracle.GRIDS)
def test_starts_at_the_weight(grid: str, dtype: torch.dtype, op_device: torch.device) -> None:
    """Inside the grid w_hat is w, outside the end of the grid; rounded, it is fake_quantize."""
    qmin, qmax = oracle.GRIDS[grid]
    w, scale, zero_point = oracle.weight(SHAPE, qmin, qmax)
    w = w.to(dtype)
    state = SoftRounding.of(*(tensor.to(op_device) for tensor in (w, scale, zero_point)), qmin, qmax)
    ends = [(along - oracle.along(zero_point, w)) * oracle.along(scale, w) for along in (qmin, qmax)]
    expected = torch.minimum(torch.maximum(w.double(), ends[0]), ends[1])
    # The first sum is of numbers up to qmax, so that h carries its rounding error.
    tolerance = (SOFT_ROUND + 1.2e-7 * (qmax - qmin)) * oracle.along(scale, w)
    assert ((state.w_hat.cpu() - expected).abs() <= tolerance).all()
    assert same_bits(state.rounded(), fake_quantize(w.float(), scale, zero_point, qmin, qmax, axis=0))
    assert state.exp_avg.count_nonzero() == state.exp_avg_sq.count_nonzero() == 0


@pytest.mark.parametrize("layout", layouts_of(4))
@pytest.mark.parametrize("grid", oracle.GRIDS)
def test_values_and_gradients_equal_the_formula_with_its_clamp(grid: str, layout: str, op_device: torch.device) -> None:
    """The clamp of the formula is nowhere in the kernels: frozen variables at the ends of the grid stand for it."""
    state, (w, *rest) = make(grid, op_device, layout)
    draw = torch.Generator().manual_seed(3)
    change = 3 * torch.randn(SHAPE, generator=draw)
    free = state.v.cpu().abs() < 29
    assert 0.05 < free.float().mean() < 1
    v = (
        LAYOUTS[layout](torch.where(free, state.v.cpu() + change, state.v.cpu()).to(op_device))
        .detach()
        .requires_grad_()
    )
    w_hat = soft_round(v, state.codes, state.scale, state.bottom)
    assert w_hat.stride() == torch.empty_like(v).stride()
    # For the clamped weights the formula may have any v.
    v64 = torch.where(free, v.detach().cpu().double(), oracle.start(w, rest[0]) + change).requires_grad_()
    expected = oracle.soft_round(v64, w, *rest)
    step = oracle.along(rest[0], w)
    levels = rest[3] - rest[2]
    assert ((w_hat.detach().cpu() - expected).abs() <= (SOFT_ROUND + 6e-8 * levels) * step).all()
    grad = torch.randn(SHAPE, generator=draw)
    w_hat.backward(grad.to(op_device))
    expected.backward(grad.double())
    assert ((v.grad.cpu() - v64.grad).abs() <= SOFT_ROUND_SLOPE * grad.abs() * step).all()
    hard = soft_round(v, state.codes, state.scale, state.bottom, hard=True).detach().cpu()
    nearest = oracle.soft_round(torch.where(v64 >= 0, 50.0, -50.0), w, *rest)
    torch.testing.assert_close(hard.double(), nearest, rtol=1e-6, atol=0)


@pytest.mark.parametrize("beta", [2.0, 3.7, 20.0])
@pytest.mark.parametrize("layout", layouts_of(4))
def test_penalty(layout: str, beta: float, op_device: torch.device) -> None:
    v = LAYOUTS[layout]((2 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))).to(op_device))
    v.flatten()[:3] = torch.tensor([0.0, 30.0, -30.0])
    v = LAYOUTS[layout](v).detach().requires_grad_()
    given = torch.tensor(beta, device=op_device)
    penalty = rounding_penalty(v, given)
    penalty.backward(torch.tensor(0.3, device=op_device))
    v64 = v.detach().cpu().double().requires_grad_()
    expected = oracle.penalty(v64, beta)
    expected.backward(torch.tensor(0.3, dtype=torch.float64))
    assert penalty.item() == pytest.approx(expected.item(), rel=SOFT_ROUND_PENALTY)
    assert ((v.grad.cpu() - v64.grad).abs() <= SOFT_ROUND_SLOPE * beta).all()
    assert v.grad.stride() == torch.empty_like(v).stride()


def test_penalty_of_what_is_decided(op_device: torch.device) -> None:
    v = torch.tensor([30.0, -30.0, 3.0, -3.0, 0.0], device=op_device, requires_grad=True)
    penalty = rounding_penalty(v, torch.tensor(20.0, device=op_device))
    penalty.backward()
    assert penalty.item() == 1
    assert v.grad.tolist() == [0] * 5


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_steps_equal_adam_on_the_formula(layout: str, op_device: torch.device) -> None:
    """Ten steps of two weights, lambda switched on in the middle, beta falling: as torch.optim.Adam in float64."""
    states, givens = zip(*(make(grid, op_device, layout) for grid in ("W4", "W2")), strict=True)
    frees = [state.v.cpu().abs() < 29 for state in states]
    v64 = [state.v.cpu().double().requires_grad_() for state in states]
    adam = torch.optim.Adam(v64, lr=1e-2)
    knobs = torch.zeros(4, device=op_device)
    draw = torch.Generator().manual_seed(0)
    before = [state.v.clone() for state in states]
    for step in range(1, 11):
        beta, weight = 20.0 - step, 0.01 if step > 5 else 0.0
        grads = [torch.randn(SHAPE, generator=draw) for _ in states]
        knobs.copy_(torch.tensor([1e-2, beta, weight, step]))
        soft_round_step_(states, [LAYOUTS["permuted"](grad).to(op_device) for grad in grads], knobs)
        adam.zero_grad()
        loss = sum(
            (grad * oracle.soft_round(v, *given)).sum() + weight * oracle.penalty(v[free], beta)
            for grad, v, given, free in zip(grads, v64, givens, frees, strict=True)
        )
        loss.backward()
        adam.step()
        for state, v, free in zip(states, v64, frees, strict=True):
            assert ((state.v.cpu() - v.detach()).abs() <= SOFT_ROUND_STEP * 1e-2 * step)[free].all()
            current = soft_round(state.v, state.codes, state.scale, state.bottom)
            assert same_bits(state.w_hat, current)
    for state, v, free in zip(states, before, frees, strict=True):
        assert same_bits(state.v.cpu()[~free], v.cpu()[~free])
        assert not torch.equal(state.v, v)


def test_step_after_a_backward_through_w_hat(op_device: torch.device) -> None:
    """The way of the training loop: w_hat is a leaf, the step changes it in place."""
    state, _ = make("W4", op_device)
    w_hat = state.w_hat.requires_grad_()
    before = w_hat.detach().clone()
    (w_hat * torch.ones_like(before)).sum().backward()
    soft_round_step_([state], [w_hat.grad], torch.tensor([1e-2, 20.0, 0.0, 1.0], device=op_device))
    assert w_hat.is_leaf
    assert (w_hat < before).any()
    assert (w_hat <= before).all()


def test_no_weights() -> None:
    soft_round_step_([], [], torch.zeros(4))


def _soft(**changes: Any) -> dict[str, Any]:
    given = {"v": torch.zeros(4, 2), "codes": torch.zeros(4, 2, dtype=torch.uint8)}
    return {**given, "scale": torch.ones(4), "bottom": torch.zeros(4), **changes}


def _initial(**changes: Any) -> dict[str, Any]:
    grid = {"scale": torch.ones(4), "zero_point": torch.zeros(4, dtype=torch.int32), "qmin": 0, "qmax": 15}
    return {"w": torch.zeros(4, 2), **grid, **changes}


def _stepping(state: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    weight = make("W4")[0]._replace(**(state or {}))
    return {"weights": [weight], "grads": [torch.zeros(SHAPE)], "knobs": torch.ones(4), **changes}


ERRORS: list[tuple[Any, dict[str, Any], str]] = [
    (soft_round, _soft(v=torch.zeros(4, 2).bfloat16()), "soft_round: v has dtype bfloat16, expected float32"),
    (soft_round, _soft(v=torch.zeros(())), "soft_round: v has shape (), expected a dimension of output channels"),
    (soft_round, _soft(codes=torch.zeros(4, 2)), "soft_round: codes has dtype float32, expected uint8"),
    (
        soft_round,
        _soft(codes=torch.zeros(2, 4, dtype=torch.uint8)),
        "soft_round: codes has shape (2, 4), expected (4, 2)",
    ),
    (soft_round, _soft(scale=torch.ones(2)), "soft_round: scale has shape (2,), expected (4,) = v.shape[axis=0]"),
    (soft_round, _soft(bottom=torch.ones(1)), "soft_round: bottom has shape (1,), expected (4,) = v.shape[axis=0]"),
    (
        rounding_penalty,
        {"v": torch.zeros(4), "beta": 2.0},
        "rounding_penalty: beta is a float, expected a torch.Tensor",
    ),
    (
        rounding_penalty,
        {"v": torch.zeros(4), "beta": torch.ones(1)},
        "rounding_penalty: beta has shape (1,), expected ()",
    ),
    (SoftRounding.of, _initial(w=torch.zeros(())), "SoftRounding.of: w has shape (), expected a dimension of output"),
    (SoftRounding.of, _initial(w=[1]), "SoftRounding.of: w is a list, expected a torch.Tensor"),
    (SoftRounding.of, _initial(scale=torch.ones(())), "SoftRounding.of: scale has shape (), expected (4,)"),
    (
        SoftRounding.of,
        _initial(zero_point=torch.zeros(4)),
        "SoftRounding.of: zero_point has dtype float32, expected int32",
    ),
    (SoftRounding.of, _initial(qmax=256), "SoftRounding.of: codes go from qmin=0 to qmax=256, expected 2 to 256 codes"),
    (SoftRounding.of, _initial(qmax=0), "SoftRounding.of: codes go from qmin=0 to qmax=0, expected 2 to 256 codes"),
    (
        soft_round_step_,
        _stepping(knobs=torch.ones(3)),
        "soft_round_step_: knobs has shape (3,), expected (4,): lr, beta",
    ),
    (soft_round_step_, _stepping(grads=[]), "soft_round_step_: got 0 gradients for 1 weights, expected one for each"),
    (
        soft_round_step_,
        _stepping(grads=[torch.zeros(3)]),
        "soft_round_step_: got a gradient (3,) on cpu and knobs on cpu",
    ),
    (soft_round_step_, _stepping(grads=[None]), "soft_round_step_: grad is a NoneType, expected a torch.Tensor"),
    (
        soft_round_step_,
        _stepping(betas=(0.9, 1.0)),
        "soft_round_step_: betas is (0.9, 1.0), expected two numbers between",
    ),
    (
        soft_round_step_,
        _stepping({"exp_avg": torch.zeros(2)}),
        "soft_round_step_: exp_avg has shape (2,), expected (6, 5, 3, 3) like v",
    ),
    (
        soft_round_step_,
        _stepping({"w_hat": torch.zeros(SHAPE).to(memory_format=torch.channels_last)}),
        "soft_round_step_: v has strides (45, 9, 3, 1), expected dense channels, and the same strides in codes, w_hat",
    ),
]


@pytest.mark.parametrize(("function", "arguments", "message"), ERRORS, ids=[message[:60] for _, _, message in ERRORS])
def test_errors(function: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError) as caught:
        function(**arguments)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("layout", layouts_of(4))
def test_opcheck(layout: str, op_device: torch.device) -> None:
    ops = torch.ops.ttaq_kernels
    state, _ = make("W4", op_device, layout)
    v = LAYOUTS[layout](state.v).detach().requires_grad_()
    beta, grad = torch.tensor(3.0, device=op_device), torch.randn_like(v)
    torch.library.opcheck(ops.soft_round.default, (v, state.codes, state.scale, state.bottom, False))
    torch.library.opcheck(ops.soft_round_backward.default, (grad, v.detach(), state.scale))
    torch.library.opcheck(ops.rounding_penalty.default, (v, beta))
    torch.library.opcheck(ops.rounding_penalty_backward.default, (beta, v.detach(), beta))


def test_opcheck_of_the_step(op_device: torch.device) -> None:
    states = [make(grid, op_device)[0] for grid in ("W4", "W2")]
    knobs = torch.tensor([1e-2, 20.0, 0.01, 1.0], device=op_device)
    lists = [list(tensors) for tensors in zip(*states, strict=True)]
    grads = [torch.randn_like(state.v) for state in states]
    arguments = (*lists[:4], grads, *lists[4:], knobs, 0.9, 0.999, 1e-8)
    torch.library.opcheck(torch.ops.ttaq_kernels.soft_round_step_.default, arguments)


def _training_step(x: Tensor, states: list[SoftRounding], knobs: Tensor) -> Tensor:
    weights = [soft_round(state.v, state.codes, state.scale, state.bottom) for state in states]
    loss = sum((x * weight).pow(2).sum() for weight in weights)
    soft_round_step_(states, [2 * x * x * weight for weight in weights], knobs)
    return loss + rounding_penalty(states[0].v, knobs[1])


def test_compiles_into_one_graph(op_device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_training_step, fullgraph=True, backend="aot_eager")
    x, knobs = torch.randn(SHAPE, device=op_device), torch.tensor([1e-2, 20.0, 0.01, 1.0], device=op_device)
    results = []
    for function in (_training_step, compiled):
        states = [make(grid, op_device)[0] for grid in ("W4", "W2")]
        results.append([function(x, states, knobs), *(tensor for state in states for tensor in state)])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
