"""The kernel of the losses of one softmax against the reference: interpreted, and on a GPU."""

import losses_oracle as oracle
import pytest
import torch
from kernel_layouts import LAYOUTS, same_bits
from kernel_tolerances import (
    LOSS_GRADIENT,
    SOFT_LIKELIHOOD_RATIO,
    SOFT_LIKELIHOOD_RATIO_SLOPE,
    SOFTMAX_ENTROPY,
)
from torch import Tensor

from ttaq_kernels import losses
from ttaq_kernels.reference import losses as reference

INF, NAN = float("inf"), float("nan")
SHAPES = [(0, 5), (1, 1), (3, 1), (1, 2), (5, 10), (130, 10), (7, 63), (3, 1000), (2, 4096), (2, 4097), (3, 5000)]
LAYOUT_NAMES = ["contiguous", "permuted", "sliced"]
KINDS = ["entropy", "likelihood_ratio"]


def assert_matches(
    logits: Tensor,
    kind: str,
    out_dtype: torch.dtype | None = None,
    weights: Tensor | None = None,
    offset: Tensor | None = None,
) -> None:
    """Loss and gradient; NaN where the reference has NaN. Without the gradient the loss has the same bits."""
    loss, gradient = losses._launch_loss(logits, weights, offset, kind, True, out_dtype)
    alone, nothing = losses._launch_loss(logits, weights, offset, kind, False)
    assert same_bits(alone, loss)
    assert nothing.numel() == 0
    assert gradient.stride() == torch.empty_like(logits).stride()
    options = [None if t is None else t.cpu() for t in (weights, offset)]
    expected, wide = reference.softmax_loss(logits.cpu().float(), *options, kind, True)
    atol = SOFTMAX_ENTROPY if kind == "entropy" else SOFT_LIKELIHOOD_RATIO
    torch.testing.assert_close(loss.cpu(), expected, rtol=0, atol=atol, equal_nan=True)
    # How far f'(p) may be: it is ln p for one loss, about 1 / (1 - p) with the error of p for the other.
    p = reference.add_offset(logits.cpu(), options[1]).softmax(1)
    error = LOSS_GRADIENT * (1 - p.clamp_min(1e-30).log())
    if kind == "likelihood_ratio":
        error += SOFT_LIKELIHOOD_RATIO_SLOPE / (1 - p.clamp_max(0.99)).square()
    bound = reference.weighted(p * (error + (p * error).sum(1, keepdim=True)), options[0])
    info = torch.finfo(gradient.dtype)
    bound = bound + info.smallest_normal
    if gradient.dtype is not torch.float32:
        bound = bound + info.eps * wide.abs()
    assert torch.equal(gradient.cpu().isnan(), wide.isnan())
    finite = wide.isfinite()
    assert ((gradient.cpu().float() - wide).abs() <= bound)[finite].all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}x{0[1]}".format)
def test_shapes_and_layouts(shape: tuple[int, int], layout: str, kind: str, kernel_device: torch.device) -> None:
    assert_matches(LAYOUTS[layout](oracle.logits(*shape).to(kernel_device)), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (5, 10), (3, 5000)], ids="{0[0]}x{0[1]}".format)
def test_weights_and_offset(shape: tuple[int, int], kind: str, kernel_device: torch.device) -> None:
    logits = oracle.logits(*shape).to(kernel_device)
    weights, offset = (t.to(kernel_device) for t in oracle.weights_and_offset(*shape))
    assert_matches(logits, kind, weights=weights)
    assert_matches(logits, kind, weights=weights > 0.5)
    assert_matches(logits, kind, offset=offset)
    spread = torch.stack([weights, -weights], 1)[:, 0], torch.stack([offset, -offset], 1)[:, 0]
    assert_matches(logits, kind, weights=spread[0], offset=spread[1])


@pytest.mark.parametrize("kind", KINDS)
def test_many_classes(kind: str, kernel_device: torch.device) -> None:
    """The maximum grows, stays and falls from block to block."""
    logits = oracle.logits(3, 22_003)
    logits[0] += torch.linspace(-50, 50, 22_003)
    logits[1] += torch.linspace(50, -50, 22_003)
    assert_matches(logits.to(kernel_device), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [10, 4200])
def test_large_logits(classes: int, kind: str, kernel_device: torch.device) -> None:
    assert_matches((1e4 * oracle.logits(6, classes, spread=1.0)).to(kernel_device), kind)
    assert_matches((1e4 + oracle.logits(6, classes)).to(kernel_device), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [10, 4200])
def test_what_is_not_finite(classes: int, kind: str, kernel_device: torch.device) -> None:
    logits = oracle.logits(8, classes)
    logits[0, 3] = NAN
    logits[1, -1] = NAN
    logits[2, 4] = INF
    logits[3, 4] = -INF
    logits[4] = -INF
    logits[5, : classes - 1] = -INF
    logits[6, 1:] = -INF
    assert_matches(logits.to(kernel_device), kind)
    loss = losses._launch_loss(logits.to(kernel_device), None, None, kind, False)[0].cpu()
    assert loss.isnan().tolist() == [True, True, True, False, True, False, False, False]
    if kind == "entropy":
        assert loss[5:7].tolist() == [0, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype: torch.dtype, kind: str, kernel_device: torch.device) -> None:
    # The interpreter cuts off instead of rounding when it stores bfloat16, so there only the load is tested.
    interpreted = kernel_device.type == "cpu" and dtype is torch.bfloat16
    assert_matches(oracle.logits(9, 120).to(kernel_device, dtype), kind, torch.float32 if interpreted else None)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 1000), (200, 100), (512, 22_000)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shapes_of_networks(shape: tuple[int, int], dtype: torch.dtype, kind: str) -> None:
    assert_matches(oracle.logits(*shape).cuda().to(dtype), kind)


@pytest.mark.gpu
def test_capture_in_a_cuda_graph() -> None:
    logits = oracle.logits(64, 1000).cuda()
    options = [t.cuda() for t in oracle.weights_and_offset(64, 1000)]

    def step() -> list[Tensor]:
        return [t for kind in KINDS for t in losses._launch_loss(logits, *options, kind, True)]

    expected = [tensor.clone() for tensor in step()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(same_bits(*pair) for pair in zip(captured, expected, strict=True))
