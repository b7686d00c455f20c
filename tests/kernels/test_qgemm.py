"""packed_linear as users call it: exactness, gradients, edges, errors, torch.compile; on CPU and GPU."""

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given, settings
from kernel_layouts import LAYOUTS, same_bits
from kernel_tolerances import PACKED_LINEAR
from qgemm_cases import Product, make, products
from torch import Tensor

from ttaq_kernels import KernelError, pack_weight, packed_linear
from ttaq_kernels.pack import PackedWeight
from ttaq_kernels.qgemm import packed_linear_input_gradient

SAME_DEVICE = [hypothesis.HealthCheck.function_scoped_fixture]
ONE, ZERO = torch.ones(1), torch.zeros(1, dtype=torch.int32)


def on(device: torch.device, value: Any) -> Any:
    if isinstance(value, PackedWeight):
        return PackedWeight(*(on(device, part) for part in value))
    return value.to(device) if isinstance(value, Tensor) else value


def call(product: Product, device: torch.device, x: Tensor | None = None, **options: Any) -> Tensor:
    x = product.x if x is None else x
    arguments = [on(device, value) for value in (x, product.weight, product.bias)]
    named = {name: on(device, value) for name, value in {**product.arguments, **options}.items()}
    return packed_linear(*arguments, **named)


def test_worked_by_hand(op_device: torch.device) -> None:
    """Row 0: (3 - 1)(10 - 2) + (0 - 1)(-5 - 2) = 23; row 1: (2 - 2)(8) + (3 - 2)(-7) = -7."""
    weight = pack_weight(
        torch.tensor([[3, 0], [2, 3]]), 2, torch.tensor([0.5, 2.0]), torch.tensor([1, 2], dtype=torch.int32)
    )
    x = torch.tensor([[10, -5]], dtype=torch.int8)
    scale, zero_point, bias = torch.tensor([0.25]), torch.tensor([2], dtype=torch.int32), torch.tensor([1.0, 0.0])
    x, weight, scale, zero_point, bias = (on(op_device, v) for v in (x, weight, scale, zero_point, bias))
    inputs = {"input_scale": scale, "input_zero_point": zero_point}
    assert packed_linear(x, weight, bias, **inputs).tolist() == [[23 * 0.125 + 1, -7 * 0.5]]
    # rint(3.875 / 0.5) + 1 = 9, cut to 8; rint(-3.5 / 0.5) + 1 = -6.
    grid = {"out_scale": on(op_device, torch.tensor([0.5])), "out_zero_point": on(op_device, torch.ones_like(ZERO))}
    codes = packed_linear(x, weight, bias, **inputs, **grid, qmin=-8, qmax=8)
    assert codes.dtype == torch.int8
    assert codes.tolist() == [[8, -6]]
    # Without codes: 2 * 1.5 - 1 * -2 = 5 and 0 * 1.5 + 1 * -2 = -2, times 0.5 and 2.
    floating = packed_linear(on(op_device, torch.tensor([[1.5, -2.0]])), weight, bias)
    assert floating.tolist() == [[3.5, -4.0]]


@settings(max_examples=150, deadline=None, suppress_health_check=SAME_DEVICE)
@given(product=products())
def test_codes_are_exact(product: Product, op_device: torch.device) -> None:
    assert same_bits(call(product, op_device), product.expected())


@settings(max_examples=60, deadline=None, suppress_health_check=SAME_DEVICE)
@given(product=products(torch.float32) | products(torch.float16) | products(torch.bfloat16))
def test_floating_activations(product: Product, op_device: torch.device) -> None:
    out = call(product, op_device, dtype=torch.float32).cpu()
    assert ((out - product.expected()).abs() <= PACKED_LINEAR * product.magnitude()).all()
    assert call(product, op_device).dtype == product.x.dtype


@pytest.mark.parametrize("length", [1030, 4608])
def test_sums_beyond_float32_are_exact(length: int, op_device: torch.device) -> None:
    product = make(8, True, 3, 6, length, input_zero_point=-128)
    product.q.clamp_(200)
    product.zero_point.zero_()
    product.x.clamp_(100)
    assert product.integers().double().sum() * 228 > 2**24
    assert same_bits(call(product, op_device), product.expected())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_are_rounded_once(dtype: torch.dtype, op_device: torch.device) -> None:
    product = make(4, True, 9, 20, 70, input_zero_point=4)
    assert same_bits(call(product, op_device, dtype=dtype), product.expected().to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_and_layouts(layout: str, op_device: torch.device) -> None:
    """Leading dimensions of any number and layout; the last one may be that of a channels_last image."""
    product = make(4, True, 2 * 5 * 3, 7, 70)
    x = product.x.view(2, 5, 3, 70)
    x = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    x = LAYOUTS[layout](x.to(op_device))
    assert same_bits(call(product, op_device, x), product.expected().view(2, 5, 3, 7))
    assert call(product, op_device, x[0, 0, 0]).shape == (7,)
    assert call(product, op_device, x[:0]).shape == (0, 5, 3, 7)


def test_nothing_to_sum_leaves_the_bias(op_device: torch.device) -> None:
    product = make(4, True, 3, 5, 0)
    assert same_bits(call(product, op_device), product.bias.expand(3, 5))


def test_requantizing_equals_quantizing_the_output(op_device: torch.device) -> None:
    product = make(4, True, 20, 30, 50, input_zero_point=9)
    for scale, offset, qmin, qmax in ((0.9, 0, 0, 15), (1.3, -128, -128, 127), (0.004, 1, -2, 1)):
        grid = {"out_scale": torch.tensor(scale), "out_zero_point": torch.tensor(offset, dtype=torch.int32)}
        codes = call(product, op_device, **grid, qmin=qmin, qmax=qmax).cpu()
        y = product.expected()
        expected = torch.fake_quantize_per_tensor_affine(y, scale, 0, qmin - offset, qmax - offset) / scale
        assert torch.equal(codes.long(), expected.round().long() + offset)
        assert codes.unique().numel() > 1


def test_values_that_are_not_finite_become_codes(op_device: torch.device) -> None:
    product = make(4, False, 1, 3, 4)
    product.bias.copy_(torch.tensor([float("nan"), float("inf"), -float("inf")]))
    assert call(product, op_device, out_scale=ONE, out_zero_point=ZERO, qmin=-7, qmax=9).tolist() == [[-7, 9, -7]]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(dtype: torch.dtype, bits: int, op_device: torch.device) -> None:
    product = make(bits, True, 6, 9, 40, dtype=dtype)
    product.x = product.x.view(2, 3, 40).requires_grad_()
    product.bias.requires_grad_()
    grad = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(2))
    call(product, op_device).backward(grad.to(op_device, dtype))
    wide, bias = product.x.detach().double().requires_grad_(), product.bias.detach().double().requires_grad_()
    weight = product.integers().double() * product.scale.double().view(-1, 1)
    torch.nn.functional.linear(wide, weight, bias).backward(grad.to(dtype).double())
    # In bfloat16 grad * scale is rounded, and so is the result.
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    assert product.x.grad.dtype == dtype
    torch.testing.assert_close(product.x.grad.double(), wide.grad, rtol=tolerance, atol=tolerance * 9 * 2**bits)
    torch.testing.assert_close(product.bias.grad.double(), bias.grad, rtol=tolerance, atol=tolerance)
    direct = packed_linear_input_gradient(grad.to(op_device, dtype), on(op_device, product.weight))
    assert torch.equal(direct.cpu(), product.x.grad)


def test_codes_have_no_gradient(op_device: torch.device) -> None:
    product = make(4, True, 6, 9, 40)
    product.bias.requires_grad_()
    call(product, op_device).sum().backward()
    assert torch.equal(product.bias.grad, torch.full((9,), 6.0))
    assert not call(product, op_device, out_scale=ONE, out_zero_point=ZERO).requires_grad


def test_autocast_changes_nothing(op_device: torch.device) -> None:
    product = make(8, True, 6, 9, 400, input_zero_point=-5)
    with torch.autocast(op_device.type, torch.bfloat16):
        assert same_bits(call(product, op_device), product.expected())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_opcheck(dtype: torch.dtype, op_device: torch.device) -> None:
    product = make(4, True, 3, 5, 70, input_zero_point=2, dtype=dtype)
    product.x = product.x.to(op_device)
    if dtype is torch.float32:
        product.x.requires_grad_()
    op = torch.ops.ttaq_kernels.packed_linear.default
    torch.library.opcheck(op, product.launcher_arguments(torch.float32))
    grid = (torch.tensor([0.7]), ZERO, 0, 15)
    torch.library.opcheck(op, product.launcher_arguments(torch.int8, *grid))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool, op_device: torch.device) -> None:
    torch._dynamo.reset()
    product = make(4, True, 4, 5, 70, dtype=torch.float32)
    weight, bias = on(op_device, product.weight), on(op_device, product.bias)

    def step(x: Tensor) -> Tensor:
        return packed_linear(x * 2, weight, bias).square()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (4, 3) if dynamic else (4,):
        results = []
        for function in (step, compiled):
            x = product.x[:rows].to(op_device).requires_grad_()
            y = function(x)
            results.append((y.detach(), *torch.autograd.grad(y.sum(), x)))
        torch.testing.assert_close(*results, rtol=0, atol=0)


WEIGHT = pack_weight(torch.zeros(3, 8, dtype=torch.int8), 4, torch.ones(3))
CONV = pack_weight(torch.zeros(3, 9, 8, dtype=torch.int8), 4, torch.ones(3))
CODES, FLOATS = torch.zeros(2, 8, dtype=torch.int8), torch.zeros(2, 8)
Error = tuple[Callable[[], object], str]
ERRORS: list[Error] = [
    (lambda: packed_linear(FLOATS.double(), WEIGHT), "packed_linear: x has dtype float64, expected int8 or float32"),
    (lambda: packed_linear(FLOATS, FLOATS), "packed_linear: weight is a Tensor, expected what pack_weight returns"),
    (
        lambda: packed_linear(FLOATS[0, :0], WEIGHT),
        "packed_linear: x has shape (0,), expected [..., 8] for this",
    ),
    (lambda: packed_linear(FLOATS[0, 0], WEIGHT), "packed_linear: x has shape (), expected [..., 8]"),
    (
        lambda: packed_linear(FLOATS, CONV),
        "packed_linear: weight has codes of shape (3, 9, 32), expected those of",
    ),
    (
        lambda: packed_linear(FLOATS.to("meta"), WEIGHT),
        "packed_linear: weight is on cpu, expected meta like x; move one",
    ),
    (lambda: packed_linear(CODES, WEIGHT), "packed_linear: x of type int8 has no input_scale, expected one for int8"),
    (
        lambda: packed_linear(FLOATS, WEIGHT, input_scale=ONE),
        "packed_linear: x of type float32 has an input_scale, expected one for int8 codes only",
    ),
    (
        lambda: packed_linear(FLOATS, WEIGHT, input_zero_point=ZERO),
        "packed_linear: input_zero_point is given, expected none for floating x",
    ),
    (
        lambda: packed_linear(CODES, WEIGHT, input_scale=torch.ones(2)),
        "packed_linear: input_scale has shape (2,), expected () or (1,) for one per tensor",
    ),
    (
        lambda: packed_linear(CODES, WEIGHT, input_scale=ONE, input_zero_point=ONE),
        "packed_linear: input_zero_point has dtype float32, expected int32",
    ),
    (
        lambda: packed_linear(FLOATS, WEIGHT, torch.zeros(8)),
        "packed_linear: bias has shape (8,), expected (3,) for one per output",
    ),
    (
        lambda: packed_linear(FLOATS, WEIGHT, out_scale=ONE),
        "packed_linear: got one of out_scale and out_zero_point, expected both or none",
    ),
    (
        lambda: packed_linear(FLOATS, WEIGHT, out_scale=ONE, out_zero_point=ZERO, qmax=255),
        "packed_linear: codes go from qmin=-128 to qmax=255, expected -128 <= qmin < qmax <= 127",
    ),
    (
        lambda: packed_linear(FLOATS, WEIGHT, out_scale=ONE, out_zero_point=ZERO, dtype=torch.float32),
        "packed_linear: dtype is torch.float32, expected None: with out_scale the result is int8",
    ),
    (
        lambda: packed_linear(FLOATS, WEIGHT, dtype=torch.float64),
        "packed_linear: dtype is torch.float64, expected float32, bfloat16 or float16",
    ),
    (
        lambda: packed_linear_input_gradient(FLOATS, WEIGHT),
        "packed_linear_input_gradient: grad has shape (2, 8), expected [..., 3] for this weight",
    ),
    (
        lambda: packed_linear_input_gradient(CODES, WEIGHT),
        "packed_linear_input_gradient: grad has dtype int8, expected float32 or bfloat16 or float16",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_errors(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(KernelError) as caught:
        wrong()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("bits", "asymmetric", "limit"), [(8, True, 33_025), (8, False, 65_793), (4, True, 131_071), (2, False, 131_071)]
)
def test_more_inputs_than_int32_can_sum(bits: int, asymmetric: bool, limit: int) -> None:
    weight = make(bits, asymmetric, 0, 1, 1).weight
    for length, fits in ((limit, True), (limit + 1, False)):
        longer = weight._replace(
            codes=torch.zeros(1, -(-length // 128) * 128 * weight.bits // 8, dtype=torch.uint8), length=length
        )
        codes = torch.zeros(0, length, dtype=torch.int8)
        if fits:
            assert packed_linear(codes, longer, input_scale=ONE).shape == (0, 1)
        else:
            with pytest.raises(KernelError, match=f"has {length} inputs, expected at most {limit} = what int32"):
                packed_linear(codes, longer, input_scale=ONE)
