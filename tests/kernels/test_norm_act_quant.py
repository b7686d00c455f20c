"""norm_act_quant and norm_act_codes as users call them: values, codes, gradients, errors, torch.compile."""

from typing import Any

import batch_norm_oracle as oracle
import pytest
import torch
from kernel_layouts import LAYOUTS, layouts_of, same_bits
from torch import Tensor
from torch.nn import functional

from ttaq_kernels import KernelError, batch_norm, fake_quantize, norm_act_codes, norm_act_quant
from ttaq_kernels.pack import to_kernel_order

ACTIVATIONS = {"identity": lambda z: z, "relu": torch.relu, "relu6": functional.relu6}
A4, A8 = (0, 15), (0, 255)
MASK = torch.tensor([True, False, True, True])


def grid(codes: tuple[int, int], device: torch.device | str = "cpu") -> dict[str, Any]:
    scale = torch.tensor([4 / (codes[1] - codes[0])], device=device)
    zero_point = torch.tensor([codes[0] + 3], dtype=torch.int32, device=device)
    return {"scale": scale, "zero_point": zero_point, "qmin": codes[0], "qmax": codes[1]}


def one_after_the_other(
    x: Tensor,
    given: oracle.Vectors,
    alpha: float,
    residual: Tensor | None,
    act: str,
    after: dict[str, Any],
    **options: Any,
) -> Tensor:
    z = batch_norm(x, *given, alpha, **options)
    a = ACTIVATIONS[act](z if residual is None else z + residual)
    return fake_quantize(a, **after) if after else a


def leaves(shape: tuple[int, ...], layout: str, device: torch.device) -> tuple[Tensor, oracle.Vectors, Tensor]:
    """x, the vectors and the residual, all but the source with a gradient."""
    weight, bias, mean, var = (vector.clone() for vector in oracle.vectors(shape[1], device))
    x, residual = (LAYOUTS[layout](oracle.values(shape, seed).to(device)).detach() for seed in (0, 5))
    return x.requires_grad_(), (weight.requires_grad_(), bias.requires_grad_(), mean, var), residual.requires_grad_()


def test_worked_by_hand(op_device: torch.device) -> None:
    """1 and 3 normalise to -1 and 1; plus 0 and 0.4, relu, and on the grid 0, 0.5, 1 that gives 0 and 1 (code 2)."""
    x = torch.tensor([[1.0], [3.0], [1.0], [3.0]], device=op_device)
    residual = torch.tensor([[0.0], [0.4], [1.3], [-0.6]], device=op_device, requires_grad=True)
    scale, zero_point = torch.tensor([0.5], device=op_device), torch.tensor([0], dtype=torch.int32, device=op_device)
    given = (x, None, None, None, None)
    y = norm_act_quant(*given, eps=1e-9, residual=residual, act="relu", scale=scale, zero_point=zero_point, qmax=2)
    # z is -1, 1.4, 0.3 and 0.4: the first is cut off by relu, the second by the grid, and 0.3 is code 1.
    assert y.flatten().tolist() == [0.0, 1.0, 0.5, 0.5]
    assert torch.autograd.grad(y.sum(), residual)[0].flatten().tolist() == [0, 0, 1, 1]
    codes, _ = norm_act_codes(*given, scale, zero_point, 0, 2, eps=1e-9, residual=residual, act="relu")
    assert codes.flatten().tolist() == [0, 2, 1, 1]
    # One channel: its code is in the low half of the first of 32 bytes.
    packed, _ = norm_act_codes(*given, scale, zero_point, 0, 2, eps=1e-9, residual=residual, act="relu", packed=True)
    assert packed.shape == (4, 32)
    assert packed[:, 0].tolist() == [0, 2, 1, 1]
    assert not packed[:, 1:].any()


@pytest.mark.parametrize("layout", layouts_of(4))
@pytest.mark.parametrize("codes", [None, A4, A8, (-8, 7)])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_equal_to_one_after_the_other(
    act: str, codes: tuple[int, int] | None, layout: str, op_device: torch.device
) -> None:
    after = {} if codes is None else grid(codes, op_device)
    for alpha, options in (
        (0.3, {}),
        (1.0, {"sample_mask": MASK.to(op_device)}),
        (1.0, {"statistics_gradient": False}),
    ):
        x, given, residual = leaves((4, 5, 3, 2), layout, op_device)
        grad = oracle.values(x.shape, seed=3).to(op_device)
        for other in (None, residual):
            y = norm_act_quant(x, *given, alpha, residual=other, act=act, **after, **options)
            expected = one_after_the_other(x, given, alpha, other, act, after, **options)
            assert same_bits(y, expected)
            assert y.stride() == torch.empty_like(x).stride()
            inputs = [x, *given[:2]] if other is None else [x, *given[:2], other]
            pair = (torch.autograd.grad(result, inputs, grad) for result in (y, expected))
            torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 3), (4, 3, 6), (4, 3, 2, 3, 2)])
def test_other_numbers_of_dimensions(shape: tuple[int, ...], op_device: torch.device) -> None:
    x, given, residual = leaves(shape, "contiguous", op_device)
    after = grid(A4, op_device)
    y = norm_act_quant(x, *given, 0.3, residual=residual, act="relu", **after)
    assert same_bits(y, one_after_the_other(x, given, 0.3, residual, "relu", after))
    packed, _ = norm_act_codes(x, *given, **after, alpha=0.3, residual=residual, act="relu", packed=True)
    assert packed.shape == (x.numel() // 3, 32)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradients_equal_float64(act: str, constant: bool, masked: bool, op_device: torch.device) -> None:
    """Against the definition with the rounding detached, differentiated by autograd in float64."""
    x, given, residual = leaves((4, 5, 3, 2), "contiguous", op_device)
    after, alpha = grid(A4, op_device), 0.3
    grad = oracle.values(x.shape, seed=3)
    options = {"sample_mask": MASK.to(op_device) if masked else None, "statistics_gradient": not constant}
    y = norm_act_quant(x, *given, alpha, residual=residual, act=act, **after, **options)
    ours = (y, *torch.autograd.grad(y, (x, *given[:2], residual), grad.to(op_device)))

    wide = [tensor.detach().cpu().double() for tensor in (x, *given, residual)]
    inputs = [wide[index].requires_grad_() for index in (0, 1, 2, 5)]
    mask = MASK if masked else None
    z = oracle.formula(wide[0], tuple(wide[1:5]), alpha, mask=mask, constant=constant) + wide[5]
    v = ACTIVATIONS[act](z) / after["scale"].cpu().double() + 3
    clipped = v.round().clamp(*A4)
    v = torch.where((v.round() >= A4[0]) & (v.round() <= A4[1]), v, 0)
    y64 = (v + (clipped - v).detach() - 3) * after["scale"].cpu().double()
    expected = (y64, *torch.autograd.grad(y64, inputs, grad.double()))
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got.detach().cpu().double(), want.detach(), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("layout", layouts_of(4))
@pytest.mark.parametrize("codes", [A4, A8, (-8, 7), (-128, 127), (0, 127)])
def test_codes(codes: tuple[int, int], layout: str, op_device: torch.device) -> None:
    """(code - zero_point) * scale are the values, bit for bit, and so are the gradients."""
    x, given, residual = leaves((4, 5, 3, 2), layout, op_device)
    after = grid(codes, op_device)
    options = {"residual": residual, "act": "relu"}
    y = norm_act_quant(x, *given, 0.3, **after, **options)
    stored, carrier = norm_act_codes(x, *given, **after, alpha=0.3, **options)
    assert stored.dtype == torch.int8
    assert stored.stride() == y.stride()
    code = stored.int() + (128 if codes[1] == 255 else 0)
    assert same_bits((code - after["zero_point"]) * after["scale"], y)
    assert (carrier.shape, carrier.dtype) == (x.shape, x.dtype)
    assert carrier.untyped_storage().nbytes() <= 16
    assert not carrier.any()
    grad, inputs = oracle.values(x.shape, seed=3).to(op_device), (x, *given[:2], residual)
    for got, want in zip(torch.autograd.grad(carrier, inputs, grad), torch.autograd.grad(y, inputs, grad), strict=True):
        assert same_bits(got, want)


@pytest.mark.parametrize("channels", [1, 32, 33, 64, 70])
def test_packed_codes(channels: int, op_device: torch.device) -> None:
    """The order of `ttaq_kernels.pack`, whatever the memory layout of x."""
    for layout in layouts_of(4):
        x, given, residual = leaves((4, channels, 3, 2), layout, op_device)
        arguments = {**grid((0, 11), op_device), "alpha": 0.3, "residual": residual, "act": "relu6"}
        codes, _ = norm_act_codes(x, *given, **arguments)
        packed, carrier = norm_act_codes(x, *given, **arguments, packed=True)
        rows = codes.permute(0, 2, 3, 1).reshape(-1, channels)
        assert torch.equal(packed.cpu(), to_kernel_order(rows.cpu(), 4))
        assert carrier.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_rounded_once(dtype: torch.dtype, op_device: torch.device) -> None:
    x, given, residual = leaves((3, 5, 4, 6), "channels_last", op_device)
    narrow, other = x.detach().to(dtype).requires_grad_(), residual.detach().to(dtype).requires_grad_()
    wide, other_wide = (tensor.detach().float().requires_grad_() for tensor in (narrow, other))
    after, grad = grid(A4, op_device), oracle.values(x.shape, seed=3).to(op_device, dtype)
    y = norm_act_quant(narrow, *given, 0.3, residual=other, act="relu", **after)
    exact = norm_act_quant(wide, *given, 0.3, residual=other_wide, act="relu", **after)
    assert same_bits(y, exact.to(dtype))
    assert y.stride() == x.stride()
    ours = torch.autograd.grad(y, (narrow, other), grad)
    for got, want in zip(ours, torch.autograd.grad(exact, (wide, other_wide), grad.float()), strict=True):
        assert same_bits(got, want.to(dtype))


def test_reference_walks_over_large_batches_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x, given, residual = leaves((7, 3, 4, 5), "contiguous", torch.device("cpu"))
    after, grad = grid(A4), oracle.values((7, 3, 4, 5), seed=3)
    results = []
    for piece in (1 << 18, 130):
        monkeypatch.setattr("ttaq_kernels.reference.moments._PIECE", piece)
        y = norm_act_quant(x, *given, 0.0, residual=residual, act="relu", **after)
        results.append((y.detach(), *torch.autograd.grad(y, (x, *given[:2], residual), grad)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2, 2), (2, 3, 0, 2), (2, 0, 2, 2)])
def test_nothing_gives_nothing(shape: tuple[int, ...], op_device: torch.device) -> None:
    x, given, residual = leaves(shape, "contiguous", op_device)
    after = {**grid(A4, op_device), "residual": residual, "act": "relu"}
    inputs = (x, *given[:2], residual)
    for alpha in (0.0, 0.3, 1.0):
        y = norm_act_quant(x, *given, alpha, **after)
        codes, carrier = norm_act_codes(x, *given, **after, alpha=alpha)
        packed, _ = norm_act_codes(x, *given, **after, alpha=alpha, packed=True)
        assert y.shape == codes.shape == carrier.shape == shape
        assert packed.numel() == 0
        for result in (y, carrier):
            gradients = torch.autograd.grad(result, inputs, torch.ones_like(x))
            assert [g.shape for g in gradients] == [tensor.shape for tensor in inputs]
            assert not any(g.any() for g in gradients)


def test_inputs_and_outputs_share_nothing(op_device: torch.device) -> None:
    x, given, residual = leaves((4, 5, 3, 2), "contiguous", op_device)
    before = [tensor.detach().clone() for tensor in (x, *given, residual)]
    y = norm_act_quant(x, *given, 0.3, residual=residual)
    grad = torch.ones_like(y)
    dresidual = torch.autograd.grad(y, residual, grad)[0]
    with torch.no_grad():
        y.add_(1)
        dresidual.add_(1)
    assert all(torch.equal(*pair) for pair in zip(before, (x, *given, residual), strict=True))
    assert torch.equal(grad, torch.ones_like(grad))


def _given(**changes: Any) -> dict[str, Any]:
    weight, bias, mean, var = torch.ones(4, 4)
    names = {"weight": weight, "bias": bias, "source_mean": mean, "source_var": var}
    return {"x": torch.zeros(2, 4, 3, 3), **names, **grid(A4), "alpha": 0.5, **changes}


ERRORS: list[tuple[dict[str, Any], str]] = [
    (_given(x=torch.zeros(4)), "x has shape (4,), expected [N, C] or [N, C, ...]; unsqueeze it"),
    (_given(weight=torch.ones(3)), "weight has shape (3,), expected (4,) = (x.shape[1],)"),
    (_given(sample_mask=torch.ones(3)), "sample_mask has shape (3,), expected (2,) = (x.shape[0],)"),
    (_given(alpha=2.0), "alpha is 2.0, expected 0 (source statistics) to 1 (those of the batch)"),
    (_given(residual=torch.zeros(2, 4, 3)), "residual has shape (2, 4, 3), expected (2, 4, 3, 3) like x"),
    (_given(residual=torch.zeros(2, 4, 3, 3).half()), "residual has dtype float16, expected float32; convert it"),
    (_given(act="gelu"), "act is 'gelu', expected one of identity, relu, relu6"),
    (_given(scale=torch.ones(4)), "scale has shape (4,), expected () or (1,) for one scale per tensor"),
    (_given(zero_point=torch.zeros((), dtype=torch.int32)), "zero_point has shape (), expected (1,) like scale"),
    (_given(zero_point=torch.zeros(1)), "zero_point has dtype float32, expected int32"),
    (
        _given(scale=torch.ones(1, requires_grad=True)),
        "scale requires a gradient, expected a constant; pass scale.detach(), or learn it with fake_quantize after",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[message[:40] for _, message in ERRORS])
def test_errors(arguments: dict[str, Any], message: str) -> None:
    for function in (norm_act_quant, norm_act_codes):
        with pytest.raises(KernelError) as caught:
            function(**arguments)
        assert str(caught.value).startswith(f"{function.__name__}: {message}")


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (norm_act_quant, _given(scale=None), "scale is None, expected scale and zero_point together, or neither"),
        (norm_act_quant, _given(zero_point=None), "zero_point is None, expected scale and zero_point together"),
        (norm_act_quant, _given(qmin=3, qmax=3), "codes go from qmin=3 to qmax=3, expected -65536 <= qmin < qmax"),
        (norm_act_codes, _given(scale=None), "scale is a NoneType, expected a torch.Tensor"),
        (norm_act_codes, _given(qmax=256), "codes go from qmin=0 to qmax=256, expected 0 <= qmin < qmax <= 255"),
        (norm_act_codes, _given(qmin=-1, qmax=254), "codes go from qmin=-1 to qmax=254, expected 0 <= qmin"),
        (norm_act_codes, _given(qmin=-129), "codes go from qmin=-129 to qmax=15, expected -128 <= qmin < qmax <= 127"),
        (
            norm_act_codes,
            _given(qmin=-8, qmax=7, packed=True),
            "codes go from qmin=-8 to qmax=7, expected 0 <= qmin < qmax <= 15 to store them in 4 bits",
        ),
    ],
)
def test_errors_of_the_grid(function: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError) as caught:
        function(**arguments)
    assert str(caught.value).startswith(f"{function.__name__}: {message}")


@pytest.mark.parametrize("layout", layouts_of(4))
def test_opcheck(layout: str, op_device: torch.device) -> None:
    ops = torch.ops.ttaq_kernels
    x, given, residual = leaves((2, 3, 4, 5), layout, op_device)
    scale, zero_point, *codes = grid(A4, op_device).values()
    mask = torch.tensor([True, False], device=op_device)
    for output in ("values", "codes", "packed"):
        after = (mask, residual, scale, zero_point, *codes, "relu", output, 0.3, 1e-5, True)
        torch.library.opcheck(ops.norm_act_quant.default, (x, *given, *after))
    plain = (*[None] * 5, None, None, None, 0, 255, "identity", "values", 1.0, 1e-5, True)
    torch.library.opcheck(ops.norm_act_quant.default, (x, *plain))
    with torch.no_grad():
        statistics = ops.norm_act_quant(
            x, *given, mask, residual, scale, zero_point, *codes, "relu", "values", 0.3, 1e-5, True
        )[0]
    tensors = [tensor.detach() for tensor in (torch.ones_like(x), x, *given[:2])]
    after = (mask, residual.detach(), scale, zero_point, *codes, "relu", 0.3)
    for needs in ((True, True, True), (True, False, False)):
        torch.library.opcheck(ops.norm_act_quant_backward.default, (*tensors, statistics, *after, *needs))


def _layer(x: Tensor, given: oracle.Vectors, residual: Tensor, after: dict[str, Any]) -> Tensor:
    codes, carrier = norm_act_codes(x * 2, *given, **after, alpha=0.3, residual=residual, act="relu")
    y = (codes - after["zero_point"]) * after["scale"] + carrier
    return norm_act_quant(y, *given, 0.5, residual=x, act="relu6")


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool, op_device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3) if dynamic else (2,):
        x, given, residual = leaves((batch, 3, 4, 5), "channels_last", op_device)
        results = []
        for function in (_layer, compiled):
            y = function(x, given, residual, grid(A4, op_device))
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, *given[:2], residual))))
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
