"""What only a GPU can show about the kernels, checked before anything is timed; one line for each item.

    python -m benchmarks.gpu_checklist [--only NAME,...] [--out FILE]

The exit status is 0 if all is right, 1 if something is wrong, 2 if there is no CUDA device. Kernels are held against
the CPU path, integer arithmetic or torch. After an illegal memory access every later item fails as well: run those
alone with --only.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import ttaq_kernels
from benchmarks import measure
from benchmarks.registry import Case, Op, Problem, problem
from benchmarks.run import OPS
from ttaq_kernels import _config, _gemm_tiles, batch_norm, fake_quantize, pack_weight, packed_linear, perturb, qgemm
from ttaq_kernels.pack import PackedWeight

Device = torch.device
_SIZES = ((200, 130, 96), (64, 64, 768), (1, 1, 1), (129, 257, 320))  # rows, outputs, inputs of products


class WrongError(Exception):
    """An item of the list does not hold."""


def _same(what: str, got: Tensor, expected: Tensor) -> int:
    """The number of elements, all of which agree bit for bit; NaN agrees with NaN."""
    got, expected = got.cpu(), expected.cpu()
    differing = ~((got == expected) | (got.isnan() & expected.isnan())) if got.is_floating_point() else got != expected
    if differing.any():
        raise WrongError(f"{what}: {int(differing.sum())} of {got.numel()} elements differ")
    return got.numel()


def _draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _product(size: tuple[int, int, int], bits: int, with_zero_points: bool) -> tuple[Tensor, PackedWeight, Tensor]:
    """int8 x, a packed weight, and their product in int64."""
    rows, outputs, length = size
    draw, low = _draw(), 0 if with_zero_points else -(1 << (bits - 1))
    x = torch.randint(-128, 128, (rows, length), generator=draw, dtype=torch.int8)
    q = torch.randint(low, low + (1 << bits), (outputs, length), generator=draw)
    zero_point = (
        torch.randint(0, 1 << bits, (outputs,), generator=draw, dtype=torch.int32) if with_zero_points else None
    )
    weight = pack_weight(q, bits, torch.ones(outputs), zero_point)
    return x, weight, x.long() @ weight.integers().long().T


def _on(weight: PackedWeight, device: Device) -> PackedWeight:
    return PackedWeight(*(part.to(device) if isinstance(part, Tensor) else part for part in weight))


def _kinds() -> list[tuple[tuple[int, int, int], int, bool]]:
    return list(itertools.product(_SIZES, (2, 4, 8), (False, True)))


def packed_products(device: Device) -> str:
    """Every tile, 4 and 8 warps, 2 to 4 stages; 2 and 4 bits chain several products in one accumulator."""
    tried = 0
    one = torch.ones(1, device=device)
    for size, bits, with_zero_points in _kinds():
        x, weight, expected = _product(size, bits, with_zero_points)
        x, weight = x.to(device), _on(weight, device)
        for tile, warps, stages in itertools.product(_gemm_tiles._TILES, (4, 8), (2, 3, 4)):
            config = {"BLOCK_M": tile.rows, "BLOCK_N": tile.outputs, "num_warps": warps, "num_stages": stages}
            with _config.forced("packed_linear", config):
                y = packed_linear(x, weight, input_scale=one)
            _same(f"{size}, {bits} bits, zero points {with_zero_points}, {config}", y, expected.float())
            tried += 1
    return f"{tried} combinations of shape, bits, tile, warps and stages equal integer arithmetic"


def inline_assembly(device: Device) -> str:
    """Unpacking in assembly, which the interpreter cannot run, beside plain unpacking."""
    elements = 0
    for size, bits, with_zero_points in _kinds():
        x, weight, _ = _product(size, bits, with_zero_points)
        x, weight = x.to(device), _on(weight, device)
        given = (x, weight.codes, bits, weight.scale, weight.zero_point, weight.row_sum)
        rest = (torch.ones(1, device=device), None, None, torch.float32, None, None, -128, 127)
        asm, plain = (qgemm._launch_gemm(*given, *rest, asm=asm) for asm in (True, False))
        elements += _same(f"{size}, {bits} bits, zero points {with_zero_points}", asm, plain)
    return f"{elements} elements equal"


def rounding(device: Device) -> str:
    """Ties, values far outside of the grid, NaN and both infinities, for several scales; torch agrees per tensor."""
    inf = float("inf")
    special = torch.tensor([inf, -inf, float("nan"), 0.0, -0.0, 3e38, -3e38, 1e-45])
    elements = 0
    for scale, zero_point in itertools.product((0.5, 0.037, 0.3, 1.0), (0, 3, 15)):
        ties = (torch.arange(-64, 64) + 0.5) * scale
        x = torch.cat([ties, ties.nextafter(torch.tensor(inf)), 4 * torch.randn(4096, generator=_draw()), special])
        grid = torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)
        expected = fake_quantize(x, *grid, 0, 15)
        got = fake_quantize(x.to(device), *(part.to(device) for part in grid), 0, 15)
        elements += _same(f"scale {scale}, zero point {zero_point}", got, expected)
        finite = x[x.isfinite()]
        by_torch = torch.fake_quantize_per_tensor_affine(finite.to(device), scale, zero_point, 0, 15)
        _same(f"torch, scale {scale}, zero point {zero_point}", got[x.isfinite().to(device)], by_torch)
    return f"{elements} elements equal"


def narrow_types(device: Device) -> str:
    """bfloat16 and float16 stores, which the interpreter truncates: rounded to nearest, or 1 ulp where sums differ."""
    worst = 0.0
    x = torch.randn(16, 24, 9, 7, generator=_draw()).to(memory_format=torch.channels_last)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = x.to(dtype)
        grid = torch.tensor([0.1]), torch.tensor([7], dtype=torch.int32)
        got = fake_quantize(narrow.to(device), *(part.to(device) for part in grid), 0, 15)
        _same(f"fake_quantize, {dtype}", got, fake_quantize(narrow, *grid, 0, 15))
        vectors = (torch.ones(24), torch.zeros(24))
        expected = batch_norm(narrow, *vectors, None, None, 1.0, 1e-5)
        y = batch_norm(narrow.to(device), *(part.to(device) for part in vectors), None, None, 1.0, 1e-5).cpu()
        ulp = expected.abs().float().clamp(min=torch.finfo(dtype).tiny).log2().floor().exp2() * torch.finfo(dtype).eps
        # Around 0 the difference from the mean has the rounding of the mean.
        off = ((y.float() - expected.float()).abs() / (ulp + 1e-6)).max().item()
        worst = max(worst, off)
        if off > 1:
            raise WrongError(f"batch_norm, {dtype}: off by {off:.2f} units in the last place")
    return f"batch_norm is off by {worst:.2f} units in the last place at most"


def no_atomics(_: Device) -> str:
    """Sums that are added in any order would have to be shown exact: no kernel has any."""
    folder = Path(ttaq_kernels.__file__).parent
    users = [path.name for path in folder.glob("*.py") if "tl.atomic" in path.read_text(encoding="utf-8")]
    if users:
        raise WrongError(f"{', '.join(users)} add with atomics, expected none; check that their results are exact")
    return "no kernel adds with atomics"


def random_numbers(device: Device) -> str:
    """Philox draws the same on both: what QDrop keeps, and the signs of perturb."""
    elements = 0
    x = torch.randn(3, 5, 1001, generator=_draw())
    for keep, seed in itertools.product((0.5, 0.25), (0, 7, (1 << 40) + 3, -1)):
        grid = torch.tensor([0.3]), torch.tensor([3], dtype=torch.int32), torch.tensor(seed)
        both = []
        for place in (Device("cpu"), device):
            scale, zero_point, drawn = (part.to(place) for part in grid)
            both.append(fake_quantize(x.to(place), scale, zero_point, 0, 15, keep_quantized=keep, seed=drawn))
        elements += _same(f"fake_quantize, keep {keep}, seed {seed}", both[1], both[0])
    seeds, c = torch.tensor([1, 1 << 40]), torch.tensor(0.5)
    bases = [torch.zeros(size) for size in (1, 513, 2000)]
    cpu = perturb(bases, c, seeds, "signs")
    gpu = perturb([base.to(device) for base in bases], c.to(device), seeds.to(device), "signs")
    return f"{elements + sum(_same('perturb', a, b) for a, b in zip(gpu, cpu, strict=True))} elements equal"


def _tiny(device: Device) -> list[tuple[Op, Case, Problem]]:
    return [(op, case, problem(op, case, device, seed=0)) for op in OPS for case in op.cases("tiny")]


def every_op(device: Device) -> str:
    """Every op of the benchmarks at tiny shapes, with its gradients, against plain torch."""
    made = _tiny(device)
    wrong = {op.name: error for op, _, one in made for right, error, _ in [one.check()] if not right}
    if wrong:
        raise WrongError(", ".join(f"{name} by up to {error:.3g}" for name, error in wrong.items()))
    return f"{len(made)} cases of {len(OPS)} ops agree with plain torch"


def repeatable(device: Device) -> str:
    """Twice the same bits, gradients included: no sum depends on which program came first."""
    made = _tiny(device)
    for op, case, one in made:
        for first, second in zip(one.call("ttaq"), one.call("ttaq"), strict=True):
            _same(f"{op.name} {case.variant}", first, second)
    return f"{len(made)} cases give the same bits again"


def cuda_graphs(device: Device) -> str:
    """The forward pass of every op is captured, so nothing in it waits for the device, and replays the same bits."""
    if device.type != "cuda":
        raise WrongError(f"graphs are captured on a CUDA device, not on {device}")
    made = [(op, one) for op, case, one in _tiny(device) if not case.step]
    for op, one in made:
        inputs = one.copies[0][0]
        with torch.no_grad():
            expected = op.ours(*inputs).clone()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = op.ours(*inputs)
        result.zero_()
        graph.replay()
        torch.cuda.synchronize()
        _same(op.name, result, expected)
    return f"{len(made)} forward passes captured and replayed"


CHECKS: dict[str, Callable[[Device], str]] = {
    "packed_products": packed_products,
    "inline_assembly": inline_assembly,
    "rounding": rounding,
    "narrow_types": narrow_types,
    "no_atomics": no_atomics,
    "random_numbers": random_numbers,
    "every_op": every_op,
    "repeatable": repeatable,
    "cuda_graphs": cuda_graphs,
}


def check(name: str, device: Device) -> dict[str, object]:
    """The row of an item: whether it is right, its figure or what is wrong, and the seconds it took."""
    start = time.perf_counter()
    try:
        right, figure = True, CHECKS[name](device)
    except Exception as error:
        # Whatever goes wrong on a machine that was never seen is what this list is for.
        right, figure = False, f"{type(error).__name__}: {error!s:.500}"
    return {"check": name, "right": right, "figure": figure, "seconds": round(time.perf_counter() - start, 1)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_checklist", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default=",".join(CHECKS), help="what to check, separated by commas")
    parser.add_argument("--out", type=Path, help="file of JSON lines to append to")
    options = parser.parse_args(arguments)
    names = options.only.split(",")
    if unknown := set(names) - set(CHECKS):
        parser.error(f"--only: unknown {sorted(unknown)}, expected some of {','.join(CHECKS)}")
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was checked", file=sys.stderr)
        return 2
    device = Device("cuda", torch.cuda.current_device())
    machine, wrong = measure.environment(device), 0
    for name in names:
        row = check(name, device)
        wrong += not row["right"]
        print(f"{'ok    ' if row['right'] else 'FAILED'} {name}: {row['figure']}", flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a") as file:
                print(json.dumps({**row, **machine}), file=file)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
