"""Wide residual networks: pre-activation, shortcuts, layers."""

from __future__ import annotations

import torch
from torch import nn

from ttaq.models.wide_resnet import PreActivationBlock, WideResNet


def test_shortcut_reads_the_activated_input_only_where_the_shape_changes() -> None:
    same, changed = PreActivationBlock(4, 4, 1).eval(), PreActivationBlock(4, 6, 2).eval()
    for block in (same, changed):
        nn.init.zeros_(block.conv2.weight)
        nn.init.constant_(block.bn1.bias, 0.25)
    x = torch.randn(2, 4, 8, 8)
    assert same.convShortcut is None
    assert torch.equal(same(x), x)
    assert torch.equal(changed(x), changed.convShortcut(changed.bn1(x).relu()))
    assert changed(x).shape == (2, 6, 4, 4)


def test_branch_is_two_normalised_convolutions() -> None:
    block = PreActivationBlock(4, 4, 1).eval()
    x = torch.randn(2, 4, 8, 8)
    expected = x + block.conv2(block.bn2(block.conv1(block.bn1(x).relu())).relu())
    assert torch.equal(block(x), expected)


def test_depth_counts_the_layers_and_stages_halve_the_image() -> None:
    model, shapes = WideResNet(16, 2).eval(), {}
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m.weight.shape[-1] != 1]
    # Without the 1x1 shortcuts; the count of the paper includes those three instead of stem and last layer.
    assert len(layers) == 16 - 2
    for name in ("block1", "block2", "block3"):
        model.get_submodule(name).register_forward_hook(
            lambda m, i, o, name=name: shapes.update({name: tuple(o.shape)})
        )
    with torch.inference_mode():
        model(torch.rand(1, 3, 32, 24))
    assert shapes == {"block1": (1, 32, 32, 24), "block2": (1, 64, 16, 12), "block3": (1, 128, 8, 6)}
