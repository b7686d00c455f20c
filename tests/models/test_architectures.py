"""What every architecture of the registry keeps: its published size, weight names, tracing, normalisation, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.fx
from torch import nn

from ttaq.errors import InputError
from ttaq.models import NAMES, build, infer_kwargs
from ttaq.models.mobilenet_v1 import MobileNetV1
from ttaq.models.resnet import ResNet
from ttaq.models.resnext_cifar import CifarResNeXt
from ttaq.models.vit import VisionTransformer
from ttaq.models.wide_resnet import WideResNet

# torchvision, timm and the papers: 11.7M 21.8M 25.6M 44.5M; 36.5M 2.2M; 5.7M 22.1M 86.6M; MobileNetV1 4.2M.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "wrn28_10": 36_479_194,
    "wrn40_2": 2_243_546,
    "resnext29_4x32d": 6_807_882,
    "mobilenet_v1": 4_231_976,
    "deit_tiny": 5_717_416,
    "deit_small": 22_050_664,
    "deit_base": 86_567_656,
    "vit_tiny": 5_717_416,
    "vit_small": 22_050_664,
    "vit_base": 86_567_656,
}
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALVES = ([0.5] * 3, [0.5] * 3)
STATISTICS = {
    "wrn28_10": ([0.0] * 3, [1.0] * 3),
    **dict.fromkeys(("wrn40_2", "resnext29_4x32d", "mobilenet_v1", "vit_tiny", "vit_small", "vit_base"), HALVES),
}
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# Per architecture: the modules with weights outside the repeated blocks, and those of one block.
OUTSIDE = {
    "resnet": ({"conv1", "bn1", "fc"}, "layer2.0.", {"conv1", "bn1", "conv2", "bn2", "downsample.0", "downsample.1"}),
    "resnet50": (
        {"conv1", "bn1", "fc"},
        "layer1.0.",
        {"conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "downsample.0", "downsample.1"},
    ),
    "wrn": ({"conv1", "bn1", "fc"}, "block2.layer.0.", {"bn1", "conv1", "bn2", "conv2", "convShortcut"}),
    "resnext": (
        {"conv_1_3x3", "bn_1", "classifier"},
        "stage_1.0.",
        {
            *("conv_reduce", "bn_reduce", "conv_conv", "bn", "conv_expand", "bn_expand"),
            *("downsample.0", "downsample.1"),
        },
    ),
    "mobilenet": ({"conv1.1", "conv1.2", "fc"}, "blocks.1.", {"0.1", "0.2", "1.0", "1.1"}),
    "vit": (
        {"cls_token", "pos_embed", "patch_embed.proj", "norm", "head"},
        "blocks.1.",
        {"norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"},
    ),
}
SMALL: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "resnet": (lambda **options: ResNet(18, num_classes=5, width=4, **options), 64),
    "resnet50": (lambda **options: ResNet(50, num_classes=5, width=4, **options), 64),
    "wrn": (lambda **options: WideResNet(10, 1, num_classes=5, **options), 16),
    "resnext": (lambda **options: CifarResNeXt(11, 2, 4, num_classes=5, **options), 16),
    "mobilenet": (lambda **options: MobileNetV1(num_classes=5, width=4, **options), 64),
    "vit": (lambda **options: VisionTransformer(12, 2, 3, num_classes=5, image_size=16, patch_size=4, **options), 16),
}


def test_every_name_is_tested() -> None:
    assert {name for name in NAMES if not name.startswith("cifar_resnet")} == set(PARAMETERS)


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_number_of_parameters(name: str, count: int) -> None:
    with torch.device("meta"):
        model = build(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


# The large ones share class and entry with small ones.
@pytest.mark.parametrize("name", sorted(set(PARAMETERS) - {"resnet101", "deit_base", "vit_base"}))
def test_statistics_and_number_of_classes(name: str) -> None:
    model = build(name, num_classes=3)
    mean, std = STATISTICS.get(name, IMAGENET)
    buffers = dict(model.named_buffers())
    torch.testing.assert_close(buffers["normalize.mean"].flatten(), torch.tensor(mean))
    torch.testing.assert_close(buffers["normalize.std"].flatten(), torch.tensor(std))
    inferred = infer_kwargs(name, model.state_dict())
    assert inferred["num_classes"] == 3
    assert infer_kwargs(name, build(name, **inferred).state_dict()) == inferred
    assert infer_kwargs(name, {}) == {}


@pytest.mark.parametrize("name", OUTSIDE)
def test_weight_names(name: str) -> None:
    outside, prefix, inside = OUTSIDE[name]
    model = SMALL[name][0]()
    owners = {key.rpartition(".")[0] if "." in key else key for key in model.state_dict()}
    repeated = ("layer", "block", "stage")
    assert {owner for owner in owners if not owner.startswith(repeated)} == outside
    assert {owner.removeprefix(prefix) for owner in owners if owner.startswith(prefix)} == inside
    for owner, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert {f"{owner}.{part}" for part in BATCH_NORM} <= set(model.state_dict())


@pytest.mark.parametrize("name", SMALL)
def test_trace_gives_the_same_numbers_and_no_repeated_module(name: str) -> None:
    make, size = SMALL[name]
    model = make().eval()
    graph = torch.fx.symbolic_trace(model)
    for batch in (1, 3):
        x = torch.rand(batch, 3, size, size)
        assert model(x).shape == (batch, 5)
        assert torch.equal(graph(x), model(x))
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert len(called) == len(set(called))
    used = {key for key, module in model.named_modules() if not list(module.children())} - {"normalize"}
    assert used == set(called)


@pytest.mark.parametrize("name", SMALL)
def test_normalisation_is_in_front_and_gradients_reach_every_parameter(name: str) -> None:
    make, size = SMALL[name]
    mean, std = [0.1, 0.2, 0.3], [0.5, 1.0, 2.0]
    raw, normalized = make(mean=[0.0] * 3, std=[1.0] * 3), make(mean=mean, std=std)
    assert not any("normalize" in key for key in normalized.state_dict())
    raw.load_state_dict(normalized.state_dict())
    # In training mode: with fresh source statistics the signal of a deep net without shortcuts fades away.
    x = torch.rand(2, 3, size, size)
    shifted = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(normalized(x), raw(shifted))
    assert not torch.allclose(raw(x), raw(shifted))
    normalized(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in normalized.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet(20), "ResNet: depth is 20, expected one of 18, 34, 50, 101"),
        (lambda: ResNet(18, width=0), "width is 0, expected both at least 1"),
        (lambda: WideResNet(11, 2), "WideResNet: depth is 11, expected 6 n"),
        (lambda: WideResNet(4, 2), "depth is 4, expected 6 n"),
        (lambda: WideResNet(10, 0), "widen is 0"),
        (lambda: CifarResNeXt(28, 4, 32), "CifarResNeXt: depth is 28, expected 9 n"),
        (lambda: CifarResNeXt(29, 0, 32), "cardinality 0"),
        (lambda: MobileNetV1(num_classes=0), "MobileNetV1: num_classes is 0"),
        (lambda: VisionTransformer(12, 0, 3), "VisionTransformer: width is 12, depth 0"),
        (lambda: VisionTransformer(10, 1, 3), "width is 10, expected a multiple of the 3 heads"),
        (
            lambda: VisionTransformer(12, 1, 3, image_size=225),
            "image_size is 225, expected a multiple of patch_size 16",
        ),
        (lambda: build("resnet18", depth=50), "resnet18 has no option depth; its options are num_classes, width"),
        (lambda: build("wrn28_10", widen=2), "wrn28_10 has no option widen; its options are num_classes, mean, std"),
        (lambda: build("mobilenet_v1", num_classes="ten"), "mobilenet_v1 cannot be built with"),
        (lambda: build("no_such_net"), "there are .*vit_base, timm:NAME, torchvision:NAME"),
    ],
)
def test_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
