"""Times one step of QDrop on a residual block of ResNet-20: our ops beside plain torch, eager and compiled.

    python -m benchmarks.qdrop_step [--device cuda] [--threads N] [--forms LIST] [--repetitions N] [--out FILE]

A step: gather a batch of 32 from the cached inputs (quantized and float, mixed element by element), soft-round the
weights of both convolutions (4 bits, per channel), quantize the activations after each of them (4 bits, LSQ, QDrop),
compare with the cached float output, go backward, and update the rounding variables, under their regulariser, and the
activation scales with Adam. The convolutions carry a folded batch norm, as in published code; they are the same calls
on both sides. The plain side is written from the formulas, one torch op after the other.

Before anything is timed, both sides take a few steps from the same start with the same random bits, and must agree in
their losses, weights and scales; the exit status is 1 if they do not. Then all forms take a step in turn, again and
again, so that what else runs on the machine hits all of them. Printed are medians by the clock and of CPU time, which
is what the clock would show for one thread on an idle machine, and the medians of the ratios within a turn. At the end
stands the share of each op in the time of an eager step of ours, forward and backward together, by torch's profiler.
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map

from benchmarks import measure
from benchmarks.lsq_drop import KEEP, kept_like
from benchmarks.reconstruction import kept_rows
from ttaq.ptq.caches import Rows
from ttaq_kernels import SoftRounding, fake_quantize, gather_mix, reconstruction_loss, search_scale, soft_round_step_

STAGES = {"16x32x32": (16, 32), "32x16x16": (32, 16)}
BATCH, CACHED, BITS, QMAX = 32, 128, 4, 15
LR_ROUNDING, LR_SCALE, LAMBDA, BETA = 1e-3, 4e-5, 0.01, 20.0
CHECKED_STEPS, TOLERANCE = 5, 2e-4
FORMS = ("plain eager", "plain compiled", "ttaq eager", "ttaq compiled")
# What the name of an op has in it, and what the op is called in the table of shares; Adam also launches ops of others.
PARTS = {
    "Adam": "Adam",
    "reconstruction_loss": "reconstruction_loss",
    "fake_quantize": "fake_quantize",
    "gather_mix": "gather_mix",
    "soft_round": "soft_round_step_",
    "onv": "convolution",
    "elu": "ReLU",
}
PROFILED_STEPS = 10


class Block(NamedTuple):
    """What a step starts from: cached inputs and outputs, weights and biases, their grids, and activation scales."""

    quantized: Tensor
    floating: Tensor
    target: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    grids: list[tuple[Tensor, Tensor]]
    scales: list[Tensor]
    zero_point: Tensor

    @classmethod
    def of(cls, channels: int, side: int, device: torch.device | None = None) -> "Block":
        draw = torch.Generator().manual_seed(channels)
        shape = CACHED, channels, side, side
        floating = torch.randn(shape, generator=draw).relu_().contiguous(memory_format=torch.channels_last)
        spread = (2 / (9 * channels)) ** 0.5
        weights = [spread * torch.randn(channels, channels, 3, 3, generator=draw) for _ in range(2)]
        biases = [0.1 * torch.randn(channels, generator=draw) for _ in range(2)]
        inside = F.conv2d(floating, weights[0], biases[0], padding=1).relu_()
        target = F.conv2d(inside, weights[1], biases[1], padding=1).add_(floating).relu_()
        scales = [x.max().reshape(1) / QMAX for x in (floating, inside, target)]
        zero_point = torch.zeros(1, dtype=torch.int32)
        quantized = fake_quantize(floating, scales[0], zero_point, 0, QMAX)
        grids = [search_scale(w, BITS, axis=0) for w in weights]
        here = (quantized, floating, target, weights, biases, grids, scales[1:], zero_point)
        return cls(*tree_map(lambda tensor: tensor.to(device), here))


class Ours:
    """The step with the ops of `ttaq_kernels`."""

    def __init__(self, block: Block, compiled: bool = False) -> None:
        self.block = block
        self.roundings = [
            SoftRounding.of(w, *grid, 0, QMAX) for w, grid in zip(block.weights, block.grids, strict=True)
        ]
        self.weights = [rounding.w_hat.requires_grad_() for rounding in self.roundings]
        self.scales = [scale.clone().requires_grad_() for scale in block.scales]
        self.adam = torch.optim.Adam(self.scales, lr=LR_SCALE, fused=True)
        self.knobs = torch.tensor([LR_ROUNDING, BETA, LAMBDA, 0.0], device=block.target.device)
        self.seeds = torch.arange(3, device=block.target.device)
        self.loss = torch.compile(self._loss, fullgraph=True, dynamic=False) if compiled else self._loss

    def _loss(self, index: Tensor, weights: list[Tensor], scales: list[Tensor], seeds: Tensor) -> Tensor:
        block = self.block
        x = gather_mix(block.quantized, block.floating, index, KEEP, seeds[0])
        target = Rows(block.target, None, lambda: None).take(index)
        inside = F.conv2d(x, weights[0], block.biases[0], padding=1).relu_()
        drop: Any = {"keep_quantized": KEEP, "seed": seeds[1]}
        inside = fake_quantize(inside, scales[0], block.zero_point, 0, QMAX, **drop)
        h = F.conv2d(inside, weights[1], block.biases[1], padding=1)
        grid = scales[1], block.zero_point, 0, QMAX
        return reconstruction_loss(h, target, *grid, residual=x, relu=True, keep_quantized=KEEP, seed=seeds[2])

    def step(self, index: Tensor, masks: Any = None) -> Tensor:  # noqa: ARG002
        """The reconstruction loss before the step; `masks` is what its seeds draw anyway."""
        loss = self.loss(index, self.weights, self.scales, self.seeds)
        *of_weights, first, second = torch.autograd.grad(loss, [*self.weights, *self.scales])
        self.knobs[3] += 1
        soft_round_step_(self.roundings, of_weights, self.knobs)
        self.scales[0].grad, self.scales[1].grad = first, second
        self.adam.step()
        self.seeds += 3
        return loss.detach()


class Plain:
    """The step as its formulas read, in torch's own ops."""

    def __init__(self, block: Block, compiled: bool = False) -> None:
        self.block = block
        self.vs = []
        for w, (scale, _) in zip(block.weights, block.grids, strict=True):
            place = w / scale.view(-1, 1, 1, 1)
            rest = place - place.floor()
            self.vs.append((-torch.log(1.2 / (rest + 0.1) - 1)).requires_grad_())
        self.scales = [scale.clone().requires_grad_() for scale in block.scales]
        self.adam = torch.optim.Adam(
            [{"params": self.vs, "lr": LR_ROUNDING}, {"params": self.scales, "lr": LR_SCALE}], foreach=False
        )
        self.losses = torch.compile(self._losses, fullgraph=True, dynamic=False) if compiled else self._losses
        self.update = torch.compile(self.adam.step) if compiled else self.adam.step

    @staticmethod
    def rounding(v: Tensor) -> Tensor:
        return torch.clamp(torch.sigmoid(v) * 1.2 - 0.1, 0, 1)

    def weight(self, i: int, v: Tensor) -> Tensor:
        scale, zero_point = (parameter.view(-1, 1, 1, 1) for parameter in self.block.grids[i])
        q = torch.floor(self.block.weights[i] / scale) + self.rounding(v) + zero_point
        return (torch.clamp(q, 0, QMAX) - zero_point) * scale

    def quantize(self, x: Tensor, scale: Tensor, mask: Tensor | None) -> Tensor:
        v = x / scale
        rounded = v + (v.round() - v).detach()
        q = torch.clamp(rounded + self.block.zero_point, 0, QMAX)
        return self.mix((q - self.block.zero_point) * scale, x, mask)

    @staticmethod
    def mix(quantized: Tensor, floating: Tensor, mask: Tensor | None) -> Tensor:
        return torch.where(torch.rand_like(floating) < KEEP if mask is None else mask, quantized, floating)

    def _losses(
        self, index: Tensor, vs: list[Tensor], scales: list[Tensor], masks: list[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        block = self.block
        x = self.mix(block.quantized[index], block.floating[index], masks[0])
        inside = F.relu(F.conv2d(x, self.weight(0, vs[0]), block.biases[0], padding=1))
        inside = self.quantize(inside, scales[0], masks[1])
        out = F.relu(F.conv2d(inside, self.weight(1, vs[1]), block.biases[1], padding=1) + x)
        out = self.quantize(out, scales[1], masks[2])
        loss = (out - block.target[index]).square().sum(1).mean()
        penalty = sum((1 - (2 * self.rounding(v) - 1).abs() ** BETA).sum() for v in vs)
        return loss, loss + LAMBDA * penalty

    def step(self, index: Tensor, masks: list[Tensor | None] | None = None) -> Tensor:
        """The reconstruction loss before the step."""
        self.adam.zero_grad()
        loss, total = self.losses(index, self.vs, self.scales, masks or [None] * 3)
        total.backward()
        self.update()
        return loss.detach()


def batches(device: torch.device) -> Iterator[Tensor]:
    draw = torch.Generator().manual_seed(0)
    while True:
        yield torch.randperm(CACHED, generator=draw)[:BATCH].to(device)


def make(form: str, block: Block) -> Ours | Plain:
    side, way = form.split()
    return (Ours if side == "ttaq" else Plain)(block, way == "compiled")


def largest_error(block: Block, compiled: bool) -> float:
    """The largest difference between the sides after some steps with the same bits, relative to what it is of."""
    ours, plain = Ours(block, compiled), Plain(block)
    errors = []
    for index, _ in zip(batches(block.target.device), range(CHECKED_STEPS), strict=False):
        like = block.target[:BATCH]
        masks: list[Tensor | None] = [kept_rows(like, ours.seeds[0]), *(kept_like(like, s) for s in ours.seeds[1:])]
        expected = plain.step(index, masks).item()
        errors.append(abs(ours.step(index).item() - expected) / expected)
    for i, (weight, v) in enumerate(zip(ours.weights, plain.vs, strict=True)):
        step = block.grids[i][0].view(-1, 1, 1, 1)
        errors.append(((weight - plain.weight(i, v)) / step).abs().max().item())
    errors += [abs(mine.item() / his.item() - 1) for mine, his in zip(ours.scales, plain.scales, strict=True)]
    return max(errors)


def measure_all(block: Block, forms: list[str], repetitions: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of every step of each form, by the clock and of CPU time."""
    made = {form: make(form, block) for form in forms}
    indices = batches(block.target.device)
    for sides in made.values():
        for _ in range(3):
            sides.step(next(indices))
    times: dict[str, dict[str, list[float]]] = {form: {"wall_ms": [], "cpu_ms": []} for form in forms}
    for _ in range(repetitions):
        index = next(indices)
        for form, sides in made.items():
            wait(index.device)
            wall, cpu = time.perf_counter(), time.process_time()
            sides.step(index)
            wait(index.device)
            times[form]["cpu_ms"].append(1e3 * (time.process_time() - cpu))
            times[form]["wall_ms"].append(1e3 * (time.perf_counter() - wall))
    return times


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def shares(block: Block) -> dict[str, float]:
    """The share of each op in the time of a step, as the profiler adds it up: on a GPU that of its kernels."""
    device = block.target.device
    ours, indices = Ours(block), batches(device)
    ours.step(next(indices))
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as profiler:
        for _ in range(PROFILED_STEPS):
            ours.step(next(indices))
        wait(device)
    times: Counter[str] = Counter()
    for event in profiler.events():
        if event.cpu_parent is None and event.device_type == DeviceType.CPU:
            name = next((part for key, part in PARTS.items() if key in event.name), "other")
            times[name] += event.device_time_total if device.type == "cuda" else event.cpu_time_total
    return {name: round(value / times.total(), 4) for name, value in times.most_common()}


def rows_of(stage: str, times: dict[str, dict[str, list[float]]]) -> Iterator[dict[str, Any]]:
    """A row per form: medians, minima, and how many times as long the first form takes."""
    first = next(iter(times.values()))
    for form, of_form in times.items():
        row: dict[str, Any] = {"stage": stage, "batch": BATCH, "form": form}
        for clock, values in of_form.items():
            ratio = statistics.median(one / other for one, other in zip(first[clock], values, strict=True))
            row |= {clock: statistics.median(values), f"{clock}_min": min(values), f"{clock}_ratio": ratio}
        yield {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.qdrop_step", description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, by default 1, which can be repeated")
    parser.add_argument("--forms", default=",".join(FORMS), help="what to time, separated by commas")
    parser.add_argument("--repetitions", type=int, default=30, help="turns, in which every form takes a step")
    parser.add_argument("--out", type=Path, help="file of JSON lines to append to")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args(arguments)
    forms = options.forms.split(",")
    if unknown := set(forms) - set(FORMS):
        parser.error(f"--forms: unknown {sorted(unknown)}, expected some of {','.join(FORMS)}")
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False  # or the sides would differ
    machine = measure.environment(options.device)
    for stage, (channels, side) in STAGES.items():
        block = Block.of(channels, side, options.device)
        torch.compiler.reset()
        for compiled in {form.endswith("compiled") for form in forms if form.startswith("ttaq")}:
            error = largest_error(block, compiled)
            print(f"{stage}: the sides differ by up to {error:.1e} after {CHECKED_STEPS} steps", flush=True)
            if not error <= TOLERANCE:
                print(f"NOT TIMED, expected at most {TOLERANCE:g}")
                return 1
        for row in rows_of(stage, measure_all(block, forms, options.repetitions)):
            wall, cpu = (f"{row[c]:8.2f} ms, ratio {row[f'{c}_ratio']:5.2f}" for c in ("wall_ms", "cpu_ms"))
            print(f"{stage}  {row['form']:15} wall {wall}   cpu {cpu}", flush=True)
            append(options.out, row | machine)
        if "ttaq eager" in forms:
            found = shares(block)
            print(f"{stage}  " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in found.items()), flush=True)
            append(options.out, {"stage": stage, "batch": BATCH, "form": "ttaq eager", "shares": found} | machine)
    return 0


def append(path: Path | None, row: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
