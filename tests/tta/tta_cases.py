"""Small models, streams and methods that the tests of test-time adaptation share."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ttaq.ptq import quantize
from ttaq.tta import METHODS, Adapter
from ttaq.tta.optimizer import make_optimizer

CLASSES = 5


def batch_norm_net(seed: int = 0) -> nn.Sequential:
    """Conv, batch norm and a classifier, with running statistics that are not those of a new layer."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(4, CLASSES),
    )
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.3)
                layer.running_var.uniform_(0.5, 1.5)
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.normal_(0, 0.3)
    return net.eval()


def group_norm_net(seed: int = 0) -> nn.Sequential:
    """Group norm and layer norm, no batch norm."""
    torch.manual_seed(seed)
    head = (nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LayerNorm(24), nn.Linear(24, CLASSES))
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), *head).eval()


@functools.cache
def _quantized(seed: int) -> nn.Module:
    return quantize(batch_norm_net(seed), torch.cat(stream(seed=99)), "W4A4")


def quantized_net(seed: int = 0) -> nn.Module:
    return copy.deepcopy(_quantized(seed))


def on_batch_statistics(model: nn.Module) -> nn.Module:
    """With torch's own batch norm: what an adapter's is compared with."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.train()
            layer.running_mean, layer.running_var, layer.track_running_stats = None, None, False
    return model


def stream(batches: int = 3, batch: int = 4, seed: int = 1, size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(batch, 3, size, size, generator=generator) for _ in range(batches)]


class Everything(Adapter):
    """A method that uses all that Adapter offers: it learns every parameter and keeps a mean prediction in a buffer.

    State: parameters, momentum, mean prediction, counters.
    """

    method: ClassVar[str] = "everything"

    @torch.inference_mode(False)
    def __init__(self, model: nn.Module, *, lr: float = 0.05, check_finite: bool = True) -> None:
        super().__init__(model, options={"lr": lr}, check_finite=check_finite)
        self.register_buffer("mean", torch.full((CLASSES,), 1 / CLASSES))
        learned = dict(self.model.named_parameters())
        self.adapt(learned, make_optimizer("Everything", learned.values(), "sgd", lr=lr, nesterov=True))

    def step(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        p = logits.float().softmax(1) if logits.dtype == torch.bfloat16 else logits.softmax(1)
        self.update((p * self.mean.to(p.dtype)).sum(1).mean())
        self.mean.mul_(0.9).add_(p.detach().mean(0), alpha=0.1)
        return logits


# The small nets are sure of nothing: without these their images would all be left out.
_ALL_RELIABLE = {"entropy_margin": 2.0, "redundancy": 2.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "cotta": {"augmentations": 2},
    "rotta": {"capacity": 8, "update_every": 4},
    "eta": _ALL_RELIABLE,
    "eata": _ALL_RELIABLE,
    "rdumb": _ALL_RELIABLE,
    "sar": {"entropy_margin": 2.0},
}


def _tested(name: str) -> Callable[..., Adapter]:
    """The method; one that wants images of the source gets some, in the type of its model."""

    def make(model: nn.Module, **options: Any) -> Adapter:
        options = {**OPTIONS.get(name, {}), **options}
        if METHODS[name].source_images and isinstance(model, nn.Module):
            some = next(model.parameters(), torch.zeros(()))
            options["source_images"] = torch.cat(stream(seed=98)).to(some.dtype)
        return METHODS[name](model, **options)

    return make


TESTED: dict[str, Callable[..., Adapter]] = {**{name: _tested(name) for name in METHODS}, "everything": Everything}


def assert_same(got: Any, expected: Any, place: str = "state") -> None:
    """Equal bit for bit, all the way down."""
    assert type(got) is type(expected), place
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), place
        for key in expected:
            assert_same(got[key], expected[key], f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(got) == len(expected), place
        for index, (one, other) in enumerate(zip(got, expected, strict=True)):
            assert_same(one, other, f"{place}[{index}]")
    elif isinstance(expected, Tensor):
        assert got.dtype == expected.dtype, place
        assert torch.equal(got, expected), f"{place} differs by up to {(got - expected).abs().max()}"
    else:
        assert got == expected, place
