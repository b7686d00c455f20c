"""What an adapter costs beyond the operations of its method: Python, checks, counters.

    python -m benchmarks.adapter_overhead [--methods LIST] [--batch N] [--repetitions N] [--device NAME] [--out FILE]

A tiny net (two convolutions with batch norm, 8 x 8 pixels) in batches of one image, on one thread: its operations take
next to no time, so what lies between them shows. `adapter(x)` is compared with the same operations one after the other:
forward, loss, backward, step of the optimizer. Before anything is timed both sides take a few steps from the same start
and must agree in logits and parameters; the exit status is 1 if they do not. Then they take a step in turn, again and
again, so that what else runs on the machine hits both. Printed are the least and the median time of each in ms, and the
differences: that of the least times is what an idle machine would show.
"""

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from ttaq.nn import AdaptiveBatchNorm2d
from ttaq.nn.adapt_norms import adapt_norms, norm_affine
from ttaq.tta import build
from ttaq_kernels import softmax_entropy

CLASSES = 10
MARGIN, REDUNDANCY, RADIUS = 2.0, 2.0, 0.05  # every sample counts: all of a method's operations are done
OPTIONS: dict[str, dict[str, Any]] = {
    "source": {},
    "norm": {},
    "tent": {},
    "eta": {"entropy_margin": MARGIN, "redundancy": REDUNDANCY},
    "sar": {"entropy_margin": MARGIN, "radius": RADIUS, "skip_last": 0.0, "reset_below": 0.0},
}
CHECKED_STEPS, TOLERANCE = 5, 1e-5


def tiny_net() -> nn.Module:
    torch.manual_seed(0)
    first = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    second = (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)).eval()


class Bare:
    """The operations of a method on a model of its own, and nothing else."""

    def __init__(self, method: str, model: nn.Module, device: torch.device) -> None:
        self.model = adapt_norms(copy.deepcopy(model)).requires_grad_(False).to(device)
        self.step: Callable[[Tensor], Tensor] = getattr(self, method)
        if method != "source":
            for module in self.model.modules():
                if isinstance(module, AdaptiveBatchNorm2d):
                    module.alpha = 1.0
        if method in ("source", "norm"):
            return
        self.parameters = [p.requires_grad_(True) for p in norm_affine(self.model, "Bare").values()]
        sgd = method == "sar"
        self.optimizer = (
            torch.optim.SGD(self.parameters, lr=1e-3, momentum=0.9, fused=True)
            if sgd
            else torch.optim.Adam(self.parameters, lr=1e-3, fused=True)
        )
        self.mean = torch.zeros(CLASSES, device=device)
        self.entropy = torch.full((), -1.0, device=device)

    @torch.no_grad()
    def source(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits

    norm = source

    def tent(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        softmax_entropy(logits).mean().backward()
        self._learn()
        return logits.detach()

    def eta(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        margin = MARGIN * math.log(CLASSES)
        with torch.no_grad():
            p = logits.softmax(1)
            entropy = softmax_entropy(logits.detach())
            reliable = entropy < margin
            started = self.mean.any()
            similarity = torch.cosine_similarity(self.mean.unsqueeze(0), p, dim=1).abs()
            chosen = reliable & (~started | (similarity < REDUNDANCY))
            count = chosen.sum()
            weights = torch.where(chosen, (margin - entropy).exp(), 0.0)
        (softmax_entropy(logits, weights).sum() / count.clamp(min=1)).backward()
        self._learn()
        with torch.no_grad():
            mean = (p * chosen.unsqueeze(1)).sum(0) / count.clamp(min=1)
            share = torch.where(started, 0.9, 0.0)
            self.mean.copy_(torch.where(count > 0, share * self.mean + (1 - share) * mean, self.mean))
        return logits.detach()

    def sar(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        margin = MARGIN * math.log(CLASSES)
        reliable = softmax_entropy(logits.detach()) < margin
        loss = softmax_entropy(logits, reliable).sum() / reliable.sum().clamp(min=1)
        here = [parameter.detach().clone() for parameter in self.parameters]
        gradients = torch.autograd.grad(loss, self.parameters)
        with torch.no_grad():
            norm = torch.stack(torch._foreach_norm(gradients)).norm()
            step = torch._foreach_mul(gradients, RADIUS / (norm + 1e-12))
            torch._foreach_add_([parameter.detach() for parameter in self.parameters], step)
        second = self.model(x)
        entropy = softmax_entropy(second.detach())
        chosen = reliable & (entropy < margin)
        count = chosen.sum()
        (softmax_entropy(second, chosen).sum() / count.clamp(min=1)).backward()
        with torch.no_grad():
            torch._foreach_copy_([parameter.detach() for parameter in self.parameters], here)
        self._learn()
        with torch.no_grad():
            mean = (entropy * chosen).sum() / count.clamp(min=1)
            share = torch.where(self.entropy < 0, 0.0, 0.9)
            self.entropy.copy_(torch.where(count > 0, share * self.entropy + (1 - share) * mean, self.entropy))
        return logits.detach()

    def _learn(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def images(batch: int, device: torch.device) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.rand(batch, 3, 8, 8, generator=draw).to(device) for _ in range(CHECKED_STEPS)]


def largest_difference(method: str, batch: int, device: torch.device) -> float:
    """Between logits and learned parameters of both sides after a few steps."""
    adapter, bare = build(method, tiny_net(), **OPTIONS[method]).to(device), Bare(method, tiny_net(), device)
    difference = 0.0
    for x in images(batch, device):
        difference = max(difference, float((adapter(x) - bare.step(x)).abs().max()))
    learned = [parameter for _, parameter in adapter.parameters_adapted()]
    others = bare.parameters if learned else []
    return max([difference, *(float((a - b).detach().abs().max()) for a, b in zip(learned, others, strict=True))])


def times(method: str, batch: int, device: torch.device, repetitions: int) -> dict[str, list[float]]:
    """ms of every step of both sides."""
    adapter, bare = build(method, tiny_net(), **OPTIONS[method]).to(device), Bare(method, tiny_net(), device)
    sides: dict[str, Callable[[Tensor], Tensor]] = {"adapter": adapter, "bare": bare.step}
    x = images(batch, device)[0]
    found: dict[str, list[float]] = {side: [] for side in sides}
    for repetition in range(repetitions + CHECKED_STEPS):
        for side, step in sides.items():
            _wait(device)
            begin = time.perf_counter()
            step(x)
            _wait(device)
            if repetition >= CHECKED_STEPS:
                found[side].append(1e3 * (time.perf_counter() - begin))
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def row_of(method: str, batch: int, found: dict[str, list[float]]) -> dict[str, Any]:
    """Least and median times of both sides, and their differences, in ms."""
    row: dict[str, float] = {}
    for name, of in (("min", min), ("median", statistics.median)):
        adapter, bare = of(found["adapter"]), of(found["bare"])
        row |= {f"adapter_ms_{name}": adapter, f"bare_ms_{name}": bare, f"overhead_ms_{name}": adapter - bare}
    return {"method": method, "batch": batch, **{name: round(value, 4) for name, value in row.items()}}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adapter_overhead", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--methods", default=",".join(OPTIONS), help="which, separated by commas")
    parser.add_argument("--batch", type=int, default=1, help="images per batch")
    parser.add_argument("--repetitions", type=int, default=500, help="turns, in which both sides take a step")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="file of JSON lines to append to")
    options = parser.parse_args(arguments)
    methods = options.methods.split(",")
    if unknown := set(methods) - set(OPTIONS):
        parser.error(f"--methods: unknown {sorted(unknown)}, expected some of {','.join(OPTIONS)}")
    torch.set_num_threads(1)
    machine = measure.environment(options.device)
    for method in methods:
        difference = largest_difference(method, options.batch, options.device)
        if not difference <= TOLERANCE:
            print(f"{method}: NOT TIMED, the sides differ by {difference:.1e}, expected at most {TOLERANCE:g}")
            return 1
        row = row_of(method, options.batch, times(method, options.batch, options.device, options.repetitions))
        print(
            f"{method:8} least: adapter {row['adapter_ms_min']:7.3f} ms, bare {row['bare_ms_min']:7.3f}, "
            f"overhead {row['overhead_ms_min']:6.3f}   median overhead {row['overhead_ms_median']:6.3f}",
            flush=True,
        )
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a") as file:
                file.write(json.dumps(row | machine) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
