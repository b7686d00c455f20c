"""perturb as users call it: the draws, what depends on what, errors, torch.compile; on the CPU and on a GPU."""

import itertools
from typing import Any

import numpy as np
import perturb_oracle as oracle
import pytest
import torch
from kernel_layouts import same_bits
from torch import Tensor, nn

from ttaq_kernels import KernelError, perturb
from ttaq_kernels.reference import perturb as reference

SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 2**40 + 12345]


def bases_of(*sizes: int, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=draw) for size in sizes]


def test_philox_of_the_oracle_equals_the_published_numbers() -> None:
    """The known-answer test of Random123 for philox4x32-10 at counter 0 and key 0."""
    assert oracle.philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("distribution", reference.DISTRIBUTIONS)
@pytest.mark.parametrize("seed", SEEDS)
def test_draws_equal_the_oracle(seed: int, distribution: str, op_device: torch.device) -> None:
    zeros = torch.zeros(40, device=op_device)
    one = torch.ones((), device=op_device)
    (z,) = perturb([zeros], one, torch.tensor(seed, device=op_device), distribution)
    expected = np.array([oracle.z(seed, element, distribution) for element in range(40)])
    assert np.array_equal(z.cpu().numpy(), expected)


def test_worked_by_hand(op_device: torch.device) -> None:
    """Counter 0, key 0: w0 = 0x6627E8D5 has bit 31 clear and 0x27E8D5 = 2615509 in its low 23 bits; the bytes of the
    four words add up to 2367."""
    base, c = torch.tensor([1.0], device=op_device), torch.tensor(0.5, device=op_device)
    seed = torch.tensor(0, device=op_device)
    z = 0.5 + 2615509 / 2**24
    assert perturb([base], c, seed, "signs")[0].item() == 1.5
    assert perturb([base], c, seed)[0].item() == pytest.approx(1 + 0.5 * z, abs=1e-7)
    assert perturb([base], c, seed, inverse=True)[0].item() == pytest.approx(1 + 0.5 / z, abs=1e-7)
    words = oracle.philox(0, 0)
    assert sum(byte for word in words for byte in word.to_bytes(4, "big")) == 2367
    assert perturb([base], c, seed, "normal")[0].item() == pytest.approx(1 + 0.5 * 327 / 87380**0.5, abs=1e-7)


@pytest.mark.parametrize(
    ("distribution", "variance", "kurtosis", "largest"),
    [("signs", 1.0, 1.0, 1.0), ("half_to_one", 7 / 12, (31 / 80) / (7 / 12) ** 2, 1.0), ("normal", 1.0, 2.925, 6.91)],
)
def test_moments(distribution: str, variance: float, kurtosis: float, largest: float) -> None:
    z = reference.draw(torch.tensor(7), 200_000, distribution).double()
    assert abs(z.mean()) < 4 * (variance / 200_000) ** 0.5
    assert z.var().item() == pytest.approx(variance, rel=0.02)
    assert ((z**4).mean() / z.var() ** 2).item() == pytest.approx(kurtosis, rel=0.02)
    assert z.abs().max() <= largest
    if distribution == "half_to_one":
        assert z.abs().min() >= 0.5
        assert z.abs().max() < 1
    neighbours = (z[1:] * z[:-1]).mean() / variance
    assert abs(neighbours) < 4 / 200_000**0.5


def test_the_estimate_of_a_linear_loss_is_unbiased() -> None:
    """L = g x: (L(x + c z) - L(x)) / (c z_k) has mean g_k whatever z is; with z in place of 1 / z, 7/12 of it."""
    slope, c, draws = torch.tensor([1.0, -2.0, 0.5]), 0.01, 50_000
    zeros, one, seed = [torch.zeros(draws, 3)], torch.tensor(1.0), torch.tensor(1)
    along = perturb(zeros, one, seed)[0]
    inverse = perturb(zeros, one, seed, inverse=True)[0]
    rise = (perturb(zeros, torch.tensor(c), seed)[0] @ slope / c).unsqueeze(1)
    torch.testing.assert_close((rise * inverse).mean(0), slope, rtol=0, atol=5 * 3 / draws**0.5)
    torch.testing.assert_close((rise * along).mean(0), 7 / 12 * slope, rtol=0, atol=5 * 1.5 / draws**0.5)


@pytest.mark.parametrize("inverse", [False, True])
def test_groups(inverse: bool, op_device: torch.device) -> None:
    """Each group is what its seed alone gives; an antithetic pair lies on both sides; c = 0 gives the base."""
    bases = [base.to(op_device) for base in bases_of(5, 700, 1)]
    seeds = torch.tensor([3, 3, 8, 9], device=op_device)
    c = torch.tensor([0.1, -0.1, 0.2, 0.0], device=op_device)
    groups = perturb(bases, c, seeds, "signs", inverse)
    assert [tuple(group.shape) for group in groups] == [(4, 5), (4, 700), (4, 1)]
    for k in range(4):
        alone = perturb(bases, c[k], seeds[k], "signs", inverse)
        assert all(same_bits(one, group[k]) for one, group in zip(alone, groups, strict=True))
    for base, group in zip(bases, groups, strict=True):
        torch.testing.assert_close(group[0] + group[1], 2 * base, rtol=0, atol=1e-6)
        assert torch.equal(group[3], base)
    one = perturb(bases, c[:1], seeds[:1], "signs", inverse)
    assert all(same_bits(a[0], b[0]) for a, b in zip(one, groups, strict=True))


@pytest.mark.parametrize("distribution", reference.DISTRIBUTIONS)
def test_the_draw_depends_on_the_element_alone(distribution: str, op_device: torch.device) -> None:
    """Not on how the elements are cut into tensors, nor on their shapes or memory layouts; the bases stay."""
    (whole,) = (base.to(op_device) for base in bases_of(1200))
    before = whole.clone()
    c, seed = torch.tensor(0.3, device=op_device), torch.tensor(11, device=op_device)
    expected = perturb([whole], c, seed, distribution)[0]
    cut = [whole[:5], whole[5:5], whole[5:605].view(30, 20), whole[605:]]
    pieces = perturb(cut, c, seed, distribution)
    assert [piece.shape for piece in pieces] == [piece.shape for piece in cut]
    assert same_bits(torch.cat([piece.flatten() for piece in pieces]), expected)
    spread = whole.view(30, 40).t().contiguous().t()
    assert same_bits(perturb([spread], c, seed, distribution)[0].flatten(), expected)
    assert same_bits(whole, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_rounded_once(dtype: torch.dtype, op_device: torch.device) -> None:
    base = bases_of(300)[0].to(op_device, dtype)
    c, seed = torch.tensor(0.3, device=op_device), torch.tensor(11, device=op_device)
    assert same_bits(perturb([base], c, seed)[0], perturb([base.float()], c, seed)[0].to(dtype))


def test_parameters_get_no_gradient() -> None:
    out = perturb([nn.Parameter(torch.ones(3))], torch.ones(1, requires_grad=True), torch.tensor([1]))
    assert not out[0].requires_grad


B = [torch.zeros(3), torch.zeros(2)]
C, S = torch.tensor(0.1), torch.tensor([1, 2])
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"bases": []}, "bases is empty, expected a list of at least one tensor"),
    ({"bases": torch.zeros(3)}, "bases is a Tensor, expected a list of at least one tensor"),
    ({"bases": [1.0]}, "bases[0] is a float, expected a torch.Tensor"),
    ({"bases": [B[0], B[1].int()]}, "bases[1] has dtype int32, expected float32 or bfloat16 or float16"),
    ({"bases": [B[0], B[1].half()]}, "bases[1] is torch.float16 on cpu, expected torch.float32 on cpu like bases[0]"),
    ({"bases": [B[0], B[1].to("meta")]}, "bases[1] is torch.float32 on meta, expected torch.float32 on cpu like bas"),
    ({"seeds": 3}, "seeds is a int, expected a torch.Tensor"),
    ({"seeds": torch.tensor([1], dtype=torch.int32)}, "seeds has dtype int32, expected int64"),
    ({"seeds": torch.zeros(2, 1).long()}, "seeds has shape (2, 1), expected () or (K,) with K >= 1 groups"),
    ({"seeds": torch.zeros(0).long()}, "seeds has shape (0,), expected () or (K,)"),
    ({"seeds": S.to("meta")}, "seeds is on meta, expected cpu like the bases; move it with seeds.to(...)"),
    ({"c": 0.1}, "c is a float, expected a torch.Tensor"),
    ({"c": C.double()}, "c has dtype float64, expected float32"),
    ({"c": torch.zeros(3)}, "c has shape (3,), expected () or (1,) or (2,) for 2 seeds"),
    ({"c": torch.zeros(2), "seeds": torch.tensor(1)}, "c has shape (2,), expected () or (1,) for 1 seeds"),
    ({"c": C.to("meta")}, "c is on meta, expected cpu like the bases; move it with c.to(...)"),
    ({"distribution": "gauss"}, "distribution is 'gauss', expected one of signs, half_to_one, normal"),
    ({"distribution": "normal", "inverse": True}, "inverse is True, expected False for 'normal', which may draw 0"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS, ids=[message[:50] for _, message in ERRORS])
def test_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError) as caught:
        perturb(**{"bases": B, "c": C, "seeds": S, **change})
    assert str(caught.value).startswith(f"perturb: {message}")


@pytest.mark.parametrize(("distribution", "inverse"), [*itertools.product(["signs"], [False, True]), ("normal", False)])
def test_opcheck(distribution: str, inverse: bool, op_device: torch.device) -> None:
    op = torch.ops.ttaq_kernels.perturb.default
    bases = [base.to(op_device) for base in bases_of(5, 0, 7)]
    torch.library.opcheck(op, (bases, C.to(op_device), S.to(op_device), distribution, inverse))


def test_compiles_into_one_graph(op_device: torch.device) -> None:
    torch._dynamo.reset()

    def step(first: Tensor, second: Tensor, c: Tensor, seeds: Tensor) -> list[Tensor]:
        return perturb([first * 2, second], c, seeds)

    arguments = [tensor.to(op_device) for tensor in (*bases_of(5, 7), C, S)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert all(same_bits(*pair) for pair in zip(compiled(*arguments), step(*arguments), strict=True))
