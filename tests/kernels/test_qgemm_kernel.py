"""The kernel of packed_linear against the reference: interpreted, and on a GPU."""

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given, settings
from kernel_layouts import LAYOUTS, same_bits
from kernel_tolerances import PACKED_LINEAR
from qgemm_cases import Product, make, products
from torch import Tensor

from ttaq_kernels import _gemm_tiles, qgemm
from ttaq_kernels.reference import qgemm as reference

# The device is the same for all examples of a test.
SAME_DEVICE = [hypothesis.HealthCheck.function_scoped_fixture]
OUT_GRID = (torch.tensor([0.7]), torch.tensor([3], dtype=torch.int32))


def moved(product: Product, device: torch.device) -> Product:
    product.x = product.x.to(device)
    return product


def on_cpu(arguments: tuple[object, ...]) -> list[object]:
    return [value.cpu() if isinstance(value, Tensor) else value for value in arguments]


def assert_exact(product: Product, **options: bool) -> None:
    """Kernel, reference and formula have the same bits, in float32 and re-quantized."""
    arguments = product.launcher_arguments(torch.float32)
    out = qgemm._launch_gemm(*arguments, **options)
    assert same_bits(out, reference.packed_linear(*on_cpu(arguments)))
    assert same_bits(out, product.expected())
    arguments = product.launcher_arguments(torch.int8, *OUT_GRID, 1, 15)
    out = qgemm._launch_gemm(*arguments, **options)
    assert out.dtype == torch.int8
    assert torch.equal(out.cpu(), reference.packed_linear(*on_cpu(arguments)))


@settings(max_examples=25, deadline=None, suppress_health_check=SAME_DEVICE)
@given(product=products())
def test_integer_codes(product: Product, kernel_device: torch.device) -> None:
    assert_exact(moved(product, kernel_device))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_every_number_of_bits_over_several_steps_and_tiles(
    bits: int, asymmetric: bool, kernel_device: torch.device
) -> None:
    assert_exact(moved(make(bits, asymmetric, 17, 65, 260, input_zero_point=-77), kernel_device))


@pytest.mark.parametrize("tile", _gemm_tiles._TILES, ids=lambda tile: f"{tile.rows}x{tile.outputs}")
def test_every_tile(tile: Any, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gemm_tiles, "_TILES", (tile,))
    assert_exact(moved(make(4, True, tile.rows + 1, tile.outputs + 1, 130, input_zero_point=5), kernel_device))


@settings(max_examples=10, deadline=None, suppress_health_check=SAME_DEVICE)
@given(product=products(torch.float16) | products(torch.float32))
def test_floating_activations(product: Product, kernel_device: torch.device) -> None:
    arguments = moved(product, kernel_device).launcher_arguments(torch.float32)
    out = qgemm._launch_gemm(*arguments).cpu()
    bound = PACKED_LINEAR * product.magnitude()
    for expected in (reference.packed_linear(*on_cpu(arguments)), product.expected()):
        assert ((out - expected).abs() <= bound).all()


@pytest.mark.parametrize("layout", ["permuted", "sliced", "rows"])
def test_layouts(layout: str, kernel_device: torch.device) -> None:
    """Rows with gaps are read where they are; other layouts are copied."""
    product = moved(make(4, True, 9, 20, 70, input_zero_point=1), kernel_device)
    expected = product.expected()
    if layout == "rows":
        product.x = torch.cat([product.x, product.x], 1)[:, :70]
    else:
        product.x = LAYOUTS[layout](product.x)
    assert same_bits(qgemm._launch_gemm(*product.launcher_arguments(torch.float32)), expected)


def test_largest_sums(kernel_device: torch.device) -> None:
    """Codes at the ends of their ranges: 1050 * 255 * 255 and 1050 * 128 * 8 * 16 are beyond 2^24."""
    for bits, asymmetric in ((8, True), (4, False), (2, False)):
        product = make(bits, asymmetric, 3, 5, 1050, input_zero_point=127)
        product.q[:3] = product.q.amin()
        product.q[3:] = product.q.amax()
        product.x[:2], product.x[2] = -128, 127
        if product.zero_point is not None:
            product.zero_point[:3], product.zero_point[3:] = (1 << bits) - 1, 0
        assert_exact(moved(product, kernel_device))


def test_nan_and_infinity_become_codes(kernel_device: torch.device) -> None:
    product = moved(make(4, False, 2, 4, 8), kernel_device)
    assert product.bias is not None
    product.bias[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    out = qgemm._launch_gemm(*product.launcher_arguments(torch.int8, *OUT_GRID, -100, 100))
    assert out[:, 1:3].tolist() == [[100, -100]] * 2
    if kernel_device.type == "cuda":  # older interpreters let NaN through maximum
        assert out[:, 0].tolist() == [-100] * 2


def test_the_choice_of_tiles() -> None:
    """A layer that fills the GPU gets the largest tile, few rows get small ones; all fit into shared memory."""
    x = torch.empty(0, 384, dtype=torch.int8)
    assert _gemm_tiles._tile(12608, 3072, 1, 132)[:2] == (128, 128)
    assert _gemm_tiles._tile(200704, 64, 1, 132)[:2] == (128, 64)
    assert _gemm_tiles._tile(1, 1000, 1, 132)[:2] == (16, 64)
    for rows in (1, 64, 200, 3136, 12608, 200704):
        for outputs in (10, 64, 768, 3072):
            for bits in (2, 4, 8):
                for dtype in (torch.int8, torch.bfloat16, torch.float32):
                    config = _gemm_tiles.gemm_config(rows, outputs, 384, bits, x.to(dtype))
                    step = config["BLOCK_B"]
                    per_stage = step * (config["BLOCK_N"] + config["BLOCK_M"] * dtype.itemsize * 8 // bits)
                    assert step % 32 == 0
                    assert 2 <= config["num_stages"] <= 4
                    assert config["num_stages"] * per_stage <= 99 << 10


@pytest.mark.gpu
@pytest.mark.parametrize("zero_point", [None, -128, 17])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_inline_assembly_equals_the_plain_form(bits: int, asymmetric: bool, zero_point: int | None) -> None:
    product = moved(make(bits, asymmetric, 300, 200, 400, input_zero_point=zero_point), torch.device("cuda"))
    assert_exact(product, asm=True)
    assert_exact(product, asm=False)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3152, 2304, 768), (3152, 768, 3072), (64, 1000, 768), (3136, 2048, 512)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_layers_of_networks(bits: int, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    product = moved(make(bits, True, *shape, input_zero_point=3, dtype=dtype), torch.device("cuda"))
    out = qgemm._launch_gemm(*product.launcher_arguments(torch.float32)).cpu()
    if dtype is torch.int8:
        assert same_bits(out, product.expected())
    else:
        assert ((out - product.expected()).abs() <= PACKED_LINEAR * product.magnitude()).all()


@pytest.mark.gpu
def test_short_output_types_are_rounded_once() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        product = moved(make(4, True, 100, 100, 100, input_zero_point=3), torch.device("cuda"))
        out = qgemm._launch_gemm(*product.launcher_arguments(dtype))
        assert same_bits(out, product.expected().to(dtype))


@pytest.mark.gpu
def test_capture_in_a_cuda_graph() -> None:
    product = moved(make(8, True, 100, 100, 100, input_zero_point=3), torch.device("cuda"))
    arguments = product.launcher_arguments(torch.float32)
    expected = qgemm._launch_gemm(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = qgemm._launch_gemm(*arguments)
    graph.replay()
    assert same_bits(captured, expected)
