"""TENT, EATA, SAR and ROID, step by step, against their papers' updates written out in float64.

The statement here shares nothing with the package but the weights: its own batch norm, losses, Adam and SGD.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from tta_cases import CLASSES, batch_norm_net, stream

from ttaq.data.augment import augment
from ttaq.tta import build


def net() -> nn.Sequential:
    """One that is surer of some images than of others."""
    made = batch_norm_net()
    with torch.no_grad():
        made[-1].weight.mul_(12)
    return made


class Statement:
    """The net of `batch_norm_net` with batch statistics, in float64; `theta` are the two norms' weights and biases."""

    def __init__(self, net: nn.Sequential) -> None:
        self.first, norm1, _, self.second, norm2, *_, self.last = net.double()
        self.theta = [t.detach().clone().requires_grad_() for n in (norm1, norm2) for t in (n.weight, n.bias)]
        self.source = [t.detach().clone() for t in self.theta]
        self.moments = [[torch.zeros_like(t), torch.zeros_like(t)] for t in self.source]
        self.steps = 0

    def __call__(self, x: Tensor) -> Tensor:
        def norm(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            mean = h.mean((0, 2, 3), keepdim=True)
            var = ((h - mean) ** 2).mean((0, 2, 3), keepdim=True)
            return (h - mean) / (var + 1e-5).sqrt() * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)

        h = norm(functional.conv2d(x.double(), self.first.weight, padding=1), *self.theta[:2]).relu()
        h = norm(functional.conv2d(h, self.second.weight, self.second.bias, stride=2), *self.theta[2:]).relu()
        return functional.linear(h.mean((2, 3)), self.last.weight, self.last.bias)

    def gradient(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, self.theta))

    @torch.no_grad()
    def adam(self, gradient: list[Tensor], lr: float) -> None:
        self.steps += 1
        for t, g, (first, second) in zip(self.theta, gradient, self.moments, strict=True):
            first.copy_(0.9 * first + 0.1 * g)
            second.copy_(0.999 * second + 0.001 * g * g)
            t -= lr * (first / (1 - 0.9**self.steps)) / ((second / (1 - 0.999**self.steps)).sqrt() + 1e-8)

    @torch.no_grad()
    def sgd(self, gradient: list[Tensor], lr: float) -> None:
        for t, g, (velocity, _) in zip(self.theta, gradient, self.moments, strict=True):
            velocity.copy_(0.9 * velocity + g)
            t -= lr * velocity


def probabilities(z: Tensor) -> Tensor:
    e = (z - z.max(1, keepdim=True).values).exp()
    return e / e.sum(1, keepdim=True)


def entropy(z: Tensor) -> Tensor:
    p = probabilities(z)
    return -(p * p.log()).sum(1)


def tent(s: Statement, x: Tensor, _: dict[str, Any]) -> Tensor:
    z = s(x)
    s.adam(s.gradient(entropy(z).mean()), 1e-2)
    return z


def eata(s: Statement, x: Tensor, memory: dict[str, Any]) -> Tensor:
    if "fisher" not in memory:
        memory["fisher"] = [torch.zeros_like(t) for t in s.source]
        batches = memory["images"].split(64)
        for batch in batches:
            z = s(batch)
            loss = -probabilities(z).log()[torch.arange(len(z)), z.argmax(1)].mean()
            memory["fisher"] = [
                f + g**2 / len(batches) for f, g in zip(memory["fisher"], s.gradient(loss), strict=True)
            ]
    z = s(x)
    p, h = probabilities(z).detach(), entropy(z)
    chosen = []
    for i in range(len(z)):
        if not h[i] < memory["margin"]:
            continue
        m = memory.get("m")
        if m is None or abs(float(m @ p[i] / (m.norm() * p[i].norm()))) < memory["redundancy"]:
            chosen.append(i)
    if chosen:
        loss = torch.stack([torch.exp(memory["margin"] - h[i].detach()) * h[i] for i in chosen]).mean()
        for f, t, t0 in zip(memory["fisher"], s.theta, s.source, strict=True):
            loss = loss + 1.0 * (f * (t - t0) ** 2).sum()
        s.adam(s.gradient(loss), 1e-2)
        new = p[chosen].mean(0)
        memory["m"] = new if memory.get("m") is None else 0.9 * memory["m"] + 0.1 * new
    memory["chosen"] = memory.get("chosen", 0) + len(chosen)
    return z


def sar(s: Statement, x: Tensor, memory: dict[str, Any]) -> Tensor:
    z = s(x)
    reliable = entropy(z) < memory["margin"]
    gradient = s.gradient(entropy(z)[reliable].mean())
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradient))
    here = [t.detach().clone() for t in s.theta]
    with torch.no_grad():
        for t, g in zip(s.theta, gradient, strict=True):
            t += 0.05 * g / (norm + 1e-12)
    h = entropy(s(x))
    chosen = reliable & (h < memory["margin"])
    mean = h[chosen].mean()
    value = float(mean.detach())
    gradient = s.gradient(mean)
    with torch.no_grad():
        for t, start in zip(s.theta, here, strict=True):
            t.copy_(start)
    s.sgd(gradient, 1e-2)
    memory["e"] = value if memory.get("e") is None else 0.9 * memory["e"] + 0.1 * value
    if memory["e"] < memory["reset_below"]:
        memory["e"], memory["resets"] = None, memory.get("resets", 0) + 1
        with torch.no_grad():
            for t, value, (velocity, _) in zip(s.theta, s.source, s.moments, strict=True):
                t.copy_(value)
                velocity.zero_()
    return z


def roid(s: Statement, x: Tensor, memory: dict[str, Any]) -> Tensor:
    z = s(x)
    p = probabilities(z)
    q = memory.get("q", torch.full((CLASSES,), 1 / CLASSES, dtype=torch.float64))

    def to_unit(v: Tensor) -> Tensor:
        return (v - v.min()) / (v.max() - v.min())

    cosine = torch.stack([q @ row / (q.norm() * row.norm()) for row in p.detach()])
    diverse, certain = to_unit(1 - cosine), to_unit(-entropy(z).detach())
    weights = torch.exp(diverse * certain * 3)
    weights[diverse < diverse.mean()] = 0
    clipped = p.clamp(max=0.99)
    ratio = -(clipped * torch.log(clipped / (1 - clipped) + 1e-5)).sum(1)
    view = s(augment(x, torch.Generator().manual_seed(memory["batch"]), padding="reflect", blur=False, noise=0.0))
    r = probabilities(view)
    consistency = -0.5 * (p * r.log()).sum(1) - 0.5 * (r * p.log()).sum(1)
    s.adam(s.gradient((weights * (ratio + consistency)).sum() / len(x)), 1e-2)
    with torch.no_grad():
        for t, t0 in zip(s.theta, s.source, strict=True):
            t.copy_(0.99 * t + 0.01 * t0)
    memory["q"] = 0.9 * q + 0.1 * p.detach().mean(0)
    memory["batch"] += 1
    v = p.detach().mean(0)
    smoothing = max(1 / len(x), 1 / CLASSES) / v.max()
    return z * CLASSES * ((v + smoothing) / (1 + smoothing * CLASSES))  # times C: as `ROID` says


# Margins chosen so that some samples of these small nets are in and some out.
CASES: dict[str, tuple[Callable[..., Tensor], dict[str, Any], dict[str, Any]]] = {
    "tent": (tent, {"lr": 1e-2}, {}),
    "eata": (
        eata,
        {"lr": 1e-2, "entropy_margin": 0.4, "redundancy": 0.99},
        {"margin": 0.4 * math.log(CLASSES), "redundancy": 0.99},
    ),
    "sar": (
        sar,
        {"lr": 1e-2, "entropy_margin": 0.4, "skip_last": 0, "reset_below": 0.453},
        {"margin": 0.4 * math.log(CLASSES), "reset_below": 0.453},
    ),
    "roid": (roid, {"lr": 1e-2}, {"batch": 0}),
}


@pytest.mark.parametrize("name", CASES)
def test_each_step_is_that_of_the_paper(name: str) -> None:
    statement_of, options, memory = CASES[name]
    images = torch.cat(stream(30, seed=98))
    memory = {**memory, "images": images}
    statement = Statement(net())
    adapter = build(name, net(), source_images=images, **options)
    for number, x in enumerate(stream(8, batch=12)):
        expected = statement_of(statement, x, memory)
        torch.testing.assert_close(adapter(x).double(), expected.detach(), rtol=2e-4, atol=2e-5, msg=f"batch {number}")
        learned = [parameter.detach().double() for _, parameter in adapter.parameters_adapted()]
        torch.testing.assert_close(learned, [t.detach() for t in statement.theta], rtol=2e-4, atol=2e-5)
    counters = adapter.counters
    if name == "eata":
        assert 0 < counters["chosen"] == memory["chosen"] < counters["reliable"] < counters["samples"]
    if name == "sar":
        assert 0 < counters["reliable"] < counters["samples"]
        assert 0 < counters["resets"] == memory["resets"] < 8
