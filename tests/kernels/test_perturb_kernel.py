"""The kernel of perturb against the reference, bit for bit: interpreted, and on a GPU."""

import importlib

import pytest
import torch
from kernel_layouts import same_bits
from torch import Tensor

from ttaq_kernels.reference import perturb as reference

# The package exports a function of the same name.
perturb = importlib.import_module("ttaq_kernels.perturb")
DRAWS = [("signs", False), ("signs", True), ("half_to_one", False), ("half_to_one", True), ("normal", False)]


def assert_matches(
    bases: list[Tensor], c: Tensor, seeds: Tensor, draw: tuple[str, bool], out_dtype: torch.dtype | None = None
) -> None:
    out = perturb._launch_perturb(bases, c, seeds, *draw, out_dtype)
    on_cpu = [base.cpu() if out_dtype is None else base.cpu().to(out_dtype) for base in bases]
    assert same_bits(out, reference.perturb(on_cpu, c.cpu(), seeds.cpu(), *draw))


def bases_of(device: torch.device, *sizes: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=draw).to(device) for size in sizes]


@pytest.mark.parametrize("draw", DRAWS, ids=str)
@pytest.mark.parametrize("sizes", [(1,), (513,), (0,), (0, 3, 0), (5, 700, 0, 512, 64)], ids=str)
def test_sizes(sizes: tuple[int, ...], draw: tuple[str, bool], kernel_device: torch.device) -> None:
    seeds = torch.tensor([5, -(2**62), 2**35], device=kernel_device)
    c = torch.tensor([0.1, -0.2, 0.0], device=kernel_device)
    assert_matches(bases_of(kernel_device, *sizes), c, seeds, draw)


def test_more_tensors_than_one_launch_takes(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perturb, "_TENSORS", 2)
    c, seeds = torch.tensor(0.1, device=kernel_device), torch.tensor([5, 6], device=kernel_device)
    assert_matches(bases_of(kernel_device, 5, 600, 0, 7, 9), c, seeds, ("half_to_one", False))


@pytest.mark.parametrize("c_shape", [(), (1,), (2,)])
@pytest.mark.parametrize("seed_shape", [(), (1,), (2,)])
def test_parameters_with_gaps_and_shapes(
    seed_shape: tuple[int, ...], c_shape: tuple[int, ...], kernel_device: torch.device
) -> None:
    if c_shape == (2,) and seed_shape != (2,):
        c_shape = (1,)
    c = torch.arange(1.0, 5.0, device=kernel_device)[::2][: max(1, sum(c_shape))].reshape(c_shape)
    seeds = torch.arange(4, device=kernel_device)[::2][: max(1, sum(seed_shape))].reshape(seed_shape)
    base = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    assert_matches([base.t(), base[:, ::2]], c, seeds, ("half_to_one", False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype: torch.dtype, kernel_device: torch.device) -> None:
    # The interpreter cuts off instead of rounding when it stores bfloat16, so there only the load is tested.
    interpreted = kernel_device.type == "cpu" and dtype is torch.bfloat16
    bases = [base.to(dtype) for base in bases_of(kernel_device, 40, 50)]
    c, seeds = torch.tensor(0.3, device=kernel_device), torch.tensor([4], device=kernel_device)
    assert_matches(bases, c, seeds, ("normal", False), torch.float32 if interpreted else None)


@pytest.mark.gpu
def test_capture_in_a_cuda_graph() -> None:
    """A replay reads the seeds anew."""
    bases = bases_of(torch.device("cuda"), 700, 64, 2048)
    c, seeds = torch.tensor(0.3, device="cuda"), torch.tensor([4, 5], device="cuda")
    perturb._launch_perturb(bases, c, seeds, "half_to_one", False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = perturb._launch_perturb(bases, c, seeds, "half_to_one", False)
    seeds += 10
    graph.replay()
    assert same_bits(captured, perturb._launch_perturb(bases, c, seeds, "half_to_one", False))
