"""What a user can hand over by mistake, through the public names: one clear error, nothing lost or half-written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ttaq
from ttaq import CheckpointError, DataError, InputError
from ttaq.data.cifar import read_cifar10
from ttaq_kernels import KernelError, batch_norm, fake_quantize, softmax_entropy


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)]
        return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()


def images(count: int = 4, **options: Any) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0), **options)


def spoiled(value: float) -> Tensor:
    x = images()
    x[2, 1, 3, 3] = value
    return x


def same(one: object, two: object) -> bool:
    """Equal states, bit for bit."""
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    return torch.equal(one, two) if isinstance(one, Tensor) and isinstance(two, Tensor) else one == two


def branching() -> nn.Module:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.sum() > 0 else x

    return Branching()


STREAM = [
    ("not a tensor", lambda: [[0.0]], "list"),
    ("one image without batch", lambda: images()[0], "(3, 8, 8)"),
    ("empty batch", lambda: images(0), "(0, 3, 8, 8)"),
    ("integers", lambda: (images() * 255).to(torch.uint8), "uint8"),
    ("double", lambda: images().double(), "float64"),
    ("two channels", lambda: images()[:, :2], "[B, 2, 8, 8]"),
    ("too small", lambda: images()[:, :, :3, :3], "[B, 3, 3, 3]"),
    ("another device", lambda: images().to("meta"), "meta"),
    ("NaN", lambda: spoiled(float("nan")), "NaN"),
    ("Inf", lambda: spoiled(float("inf")), "Inf"),
]


@pytest.mark.parametrize("method", ["source", "norm", "tent"])
@pytest.mark.parametrize(("make", "says"), [row[1:] for row in STREAM], ids=[row[0] for row in STREAM])
def test_adapters_refuse_images_and_stay_as_they_are(method: str, make: Callable[[], Any], says: str) -> None:
    adapter = ttaq.tta.build(method, network())
    adapter(images())
    before, expected = adapter.state_dict(), copy.deepcopy(adapter)(images(3))
    for call in (adapter, adapter.predict):
        with pytest.raises(InputError) as error:
            call(make())
        assert says in str(error.value)
        assert "expected" in str(error.value) or "cannot take" in str(error.value)
    assert same(adapter.state_dict(), before)
    assert torch.equal(adapter(images(3)), expected)


QUANTIZE: list[tuple[str, Callable[[], Any], str]] = [
    ("no image", lambda: ttaq.quantize(network(), images(0), "W4A4"), "0 images"),
    ("one image", lambda: ttaq.quantize(network(), images(1), "W4A4"), "1 image"),
    ("an empty loader", lambda: ttaq.quantize(network(), [], "W4A4"), "0 images"),
    ("NaN", lambda: ttaq.quantize(network(), spoiled(float("nan")), "W4A4"), "NaN"),
    ("bytes", lambda: ttaq.quantize(network(), images().to(torch.uint8), "W4A4"), "uint8"),
    ("one channel", lambda: ttaq.quantize(network(), images()[:, :1], "W4A4"), "(4, 1, 8, 8)"),
    ("no layer", lambda: ttaq.quantize(nn.Sequential(nn.ReLU()), images(), "W4A4"), "no Conv2d or Linear"),
    ("a branch on values", lambda: ttaq.quantize(branching(), images(), "W4A4"), "cannot trace Branching"),
    ("twice", lambda: ttaq.quantize(ttaq.quantize(network(), images(), "W8A8"), images(), "W4A4"), "already"),
    ("scheme", lambda: ttaq.quantize(network(), images(), "W9A4"), "W9A4"),
    ("method", lambda: ttaq.quantize(network(), images(), "W4A4", "magic"), "magic"),
    ("override", lambda: ttaq.quantize(network(), images(), "W4A4,layer9=W8A8"), "layer9"),
    ("adapter", lambda: ttaq.tta.build("magic", network()), "magic"),
    ("option", lambda: ttaq.tta.build("tent", network(), speed=1), "speed"),
    ("alpha", lambda: ttaq.tta.build("norm", network(), alpha=2.0), "alpha"),
    ("no norm", lambda: ttaq.tta.build("norm", nn.Conv2d(3, 3, 1)), "norm"),
]


@pytest.mark.parametrize(("call", "says"), [row[1:] for row in QUANTIZE], ids=[row[0] for row in QUANTIZE])
def test_models_and_options_that_cannot_be_used(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert says in str(error.value)


OPS: list[tuple[str, Callable[[], Tensor], str]] = [
    ("scale", lambda: fake_quantize(images(), torch.ones(4), torch.zeros(4, dtype=torch.int32), 0, 15, 1), "(3,)"),
    ("zero point", lambda: fake_quantize(images(), torch.ones(1), torch.zeros(1), 0, 15), "int32"),
    ("codes", lambda: fake_quantize(images(), torch.ones(1), torch.zeros(1, dtype=torch.int32), 15, 0), "qmin=15"),
    ("statistics", lambda: batch_norm(images(), None, None, torch.zeros(4), torch.ones(4), 0.5), "(3,)"),
    ("share", lambda: batch_norm(images(), None, None, None, None, 2.0), "alpha"),
    ("logits", lambda: softmax_entropy(torch.zeros(3)), "(3,)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "says"), [row[1:] for row in OPS], ids=[row[0] for row in OPS])
def test_ops_refuse_arguments_that_do_not_fit(call: Callable[[], Tensor], says: str) -> None:
    with pytest.raises(KernelError) as error:
        call()
    assert says in str(error.value)
    assert "expected" in str(error.value)


def test_files_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    adapter = ttaq.tta.build("tent", network())
    ttaq.io.save_state(good, adapter.state_dict())
    whole = good.read_bytes()
    for content in (b"", whole[:20], whole[: len(whole) // 2], whole[:-1], b"not a checkpoint"):
        bad.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"bad\.safetensors"):
            ttaq.io.load_state(bad)
        with pytest.raises(CheckpointError, match=r"bad\.safetensors"):
            ttaq.load_model(bad)
    with pytest.raises(CheckpointError, match="absent"):
        ttaq.load_model(tmp_path / "absent")
    with pytest.raises(DataError, match="absent"):
        read_cifar10(tmp_path / "absent")
    other = network()
    with torch.no_grad():
        other[0].weight.mul_(2)
    for stranger in (ttaq.tta.build("tent", other), ttaq.tta.build("norm", network())):
        before = stranger.state_dict()
        with pytest.raises(CheckpointError, match="expected"):
            stranger.load_state_dict(ttaq.io.load_state(good))
        assert same(stranger.state_dict(), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.safetensors", "good.safetensors"]
