"""The kernels of softmax_entropy against the reference: interpreted, and on a GPU."""

import losses_oracle as oracle
import pytest
import torch
from kernel_layouts import LAYOUTS, same_bits
from kernel_tolerances import SOFTMAX_ENTROPY, SOFTMAX_ENTROPY_GRADIENT
from torch import Tensor

from ttaq_kernels import losses
from ttaq_kernels.reference import losses as reference

INF, NAN = float("inf"), float("nan")
SHAPES = [(0, 5), (1, 1), (3, 1), (1, 2), (5, 10), (130, 10), (7, 63), (3, 1000), (2, 1024), (2, 1025), (3, 5000)]
LAYOUT_NAMES = ["contiguous", "permuted", "sliced"]


def assert_matches(logits: Tensor, out_dtype: torch.dtype | None = None) -> None:
    """Value, saved parts and gradient; NaN where the reference has NaN."""
    ours = losses._launch_value(logits)
    expected = reference.softmax_entropy_forward(logits.cpu())
    torch.testing.assert_close(ours[0].cpu(), expected[0], rtol=0, atol=SOFTMAX_ENTROPY, equal_nan=True)
    defined = expected[0].isfinite()
    torch.testing.assert_close(ours[1].cpu()[defined], expected[1][defined], rtol=0, atol=0)
    torch.testing.assert_close(ours[2].cpu()[defined], expected[2][defined], rtol=0, atol=SOFTMAX_ENTROPY)
    grad = torch.randn(len(logits), generator=torch.Generator().manual_seed(1))
    out = losses._launch_gradient(grad.to(logits.device), logits, *ours, out_dtype)
    assert out.stride() == torch.empty_like(logits).stride()
    # From the same saved parts, so that only the arithmetic of the gradient is compared.
    parts = [part.cpu() for part in ours]
    wide = reference.softmax_entropy_backward(grad, logits.cpu().float(), *parts)
    log_p = (logits.cpu().float() - parts[1].unsqueeze(1)) - parts[2].unsqueeze(1)
    magnitude = log_p.exp() * (1 - log_p.masked_fill(log_p == -INF, 0.0) + parts[0].unsqueeze(1))
    bound = SOFTMAX_ENTROPY_GRADIENT * grad.abs().unsqueeze(1) * magnitude + torch.finfo(out.dtype).smallest_normal
    if out.dtype is not torch.float32:
        bound = bound + torch.finfo(out.dtype).eps * wide.abs()
    assert torch.equal(out.cpu().isnan(), wide.isnan())
    finite = wide.isfinite()
    assert ((out.cpu().float() - wide).abs() <= bound)[finite].all()


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}x{0[1]}".format)
def test_shapes_and_layouts(shape: tuple[int, int], layout: str, kernel_device: torch.device) -> None:
    assert_matches(LAYOUTS[layout](oracle.logits(*shape).to(kernel_device)))


def test_many_classes(kernel_device: torch.device) -> None:
    """The maximum grows, stays and falls from block to block."""
    logits = oracle.logits(3, 22_003)
    logits[0] += torch.linspace(-50, 50, 22_003)
    logits[1] += torch.linspace(50, -50, 22_003)
    assert_matches(logits.to(kernel_device))


@pytest.mark.parametrize("classes", [10, 2100])
def test_large_logits(classes: int, kernel_device: torch.device) -> None:
    assert_matches((1e4 * oracle.logits(6, classes, spread=1.0)).to(kernel_device))
    assert_matches((1e4 + oracle.logits(6, classes)).to(kernel_device))


@pytest.mark.parametrize("classes", [10, 2100])
def test_what_is_not_finite(classes: int, kernel_device: torch.device) -> None:
    logits = oracle.logits(8, classes)
    logits[0, 3] = NAN
    logits[1, -1] = NAN
    logits[2, 4] = INF
    logits[3, 4] = -INF
    logits[4] = -INF
    logits[5, : classes - 1] = -INF
    logits[6, 1:] = -INF
    assert_matches(logits.to(kernel_device))
    entropy = losses._launch_value(logits.to(kernel_device))[0].cpu()
    assert entropy.isnan().tolist() == [True, True, True, False, True, False, False, False]
    assert entropy[5:7].tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype: torch.dtype, kernel_device: torch.device) -> None:
    # The interpreter cuts off instead of rounding when it stores bfloat16, so there only the load is tested.
    interpreted = kernel_device.type == "cpu" and dtype is torch.bfloat16
    assert_matches(oracle.logits(9, 120).to(kernel_device, dtype), torch.float32 if interpreted else None)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 1000), (200, 100), (512, 22_000)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shapes_of_networks(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert_matches(oracle.logits(*shape).cuda().to(dtype))


@pytest.mark.gpu
def test_capture_in_a_cuda_graph() -> None:
    logits = oracle.logits(64, 1000).cuda()
    grad = torch.ones(64, device="cuda")

    def step() -> list[Tensor]:
        parts = losses._launch_value(logits)
        return [*parts, losses._launch_gradient(grad, logits, *parts)]

    expected = [tensor.clone() for tensor in step()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(same_bits(*pair) for pair in zip(captured, expected, strict=True))
