"""fake_quantize with QDrop as users call it: values, gradients, draw, errors, torch.compile; on the CPU and a GPU."""

from typing import Any

import drop_oracle
import fake_quant_oracle as oracle
import pytest
import torch
from kernel_layouts import LAYOUTS, layouts_of, same_bits
from kernel_tolerances import FAKE_QUANTIZE_DSCALE
from torch import Tensor

from ttaq_kernels import KernelError, fake_quantize, gather_mix, reconstruction_loss
from ttaq_kernels.reference import philox

F32, BF16, F16, I32 = torch.float32, torch.bfloat16, torch.float16, torch.int32
SEED = -7_000_000_000_000_000_003


def seed_tensor(device: torch.device | str = "cpu", shape: tuple[int, ...] = ()) -> Tensor:
    return torch.full(shape, SEED, device=device)


# From the test vectors that came with the Random123 library: counter and key of nothing but zeros, then of ones.
KNOWN = {0: [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]}


def test_philox_worked_elsewhere() -> None:
    for seed, words in KNOWN.items():
        assert drop_oracle.philox(seed, 0) == words
        ours = philox.philox(torch.tensor(seed), 1).view(I32)
        assert (ours & 0xFFFFFFFF).tolist() == [[word - ((word >> 31) << 32) for word in words]]


@pytest.mark.parametrize("seed", [0, 1, -1, SEED, 2**63 - 1, -(2**63), 2**31, 2**32 - 1])
def test_philox_equals_python(seed: int) -> None:
    ours = philox.philox(torch.tensor([seed]), 70).view(I32).to(torch.int64) & 0xFFFFFFFF
    assert ours.tolist() == [drop_oracle.philox(seed, call) for call in range(70)]


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("layout", layouts_of(4))
@pytest.mark.parametrize("keep", [0.5, 0.25, 0.0, 0.9])
def test_values_and_gradients(keep: float, layout: str, dtype: torch.dtype, op_device: torch.device) -> None:
    """Element by element either fake_quantize or the identity, as drawn with Python's integers."""
    scale, zero_point = oracle.parameters(torch.empty(()), 0, 7, None)
    x = LAYOUTS[layout](oracle.values((2, 3, 5, 7), scale).to(dtype))
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    keeps = drop_oracle.kept_like(SEED, x, keep)
    given = LAYOUTS[layout](x.to(op_device)).detach().requires_grad_()
    given_scale = scale.to(op_device).requires_grad_()
    drop: Any = {"keep_quantized": keep, "seed": seed_tensor(op_device, (1,))}
    out = fake_quantize(given, given_scale, zero_point.to(op_device), 0, 7, **drop)
    out.backward(grad.to(op_device))
    rounded = oracle.fake_quantize(x, scale, zero_point, 0, 7, None)
    assert same_bits(out.detach(), torch.where(keeps, rounded, x))
    assert out.stride() == torch.empty_like(given).stride()
    dx, _, _ = oracle.gradients(grad, x, scale, zero_point, 0, 7, None)
    assert same_bits(given.grad, torch.where(keeps, dx, grad))
    of_kept = grad.masked_fill(~keeps, 0)
    _, dscale, magnitude = oracle.gradients(of_kept, x, scale, zero_point, 0, 7, None)
    assert (given_scale.grad.cpu() - dscale).abs() <= FAKE_QUANTIZE_DSCALE * magnitude


def test_gradients_equal_autograd_of_the_straight_through_form(op_device: torch.device) -> None:
    """y = where(kept, (clamp(v + (rint(v) - v).detach() + zero_point) - zero_point) * scale, x), in fp64."""
    draw = torch.Generator().manual_seed(0)
    scale, zero_point = oracle.parameters(torch.empty(()), 0, 15, None)
    # Away from ties, where fp64 would round to another code.
    steps = torch.randint(-20, 20, (6, 50), generator=draw) + 0.8 * (torch.rand(6, 50, generator=draw) - 0.5)
    x = (steps * scale).to(op_device).requires_grad_()
    grad = torch.randn(6, 50, generator=draw)
    scale = scale.to(op_device).requires_grad_()
    out = fake_quantize(x, scale, zero_point.to(op_device), 0, 15, keep_quantized=0.5, seed=seed_tensor(op_device))
    out.backward(grad.to(op_device))

    x64, scale64 = (tensor.detach().cpu().double().requires_grad_() for tensor in (x, scale))
    v = x64 / scale64
    x_hat = ((v + (v.round() - v).detach() + zero_point).clamp(0, 15) - zero_point) * scale64
    torch.where(drop_oracle.kept_like(SEED, x, 0.5), x_hat, x64).backward(grad.double())
    torch.testing.assert_close(x.grad.cpu().double(), x64.grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scale.grad.cpu().double(), scale64.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("keep", "share"), [(0.5, 0.5), (0.25, 0.25), (0.7, 179 / 256), (0.999, 1.0), (0.001, 0.0)])
def test_share_of_what_is_rounded(keep: float, share: float, op_device: torch.device) -> None:
    """Within four standard deviations, and independent of the neighbour, for every of many seeds."""
    n = 4096
    x = torch.full((n,), 0.4, device=op_device)
    grid = torch.ones((), device=op_device), torch.zeros((), dtype=I32, device=op_device), 0, 3
    seeds = torch.arange(100, device=op_device)
    rounded = torch.stack([fake_quantize(x, *grid, keep_quantized=keep, seed=seed) == 0 for seed in seeds]).float()
    tolerance = 4 * (share * (1 - share)) ** 0.5
    assert (rounded.mean() - share).abs() <= tolerance / (100 * n) ** 0.5
    assert ((rounded.mean(0) - share).abs() <= 1.3 * tolerance / 100**0.5).all()
    assert ((rounded.mean(1) - share).abs() <= tolerance / n**0.5).all()
    both = (rounded[:, 1:] * rounded[:, :-1]).mean()
    assert (both - share**2).abs() <= 2 * tolerance / (100 * n) ** 0.5


def test_keeping_all_is_fake_quantize(op_device: torch.device) -> None:
    x = torch.randn(300, device=op_device, requires_grad=True)
    grid = torch.tensor(0.3, device=op_device), torch.tensor(2, dtype=I32, device=op_device), 0, 7
    plain = fake_quantize(x, *grid)
    for keep in (1.0, 0.999):
        assert same_bits(fake_quantize(x, *grid, keep_quantized=keep, seed=seed_tensor(op_device)).detach(), plain)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_pieces_of_the_cpu_path_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long tensors go through the reference piece by piece; only the order of sums depends on the pieces."""
    scale, zero_point = torch.tensor([0.3]), torch.tensor([2], dtype=I32)
    draw = torch.Generator().manual_seed(0)
    x, target, grad = torch.randn(3, 3, 5, 6, 7, generator=draw).to(dtype).unbind()
    x = x.contiguous(memory_format=torch.channels_last)
    drop: Any = {"keep_quantized": 0.25, "seed": seed_tensor()}
    results = []
    for size in (1 << 17, 50):
        monkeypatch.setattr("ttaq_kernels.reference._blocks._PER_THREAD", size)
        given, learned = x.clone().requires_grad_(), scale.clone().requires_grad_()
        out = fake_quantize(given, learned, zero_point, 0, 7, **drop)
        out.backward(grad)
        mixed = gather_mix(x.contiguous(), target.contiguous(), torch.tensor([2, 0, 1, 1]), 0.25, seed_tensor())
        loss = reconstruction_loss(h := x.clone().requires_grad_(), target, scale, zero_point, 0, 7, relu=True, **drop)
        loss.backward()
        results.append(((out.detach(), given.grad, mixed, h.grad), torch.stack([learned.grad[0], loss.detach()])))
    (exact, sums), (expected, expected_sums) = results
    assert all(same_bits(*pair) for pair in zip(exact, expected, strict=True))
    torch.testing.assert_close(sums, expected_sums, rtol=1e-5, atol=1e-5)


def test_a_new_seed_before_the_backward_is_an_error(op_device: torch.device) -> None:
    x, seed = torch.randn(30, device=op_device, requires_grad=True), seed_tensor(op_device)
    grid = torch.ones((), device=op_device), torch.zeros((), dtype=I32, device=op_device), 0, 7
    out = fake_quantize(x, *grid, keep_quantized=0.5, seed=seed)
    seed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def _given(**changes: Any) -> dict[str, Any]:
    grid = {"scale": torch.ones(()), "zero_point": torch.zeros((), dtype=I32), "qmin": 0, "qmax": 15}
    return {"x": torch.zeros(64, 2), **grid, "keep_quantized": 0.5, "seed": seed_tensor(), **changes}


ERRORS: list[tuple[dict[str, Any], str]] = [
    (_given(keep_quantized=1.5), "keep_quantized is 1.5, expected a probability from 0 to 1"),
    (_given(keep_quantized=float("nan")), "keep_quantized is nan, expected a probability from 0 to 1"),
    (_given(seed=None), "seed is missing, expected an int64 tensor of shape () or (1,) for keep_quantized=0.5"),
    (_given(seed=3), "seed is a int, expected a torch.Tensor"),
    (_given(seed=torch.zeros(())), "seed has dtype float32, expected int64; convert it with seed.to(...)"),
    (_given(seed=torch.zeros(2).long()), "seed has shape (2,), expected () or (1,) for one seed"),
    (_given(seed=torch.zeros((), dtype=torch.int64, device="meta")), "seed is on meta, expected cpu like x"),
    (
        _given(scale=torch.ones(64), zero_point=torch.zeros(64, dtype=I32), axis=0),
        "keep_quantized is 0.5 with axis=0, expected 1, or axis=None",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[message[:40] for _, message in ERRORS])
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError) as caught:
        fake_quantize(**arguments)
    assert str(caught.value).startswith(f"fake_quantize: {message}")


@pytest.mark.parametrize("layout", layouts_of(4))
def test_opcheck(layout: str, op_device: torch.device) -> None:
    x = LAYOUTS[layout](torch.randn(2, 3, 4, 5)).to(op_device).requires_grad_()
    scale, zero_point = oracle.parameters(x, 0, 15, None)
    drop = (0, 15, 0.5, seed_tensor(op_device))
    ops = torch.ops.ttaq_kernels
    torch.library.opcheck(ops.fake_quantize_drop.default, (x, scale.requires_grad_(), zero_point, *drop))
    detached = (torch.randn_like(x), x.detach(), scale.detach(), zero_point, *drop)
    torch.library.opcheck(ops.fake_quantize_drop_backward.default, detached)


def _double_then_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, seed: Tensor) -> Tensor:
    return fake_quantize(x * 2, scale, zero_point, 0, 15, keep_quantized=0.5, seed=seed)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool, op_device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_double_then_quantize, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3) if dynamic else (2,):
        for layout in layouts_of(4):
            x = LAYOUTS[layout](torch.randn(batch, 3, 4, 5).to(op_device)).requires_grad_()
            scale, zero_point = oracle.parameters(x, 0, 15, None)
            inputs = x, scale.requires_grad_(), zero_point, seed_tensor(op_device)
            results = []
            for function in (_double_then_quantize, compiled):
                out = function(*inputs)
                results.append((out.detach(), *torch.autograd.grad(out.sum(), inputs[:2])))
            torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
