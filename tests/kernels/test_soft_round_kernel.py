"""The kernels of soft rounding against the reference: interpreted, and on a GPU."""

import math

import pytest
import soft_round_oracle as oracle
import torch
from kernel_layouts import LAYOUTS, layouts_of, same_bits
from kernel_tolerances import SOFT_ROUND, SOFT_ROUND_PENALTY, SOFT_ROUND_SLOPE, SOFT_ROUND_STEP
from torch import Tensor

from ttaq_kernels import SoftRounding, soft_round_step
from ttaq_kernels.reference import soft_round as reference

# The package exports a function of the same name.
kernels = __import__("ttaq_kernels.soft_round", fromlist=["soft_round"])

SHAPES: list[tuple[int, ...]] = [(1,), (5,), (0, 3), (3, 0), (1, 70), (7, 33), (2, 2100), (4, 3, 3, 3), (70, 1, 3, 3)]
CASES = [
    pytest.param(shape, layout, id=f"{'x'.join(map(str, shape))}-{layout}")
    for shape in SHAPES
    for layout in layouts_of(len(shape))
]


def make(shape: tuple[int, ...], layout: str, device: torch.device) -> list[Tensor]:
    """v, codes, scale, bottom, and a gradient."""
    draw = torch.Generator().manual_seed(0)
    v = 3 * torch.randn(shape, generator=draw)
    special = torch.tensor([0.0, -0.0, 30.0, -30.0, 1e-30, math.log(11), -math.log(11), 200.0, -200.0])
    v.view(-1)[: len(special)] = special[: v.numel()]
    codes = torch.randint(0, 255, shape, generator=draw, dtype=torch.uint8)
    scale = 0.1 + torch.rand(shape[0], generator=draw)
    bottom = torch.randint(-255, 1, shape[:1], generator=draw).float()
    grad = torch.randn(shape, generator=draw)
    return [LAYOUTS[layout](v).to(device), codes.to(device), scale.to(device), bottom.to(device), grad.to(device)]


@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_soft_round(shape: tuple[int, ...], layout: str, kernel_device: torch.device) -> None:
    v, codes, scale, bottom, grad = make(shape, layout, kernel_device)
    on_cpu = [tensor.cpu() for tensor in (v, codes, scale, bottom)]
    step = oracle.along(scale.cpu(), v)
    hard = kernels._launch_forward(v, codes, scale, bottom, True)
    assert same_bits(hard, reference.soft_round(*on_cpu, True))
    soft = kernels._launch_forward(v, codes, scale, bottom, False)
    expected = reference.soft_round(*on_cpu, False)
    assert ((soft.cpu() - expected).abs() <= (SOFT_ROUND + 1.2e-7 * 255) * step).all()
    assert soft.stride() == hard.stride() == torch.empty_like(v).stride()
    dv = kernels._launch_backward(grad, v, scale)
    expected = reference.soft_round_backward(grad.cpu(), v.cpu(), scale.cpu())
    # Where 1.2 sigmoid(v) - 0.1 is 0 or 1 but for a rounding error, either side of the clamp may come out.
    certain = ((v.cpu().abs() - math.log(11)).abs() > 1e-5).double()
    assert ((dv.cpu() - expected).abs() * certain <= SOFT_ROUND_SLOPE * grad.cpu().abs() * step).all()
    assert dv.stride() == torch.empty_like(v).stride()


@pytest.mark.parametrize("beta", [2.0, 20.0])
@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_penalty(shape: tuple[int, ...], layout: str, beta: float, kernel_device: torch.device) -> None:
    v, *_ = make(shape, layout, kernel_device)
    given, grad = torch.tensor(beta, device=kernel_device), torch.tensor(0.3, device=kernel_device)
    value = kernels._launch_penalty(v, given)
    expected = reference.penalty(v.cpu(), given.cpu())
    assert value.shape == ()
    assert value.item() == pytest.approx(expected.item(), rel=SOFT_ROUND_PENALTY)
    dv = kernels._launch_penalty_backward(grad, v, given)
    expected = reference.penalty_backward(grad.cpu(), v.cpu(), given.cpu())
    certain = (v.cpu().abs() - math.log(11)).abs() > 1e-5
    assert ((dv.cpu() - expected).abs() * certain <= SOFT_ROUND_SLOPE * beta).all()
    assert same_bits(kernels._launch_penalty(v, given), value)


@pytest.mark.parametrize("shapes", [[(1, 1)], [(5, 7, 3, 3), (2, 1030), (3, 0), (7,), (6, 2, 3, 3)]], ids=len)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_step(layout: str, shapes: list[tuple[int, ...]], kernel_device: torch.device) -> None:
    knobs = torch.tensor([1e-2, 7.0, 0.03, 0.0])
    weights: list[list[SoftRounding]] = [[], []]
    for shape in shapes:
        w, scale, zero_point = oracle.weight(shape, 0, 15)
        w = LAYOUTS[layout](w) if layout in layouts_of(len(shape)) else w
        state = SoftRounding.of(w, scale, zero_point, 0, 15)
        weights[0].append(SoftRounding(*(tensor.to(kernel_device) for tensor in state)))
        weights[1].append(SoftRounding(*(tensor.clone() for tensor in state)))
    draw = torch.Generator().manual_seed(0)
    for step in (1, 2, 1000):
        knobs[3] = step
        grads = [torch.randn(shape, generator=draw) for shape in shapes]
        for function, states, device in (
            (soft_round_step._launch_step, weights[0], kernel_device),
            (reference.step_, weights[1], "cpu"),
        ):
            lists = list(zip(*states, strict=True))
            given = [grad.to(device) for grad in grads]
            function(*lists[:4], given, *lists[4:], knobs.to(device), 0.9, 0.999, 1e-8)
        for ours, expected in zip(*weights, strict=True):
            for name, tolerance in (("v", SOFT_ROUND_STEP * 1e-2), ("exp_avg", 1e-6), ("exp_avg_sq", 1e-6)):
                got, want = getattr(ours, name).cpu(), getattr(expected, name)
                assert ((got - want).abs() <= tolerance * step).all()
                getattr(ours, name).copy_(want)
            along = oracle.along(expected.scale, expected.v)
            error = SOFT_ROUND + SOFT_ROUND_STEP * 1e-2 * step + 1.2e-7 * 15
            assert ((ours.w_hat.cpu() - expected.w_hat).abs() <= error * along).all()


@pytest.mark.gpu
def test_capture_in_a_cuda_graph() -> None:
    """A replay takes the knobs that the tensor holds by then."""
    w, scale, zero_point = (tensor.cuda() for tensor in oracle.weight((64, 64, 3, 3), 0, 15))
    knobs, grad = torch.tensor([1e-2, 7.0, 0.03, 1.0]).cuda(), torch.randn_like(w)
    states = [SoftRounding.of(w, scale, zero_point, 0, 15) for _ in range(2)]

    def step(state: SoftRounding) -> None:
        lists = [[tensor] for tensor in state]
        soft_round_step._launch_step(*lists[:4], [grad], *lists[4:], knobs, 0.9, 0.999, 1e-8)

    warm = SoftRounding(*(tensor.clone() for tensor in states[0]))
    step(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(states[0])
    for number in range(1, 4):
        knobs.copy_(torch.tensor([1e-2 / number, 8.0 - number, 0.03, number]))
        graph.replay()
        step(states[1])
        assert all(same_bits(*pair) for pair in zip(states[0][:4], states[1][:4], strict=True))
