"""The CIFAR residual networks: sizes, shapes, shortcut, tracing, and the accuracy of published weights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.fx
from torch import nn

from ttaq.data import cifar_split, read_cifar10, to_float
from ttaq.errors import InputError
from ttaq.io import load_weights
from ttaq.models import NAMES, CifarResNet, Normalize, build, infer_kwargs
from ttaq.models.cifar_resnet import PadShortcut

# Table 6 of He et al. gives 0.27, 0.46, 0.66, 0.85 and 1.7 million.
PARAMETERS = {8: 75_290, 20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962}


@pytest.mark.parametrize(("depth", "count"), PARAMETERS.items())
def test_number_of_parameters(depth: int, count: int) -> None:
    model = build(f"cifar_resnet{depth}")
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth


def test_every_name_is_tested() -> None:
    assert {name for name in NAMES if name.startswith("cifar_resnet")} == {
        f"cifar_resnet{depth}" for depth in PARAMETERS
    }


def test_stages_halve_the_image_and_double_the_channels() -> None:
    model = CifarResNet(8, num_classes=7, width=4).eval()
    shapes = {}
    for name in ("layer1", "layer2", "layer3"):
        model.get_submodule(name).register_forward_hook(
            lambda m, i, o, name=name: shapes.update({name: tuple(o.shape)})
        )
    with torch.inference_mode():
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)
        assert model(torch.rand(1, 3, 40, 24)).shape == (1, 7)
        model(torch.rand(2, 3, 32, 32))
    assert shapes == {"layer1": (2, 4, 32, 32), "layer2": (2, 8, 16, 16), "layer3": (2, 16, 8, 8)}


def test_shortcut_takes_every_second_pixel_and_centres_the_channels() -> None:
    x = torch.rand(2, 4, 6, 6)
    y = PadShortcut(4, 8)(x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


def test_normalize_is_in_front_and_outside_the_state() -> None:
    mean, std = [0.1, 0.2, 0.3], [0.5, 1.0, 2.0]
    x = torch.rand(2, 3, 4, 4)
    expected = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(Normalize(mean, std)(x), expected)
    raw, normalized = CifarResNet(8, mean=[0.0] * 3, std=[1.0] * 3).eval(), CifarResNet(8, mean=mean, std=std).eval()
    assert not any("normalize" in name for name in normalized.state_dict())
    raw.load_state_dict(normalized.state_dict())
    torch.testing.assert_close(normalized(x), raw(expected))
    assert not torch.allclose(raw(x), raw(expected))


def test_trace_gives_the_same_numbers_and_no_repeated_module() -> None:
    model = build("cifar_resnet8").eval()
    graph = torch.fx.symbolic_trace(model)
    x = torch.rand(3, 3, 32, 32)
    assert torch.equal(graph(x), model(x))
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert len(called) == len(set(called))


def test_gradients_reach_every_parameter() -> None:
    model = build("cifar_resnet8")
    model(torch.rand(4, 3, 32, 32)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_build_is_a_function_of_the_seed() -> None:
    torch.manual_seed(3)
    first = build("cifar_resnet8")
    torch.manual_seed(3)
    second = build("cifar_resnet8")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    scale = first.get_parameter("layer3.0.conv2.weight").std()
    assert abs(scale - (2 / (64 * 9)) ** 0.5) < 0.002


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CifarResNet(21), "depth is 21, expected 6 n"),
        (lambda: CifarResNet(2), "depth is 2, expected 6 n"),
        (lambda: CifarResNet(8, num_classes=0), "num_classes is 0"),
        (lambda: CifarResNet(8, width=0), "width is 0"),
        (lambda: build("resnet20"), "no architecture is named 'resnet20'; there are cifar_resnet8, cifar_resnet20"),
        (lambda: build("cifar_resnet8", classes=10), "has no option classes; its options are num_classes"),
        (lambda: build("cifar_resnet8", num_classes="ten"), "cannot be built with"),
        (lambda: build("cifar_resnet8", num_classes=2.5), "cannot be built with"),
        (lambda: build("cifar_resnet8", mean=["a", "b", "c"]), "cannot be built with"),
        (lambda: build("cifar_resnet8", mean=[0.5]), "got 1 means and 3 standard deviations, expected 3 of each"),
        (lambda: infer_kwargs("resnet20", {}), "no architecture is named"),
        (lambda: Normalize([0.5], [0.5, 0.5]), "got 1 means and 2 standard deviations"),
        (lambda: Normalize([], []), "got 0 means"),
        (lambda: Normalize([0.5], [0.0]), "expected finite and positive"),
        (lambda: Normalize([0.5], [float("nan")]), "expected finite and positive"),
        (lambda: Normalize([float("inf")], [1.0]), "expected finite and positive"),
    ],
)
def test_errors(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_shapes_of_weights_tell_the_options() -> None:
    assert infer_kwargs("cifar_resnet8", CifarResNet(8, num_classes=7, width=4).state_dict()) == {
        "num_classes": 7,
        "width": 4,
    }
    assert infer_kwargs("cifar_resnet8", {}) == {}


@pytest.fixture(scope="module")
def data() -> Path:
    if "TTAQ_DATA" not in os.environ:
        pytest.skip("TTAQ_DATA is not set: it names the folder with real images and weights")
    return Path(os.environ["TTAQ_DATA"])


def correct(data: Path, depth: int, count: int) -> int:
    model = load_weights(f"cifar_resnet{depth}", data / "models" / f"cifar10_resnet{depth}.safetensors")
    test = read_cifar10(data)
    batches = zip(test.images[:count].split(250), test.labels[:count].split(250), strict=True)
    with torch.inference_mode():
        return sum(int((model(to_float(images)).argmax(1) == labels).sum()) for images, labels in batches)


# Counted on the first 1,000 test images in fp32.
@pytest.mark.parametrize(("depth", "expected"), [(20, 915), (32, 928)])
def test_published_weights_on_the_first_test_images(data: Path, depth: int, expected: int) -> None:
    assert abs(correct(data, depth, 1000) - expected) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "published"), [(20, 91.73), (32, 92.63)])
def test_published_accuracy_on_all_test_images(data: Path, depth: int, published: float) -> None:
    assert len(cifar_split("all")) == 10_000
    assert abs(correct(data, depth, 10_000) - round(published * 100)) <= 1
