"""What the residual networks share: a stage of blocks, and the shortcut that changes the shape."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

__all__ = ["projection", "stage"]


def stage(
    block: Callable[[int, int, int], nn.Module],
    in_channels: int,
    channels: int,
    out_channels: int,
    count: int,
    stride: int,
) -> nn.Sequential:
    """`count` blocks, each made by `block(channels of its input, channels, stride)` with `out_channels` at its output;
    the first one has the stride."""
    return nn.Sequential(
        block(in_channels, channels, stride), *(block(out_channels, channels, 1) for _ in range(count - 1))
    )


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """A 1x1 convolution and batch norm where the block changes the shape (option B of He et al.), None where it does
    not."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))
