"""ResNeXt for small images: groups, widths, shortcut."""

from __future__ import annotations

import torch
from torch import nn

from ttaq.models import build
from ttaq.models.resnext_cifar import GroupedBottleneck


def test_29_layers_in_groups_of_the_published_widths() -> None:
    with torch.device("meta"):
        model = build("resnext29_4x32d")
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 29 + 3  # the three projections are not counted in the name
    grouped = [m for m in layers if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert [(m.groups, m.in_channels, m.out_channels) for m in grouped] == [
        *[(4, 128, 128)] * 3,
        *[(4, 256, 256)] * 3,
        *[(4, 512, 512)] * 3,
    ]
    assert [m.stride[0] for m in grouped] == [1, 1, 1, 2, 1, 1, 2, 1, 1]


def test_a_silent_branch_leaves_the_rectified_shortcut() -> None:
    same, changed = GroupedBottleneck(16, 4, 1, 2, 32).eval(), GroupedBottleneck(6, 4, 2, 2, 32).eval()
    for block in (same, changed):
        nn.init.zeros_(block.bn_expand.weight)
    x = torch.randn(2, 16, 8, 8)
    assert same.downsample is None
    assert torch.equal(same(x), x.relu())
    x = torch.randn(2, 6, 8, 8)
    assert torch.equal(changed(x), changed.downsample(x).relu())
    assert changed(x).shape == (2, 16, 4, 4)
