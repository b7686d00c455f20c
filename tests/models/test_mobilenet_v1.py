"""MobileNetV1: padding, strides, constants, and the accuracy of the published weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from imagenet_accuracy import count_correct
from torch import nn

from ttaq.models import infer_kwargs
from ttaq.models.mobilenet_v1 import MobileNetV1


def test_stride_two_pads_right_and_bottom_only() -> None:
    model = MobileNetV1(width=1, mean=[0.0] * 3, std=[1.0] * 3)
    pad, convolution = model.conv1[0], model.conv1[1]
    with torch.no_grad():
        convolution.weight.fill_(1.0)
    x = torch.arange(36.0).view(6, 6).expand(1, 3, 6, 6)
    y = convolution(pad(x))[0, 0] / 3
    image = x[0, 0]
    assert y.shape == (3, 3)
    assert y[0, 0] == image[0:3, 0:3].sum()
    assert y[1, 2] == image[2:5, 4:6].sum()
    assert y[2, 2] == image[4:6, 4:6].sum()


def test_strides_channels_and_constants() -> None:
    model = MobileNetV1(width=24)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 27
    assert [i for i, block in enumerate(model.blocks) if block[0][0].__class__ is nn.ZeroPad2d] == [1, 3, 5, 11]
    assert [block[1][0].out_channels for block in model.blocks] == [48, 96, 96, 192, 192, *[384] * 6, 768, 768]
    assert all(convolution.groups in (1, convolution.in_channels) for convolution in convolutions)
    assert {module.eps for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {1e-3}
    assert sum(isinstance(module, nn.ReLU6) for module in model.modules()) == 27
    assert infer_kwargs("mobilenet_v1", model.state_dict()) == {"num_classes": 1000, "width": 24}


# 78.08 % of the 1,300 are 1,015; the 100 are every 13th.
@pytest.mark.parametrize(
    ("step", "expected"), [pytest.param(13, 74, id="100"), pytest.param(1, 1015, id="1300", marks=pytest.mark.slow)]
)
def test_published_weights_on_real_images(data_folder: Path, step: int, expected: int) -> None:
    assert abs(count_correct(data_folder, "mobilenet_v1", "imagenet_mobilenetv1_0.75", step) - expected) <= 1
