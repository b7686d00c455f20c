"""ResNeXt for 32x32 images (Xie et al., 1611.05431, section 5.3) under RobustBench's weight names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from ttaq.errors import InputError
from ttaq.models.normalize import Normalize
from ttaq.models.residual import projection, stage

__all__ = ["CifarResNeXt"]


class GroupedBottleneck(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolutions around the shortcut. The output has 4 `channels`, the grouped convolution
    `cardinality` groups of `base_width channels / 64`."""

    def __init__(self, in_channels: int, channels: int, stride: int, cardinality: int, base_width: int) -> None:
        super().__init__()
        inner = cardinality * (channels * base_width // 64)
        self.conv_reduce = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn_reduce = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        self.conv_conv = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=cardinality, bias=False)
        self.bn = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.conv_expand = nn.Conv2d(inner, 4 * channels, 1, bias=False)
        self.bn_expand = nn.BatchNorm2d(4 * channels)
        self.downsample = projection(in_channels, 4 * channels, stride)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu2(self.bn(self.conv_conv(self.relu1(self.bn_reduce(self.conv_reduce(x))))))
        y = self.bn_expand(self.conv_expand(y))
        return self.relu3(y + (x if self.downsample is None else self.downsample(x)))  # type: ignore[no-any-return]


class CifarResNeXt(nn.Module):
    """`depth = 9 n + 2` layers: a 3x3 stem of 64 channels, three stages of n grouped bottlenecks (256, 512, 1024
    channels; the second and third halve the image), global average, one linear layer.

    cardinality: groups of the 3x3 convolutions; base_width: channels of one group in the first stage.
    Input (N, 3, H, W) in [0, 1]; `mean` and `std` normalise it as the first step. Output: logits (N, num_classes).
    Differentiable almost everywhere and traceable by torch.fx. Weight names: `conv_1_3x3 bn_1 stage_{1,2,3}.i.{
    conv_reduce,bn_reduce,conv_conv,bn,conv_expand,bn_expand,downsample.0,downsample.1} classifier`. Fresh weights are
    PyTorch's defaults.

    Raises InputError for a depth that is not 9 n + 2 or sizes below 1.
    """

    def __init__(
        self,
        depth: int,
        cardinality: int,
        base_width: int,
        num_classes: int = 10,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        super().__init__()
        if depth < 11 or (depth - 2) % 9:
            raise InputError(f"CifarResNeXt: depth is {depth}, expected 9 n + 2 with n >= 1, such as 11, 20 or 29")
        if min(num_classes, cardinality, base_width) < 1:
            raise InputError(
                f"CifarResNeXt: num_classes is {num_classes}, cardinality {cardinality} and base_width {base_width}, "
                f"expected all at least 1"
            )
        block = partial(GroupedBottleneck, cardinality=cardinality, base_width=base_width)
        blocks = (depth - 2) // 9
        self.normalize = Normalize(mean, std)
        self.conv_1_3x3 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn_1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.stage_1 = stage(block, 64, 64, 256, blocks, stride=1)
        self.stage_2 = stage(block, 256, 128, 512, blocks, stride=2)
        self.stage_3 = stage(block, 512, 256, 1024, blocks, stride=2)
        self.classifier = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn_1(self.conv_1_3x3(self.normalize(x))))
        y = self.stage_3(self.stage_2(self.stage_1(y)))
        return self.classifier(y.mean((2, 3)))  # type: ignore[no-any-return]
