"""reconstruction_loss and gather_mix as users call them: values, gradients, errors, torch.compile; CPU and GPU."""

from typing import Any

import drop_oracle
import fake_quant_oracle as oracle
import pytest
import torch
from kernel_layouts import LAYOUTS, layouts_of, same_bits
from kernel_tolerances import RECONSTRUCTION, RECONSTRUCTION_GRADIENT
from torch import Tensor

from ttaq_kernels import KernelError, fake_quantize, gather_mix, reconstruction_loss

F32, BF16, F16, I32 = torch.float32, torch.bfloat16, torch.float16, torch.int32
SHAPE, SEED, QMAX = (3, 4, 5, 6), 12_345_678_901, 15


def make(shape: tuple[int, ...] = SHAPE) -> dict[str, Tensor]:
    """Values of h + residual away from ties and from 0, where float64 would decide otherwise."""
    draw = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.13])
    steps = torch.randint(-20, 20, shape, generator=draw) + 0.8 * (torch.rand(shape, generator=draw) - 0.5)
    residual = torch.randn(shape, generator=draw)
    target = torch.randn(shape, generator=draw)
    steps = torch.where(steps.abs() < 0.05, 0.3, steps)
    return {"h": steps * scale - residual, "target": target, "residual": residual, "scale": scale}


def expected_loss(given: dict[str, Tensor], zero_point: int, residual: bool, relu: bool, keep: float) -> Tensor:
    """The loss with the straight-through quantizer, in float64 for autograd."""
    h, target, scale = given["h"], given["target"], given["scale"]
    a = h + given["residual"] if residual else h
    a = a.relu() if relu else a
    v = a / scale
    x_hat = ((v + (v.round() - v).detach() + zero_point).clamp(0, QMAX) - zero_point) * scale
    x_hat = torch.where(drop_oracle.kept_like(SEED, h, keep), x_hat, a)
    return (x_hat - target).square().sum(1).mean()


def test_worked_by_hand(op_device: torch.device) -> None:
    """Two images of two channels; scale 0.5, zero point 1, codes 0 to 3: the grid is -0.5, 0, 0.5, 1."""
    h = torch.tensor([[0.6, 2.0], [-0.3, -0.4]], device=op_device, requires_grad=True)
    target = torch.tensor([[0.0, 0.5], [1.0, 0.0]], device=op_device)
    scale = torch.tensor(0.5, device=op_device, requires_grad=True)
    loss = reconstruction_loss(h, target, scale, torch.tensor(1, dtype=I32, device=op_device), 0, 3)
    # x_hat = 0.5, 1, -0.5, -0.5; the errors 0.5, 0.5, -1.5, -0.5; two images.
    assert loss.item() == (0.25 + 0.25 + 2.25 + 0.25) / 2
    loss.backward()
    assert h.grad.tolist() == [[0.5, 0.0], [-1.5, -0.5]]
    # v = 1.2, 4, -0.6, -0.8: rint(v) - v = -0.2, 2 (clipped), -0.4, -0.2
    assert scale.grad.item() == pytest.approx(0.5 * -0.2 + 0.5 * 2 + 1.5 * 0.4 + 0.5 * 0.2)
    loss = reconstruction_loss(h, target, relu=True)
    assert loss.item() == pytest.approx((0.36 + 2.25 + 1.0 + 0.0) / 2)


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.3])
@pytest.mark.parametrize(("residual", "relu"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_value_and_gradients(layout: str, residual: bool, relu: bool, keep: float, op_device: torch.device) -> None:
    given = {name: LAYOUTS[layout](t) if t.ndim == 4 else t for name, t in make().items()}
    if not residual:
        given["h"] = given["h"] + given["residual"]
    leaves = {name: tensor.to(op_device).detach().requires_grad_() for name, tensor in given.items()}
    zero_point = torch.tensor([3], dtype=I32, device=op_device)
    drop: Any = {"keep_quantized": keep, "seed": torch.tensor(SEED, device=op_device)}
    loss = reconstruction_loss(
        leaves["h"],
        leaves["target"].detach(),
        leaves["scale"],
        zero_point,
        0,
        QMAX,
        residual=leaves["residual"] if residual else None,
        relu=relu,
        **drop,
    )
    (2 * loss).backward()
    wide = {name: tensor.double().requires_grad_() for name, tensor in given.items()}
    expected = expected_loss(wide, 3, residual, relu, keep)
    (2 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=RECONSTRUCTION)
    for name in ("h", "residual", "scale") if residual else ("h", "scale"):
        got, want = leaves[name].grad.cpu().double(), wide[name].grad
        assert got.shape == want.shape
        # Errors are differences of numbers up to 4, steps of the gradient follow them.
        assert ((got - want).abs() <= RECONSTRUCTION_GRADIENT * (want.abs() + wide["h"].grad.abs().mean())).all()
    assert leaves["h"].grad.stride() == leaves["h"].stride()


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("layout", layouts_of(4))
def test_equals_the_ops_it_fuses(layout: str, keep: float, op_device: torch.device) -> None:
    """The same elements are drawn as by fake_quantize; the gradient of h is the same, bit for bit."""
    scale, zero_point = oracle.parameters(torch.empty(()), 0, QMAX, None)
    x = oracle.values(SHAPE, scale).nan_to_num(nan=0.0, posinf=9.0, neginf=-9.0).clamp(-1e3, 1e3)
    target = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(op_device)
    h = LAYOUTS[layout](x.to(op_device)).detach().requires_grad_()
    drop: Any = {"keep_quantized": keep, "seed": torch.tensor(SEED, device=op_device)}
    grid = scale.to(op_device), zero_point.to(op_device), 0, QMAX
    loss = reconstruction_loss(h, target, *grid, relu=True, **drop)
    (gradient,) = torch.autograd.grad(loss, h)
    x_hat = fake_quantize(h.relu(), *grid, **drop)
    dx_hat = (2 * (x_hat.detach() - target)) * (SHAPE[1] / h.numel())
    (expected,) = torch.autograd.grad(x_hat, h, dx_hat)
    assert torch.equal(gradient, expected)
    assert loss.item() == pytest.approx((x_hat - target).square().sum(1).mean().item(), rel=RECONSTRUCTION)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_half_types(dtype: torch.dtype, op_device: torch.device) -> None:
    """Computed in float32 from the rounded inputs; float16 keeps the gradient in float32 until the loss is scaled."""
    given = {name: tensor.to(dtype) for name, tensor in make((2, 8, 64, 64)).items() if name != "scale"}
    grid = torch.tensor([0.13]), torch.tensor([3], dtype=I32), 0, QMAX
    results = []
    for wide in (False, True):
        h, target, residual = ((t.float() if wide else t).to(op_device).detach() for t in given.values())
        h.requires_grad_()
        on_device = (grid[0].to(op_device), grid[1].to(op_device), 0, QMAX)
        loss = reconstruction_loss(h, target, *on_device, residual=residual, relu=True)
        (2.0**14 * loss).backward()
        results.append((loss.detach(), h.grad))
    assert same_bits(results[0][0], results[1][0])
    assert results[0][1].dtype is dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(results[0][1].float(), results[1][1], rtol=eps, atol=0)
    assert results[0][1].count_nonzero() == results[1][1].count_nonzero()


def test_nan_is_not_hidden_and_an_empty_batch_is_nan(op_device: torch.device) -> None:
    h = torch.zeros(2, 3, device=op_device)
    h[0, 0] = torch.nan
    assert reconstruction_loss(h, torch.zeros_like(h), relu=True).isnan()
    empty = torch.zeros(0, 3, 2, 2, device=op_device, requires_grad=True)
    loss = reconstruction_loss(empty, empty.detach())
    loss.backward()
    assert loss.isnan()
    assert empty.grad.shape == empty.shape


@pytest.mark.parametrize("keep", [0.5, 0.3, 0.0, 1.0])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "codes"])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((7, 3, 5, 6), "contiguous"), ((7, 3, 5, 6), "channels_last"), ((9, 260), "contiguous"), ((4,), "contiguous")],
)
def test_gather_mix(shape: tuple[int, ...], layout: str, kind: str, keep: float, op_device: torch.device) -> None:
    draw = torch.Generator().manual_seed(0)
    floating = LAYOUTS[layout](torch.randn(shape, generator=draw))
    index = torch.randint(0, shape[0], (5,), generator=draw)
    options: dict[str, Tensor] = {}
    if kind == "codes":
        cache = LAYOUTS[layout](torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8))
        options = {"scale": torch.tensor([0.13]), "zero_point": torch.tensor([100], dtype=I32)}
        values = (cache.float() - 100) * torch.tensor(0.13)
    else:
        floating = floating.to(getattr(torch, kind))
        cache = values = LAYOUTS[layout](torch.randn(shape, generator=draw).to(floating.dtype))
    before = cache.clone(), floating.clone()
    per_row = floating[0].numel()
    padded = -(-per_row // 128) * 128
    keeps = drop_oracle.kept(SEED, 5 * padded, keep).view(5, padded)[:, :per_row]
    keeps = keeps.contiguous().as_strided((5, *shape[1:]), (per_row, *floating.stride()[1:]))
    expected = torch.where(keeps, values[index].to(floating.dtype), floating[index])
    seed = torch.tensor([SEED], device=op_device)
    on_device = {name: tensor.to(op_device) for name, tensor in options.items()}
    out = gather_mix(cache.to(op_device), floating.to(op_device), index.to(op_device), keep, seed, **on_device)
    assert same_bits(out, expected)
    assert out.stride() == (per_row, *floating.stride()[1:])
    assert torch.equal(before[0], cache)
    assert torch.equal(before[1], floating)


@pytest.mark.parametrize(("rows", "batch"), [(3, 0), (0, 0), (3, 1)])
def test_gather_mix_of_few_rows(rows: int, batch: int, op_device: torch.device) -> None:
    cache = torch.ones(rows, 2, 3, device=op_device)
    index = torch.zeros(batch, dtype=torch.int64, device=op_device)
    out = gather_mix(cache, cache, index, 0.5, torch.tensor(SEED, device=op_device))
    assert torch.equal(out, torch.ones(batch, 2, 3, device=op_device))


def test_gather_mix_beyond_the_rows_on_the_cpu() -> None:
    with pytest.raises(IndexError):
        gather_mix(torch.ones(3, 2), torch.ones(3, 2), torch.tensor([3]), 0.5, torch.tensor(SEED))


def _loss(**changes: Any) -> dict[str, Any]:
    grid = {"scale": torch.ones(()), "zero_point": torch.zeros((), dtype=I32), "qmin": 0, "qmax": 15}
    return {"h": torch.zeros(4, 2), "target": torch.zeros(4, 2), **grid, **changes}


def _mix(**changes: Any) -> dict[str, Any]:
    given = {"quantized": torch.zeros(4, 2), "floating": torch.zeros(4, 2), "index": torch.zeros(3, dtype=torch.int64)}
    return {**given, "keep_quantized": 0.5, "seed": torch.tensor(SEED), **changes}


CODES, META = torch.zeros(4, 2, dtype=torch.uint8), torch.zeros(4, 2, device="meta")
ERRORS: list[tuple[Any, dict[str, Any], str]] = [
    (reconstruction_loss, _loss(h=torch.zeros(4)), "h has shape (4,), expected [N, C] or [N, C, ...]; unsqueeze it"),
    (reconstruction_loss, _loss(h=CODES), "h has dtype uint8, expected float32 or bfloat16 or float16"),
    (reconstruction_loss, _loss(target=torch.zeros(2)), "target is (2,) on cpu, expected (4, 2) on cpu like h"),
    (reconstruction_loss, _loss(target=META), "target is (4, 2) on meta, expected (4, 2) on cpu like h"),
    (reconstruction_loss, _loss(residual=torch.zeros(2)), "residual is (2,) on cpu, expected (4, 2) on cpu like h"),
    (reconstruction_loss, _loss(residual=1), "residual is a int, expected a torch.Tensor"),
    (reconstruction_loss, _loss(zero_point=None), "got one of scale and zero_point, expected both or neither"),
    (reconstruction_loss, _loss(scale=torch.ones(4)), "scale has shape (4,), expected () or (1,) for one scale per"),
    (reconstruction_loss, _loss(qmin=3, qmax=3), "codes go from qmin=3 to qmax=3, expected -65536 <= qmin < qmax"),
    (reconstruction_loss, _loss(keep_quantized=0.5), "seed is missing, expected an int64 tensor of shape () or (1,)"),
    (
        reconstruction_loss,
        {"h": torch.zeros(4, 2), "target": torch.zeros(4, 2), "keep_quantized": 0.5, "seed": torch.tensor(1)},
        "keep_quantized is 0.5 without scale, expected 1; there is no quantizer",
    ),
    (gather_mix, _mix(floating=CODES), "floating has dtype uint8, expected float32 or bfloat16 or float16"),
    (gather_mix, _mix(quantized=CODES), "quantized has dtype uint8, expected float32 or bfloat16 or float16"),
    (gather_mix, _mix(scale=torch.ones(1)), "quantized has dtype float32, expected uint8"),
    (
        gather_mix,
        _mix(quantized=CODES, scale=torch.ones(1)),
        "got one of scale and zero_point, expected both or neither",
    ),
    (
        gather_mix,
        _mix(quantized=torch.zeros(4, 3)),
        "quantized is (4, 3) on cpu and floating (4, 2) on cpu, expected rows",
    ),
    (gather_mix, _mix(quantized=META), "quantized is (4, 2) on meta and floating (4, 2) on cpu, expected rows"),
    (
        gather_mix,
        _mix(quantized=torch.zeros(2, 4).t()),
        "quantized has strides (1, 4) and floating (2, 1), expected the same, dense and row after row;",
    ),
    (
        gather_mix,
        _mix(quantized=torch.zeros(2, 4).t(), floating=torch.zeros(2, 4).t()),
        "quantized has strides (1, 4) and floating (1, 4), expected the same, dense and row after row;",
    ),
    (gather_mix, _mix(index=torch.zeros(3)), "index has dtype float32, expected int64"),
    (
        gather_mix,
        _mix(index=torch.zeros(3, 1, dtype=torch.int64)),
        "index has shape (3, 1) on cpu, expected [N] on cpu",
    ),
    (gather_mix, _mix(keep_quantized=-0.5), "keep_quantized is -0.5, expected a probability from 0 to 1"),
    (gather_mix, _mix(seed=torch.tensor(1.0)), "seed has dtype float32, expected int64"),
    (
        gather_mix,
        _mix(quantized=CODES, scale=torch.ones(4), zero_point=torch.zeros((), dtype=I32)),
        "scale has shape (4,), expected () or (1,) for one scale",
    ),
    (
        gather_mix,
        _mix(quantized=CODES, scale=torch.ones(()), zero_point=torch.zeros(())),
        "zero_point has dtype float32, expected int32",
    ),
]


@pytest.mark.parametrize(("function", "arguments", "message"), ERRORS, ids=[message[:50] for _, _, message in ERRORS])
def test_errors(function: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError) as caught:
        function(**arguments)
    assert str(caught.value).startswith(f"{function.__name__}: {message}")


@pytest.mark.parametrize("layout", layouts_of(4))
@pytest.mark.parametrize("quantizer", [False, True])
def test_opcheck(quantizer: bool, layout: str, op_device: torch.device) -> None:
    given = {name: tensor.to(op_device) for name, tensor in make().items()}
    h = LAYOUTS[layout](given["h"]).requires_grad_()
    scale, zero_point = given["scale"].requires_grad_(), torch.tensor([3], dtype=I32, device=op_device)
    seed = torch.tensor(SEED, device=op_device)
    rest: tuple[Any, ...] = (None, None, 0, 0, True, 1.0, None)
    if quantizer:
        rest = (scale, zero_point, 0, QMAX, True, 0.5, seed)
    residual = given["residual"].requires_grad_()
    arguments = (h, given["target"], residual, *rest)
    torch.library.opcheck(torch.ops.ttaq_kernels.reconstruction_loss.default, arguments)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck_of_gather_mix(layout: str, op_device: torch.device) -> None:
    floating = LAYOUTS[layout](torch.randn(SHAPE).to(op_device))
    codes = LAYOUTS[layout](torch.zeros(SHAPE, dtype=torch.uint8, device=op_device))
    index, seed = torch.tensor([2, 0, 2], device=op_device), torch.tensor(SEED, device=op_device)
    scale, zero_point = torch.tensor(0.1, device=op_device), torch.tensor(3, dtype=I32, device=op_device)
    op = torch.ops.ttaq_kernels.gather_mix.default
    torch.library.opcheck(op, (floating, floating, index, 0.5, seed, None, None))
    torch.library.opcheck(op, (codes, floating, index, 0.5, seed, scale, zero_point))


def _step(h: Tensor, cache: Tensor, index: Tensor, scale: Tensor, zero_point: Tensor, seed: Tensor) -> Tensor:
    x = gather_mix(cache, cache * 2, index, 0.5, seed)
    drop: Any = {"keep_quantized": 0.5, "seed": seed}
    return reconstruction_loss(h * 2, x, scale, zero_point, 0, QMAX, residual=x, relu=True, **drop)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool, op_device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3) if dynamic else (2,):
        for layout in ("contiguous", "channels_last"):
            h, cache = (LAYOUTS[layout](torch.randn(n, *SHAPE[1:]).to(op_device)) for n in (batch, 7))
            inputs = h.requires_grad_(), cache, torch.arange(batch, device=op_device)
            scale = torch.tensor([0.13], device=op_device, requires_grad=True)
            grid = scale, torch.tensor([3], dtype=I32, device=op_device), torch.tensor(SEED, device=op_device)
            results = []
            for function in (_step, compiled):
                loss = function(*inputs, *grid)
                results.append((loss.detach(), *torch.autograd.grad(loss, (h, scale))))
            torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
