"""Residual networks for ImageNet: sizes of the stages, place of the stride, shortcut; against torchvision."""

from __future__ import annotations

import pytest
import torch

from ttaq.models import build
from ttaq.models.resnet import BasicBlock, Bottleneck, ResNet


@pytest.mark.parametrize(("depth", "expansion"), [(18, 1), (50, 4)])
def test_stages_halve_the_image_and_double_the_channels(depth: int, expansion: int) -> None:
    model, shapes = ResNet(depth, width=4).eval(), {}
    for name in ("conv1", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        model.get_submodule(name).register_forward_hook(
            lambda m, i, o, name=name: shapes.update({name: tuple(o.shape)})
        )
    with torch.inference_mode():
        model(torch.rand(1, 3, 64, 96))
    channels = [4 * expansion * 2**stage for stage in range(4)]
    assert shapes == {
        "conv1": (1, 4, 32, 48),
        "maxpool": (1, 4, 16, 24),
        **{f"layer{i + 1}": (1, channels[i], 16 >> i, 24 >> i) for i in range(4)},
    }


def test_bottleneck_has_its_stride_in_the_3x3_convolution() -> None:
    block = Bottleneck(8, 4, 2)
    assert [block.conv1.stride, block.conv2.stride, block.conv3.stride] == [(1, 1), (2, 2), (1, 1)]
    assert block.conv2.kernel_size == (3, 3)


@pytest.mark.parametrize(("block", "last"), [(BasicBlock, "bn2"), (Bottleneck, "bn3")])
def test_a_silent_branch_leaves_the_rectified_shortcut(block: type, last: str) -> None:
    channels = 4 * block.expansion
    same, changed = block(channels, 4, 1).eval(), block(6, 4, 2).eval()
    for module in (same, changed):
        torch.nn.init.zeros_(module.get_submodule(last).weight)
    x = torch.randn(2, channels, 8, 8)
    assert same.downsample is None
    assert torch.equal(same(x), x.relu())
    x = torch.randn(2, 6, 8, 8)
    assert torch.equal(changed(x), changed.downsample(x).relu())
    assert changed(x).shape == (2, channels, 4, 4)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_equals_torchvision(name: str) -> None:
    try:
        import torchvision
    except Exception as error:  # a torchvision made for another torch ends with a RuntimeError
        pytest.skip(f"torchvision cannot be imported: {error}")
    other = torchvision.models.get_model(name, weights=None).eval()
    own = build(name, mean=[0.0] * 3, std=[1.0] * 3).eval()
    assert list(own.state_dict()) == list(other.state_dict())
    own.load_state_dict(other.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(own(x), other(x))
