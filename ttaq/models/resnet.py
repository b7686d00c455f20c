"""The residual networks for ImageNet of He et al. (1512.03385), table 1, under torchvision's weight names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ttaq.errors import InputError
from ttaq.models.cifar_resnet import IMAGENET_MEAN, IMAGENET_STD
from ttaq.models.normalize import Normalize
from ttaq.models.residual import projection, stage

__all__ = ["ResNet"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around the shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = projection(in_channels, channels, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + (x if self.downsample is None else self.downsample(x)))  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around the shortcut; the 3x3 has the stride, as in torchvision ("v1.5")."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.downsample = projection(in_channels, 4 * channels, stride)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))
        y = self.bn3(self.conv3(y))
        return self.relu3(y + (x if self.downsample is None else self.downsample(x)))  # type: ignore[no-any-return]


# Block and number of blocks in each of the four stages.
_DEPTHS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}


class ResNet(nn.Module):
    """A 7x7 stem with max pooling, four stages of residual blocks, global average, one linear layer.

    depth: 18 or 34 (basic blocks), 50 or 101 (bottlenecks). width: channels of the stem and of the first stage.
    Input (N, 3, H, W) in [0, 1]; `mean` and `std` normalise it as the first step. Output: logits (N, num_classes).
    Differentiable almost everywhere and traceable by torch.fx. Weight names: `conv1 bn1 layer{1,2,3,4}.i.{conv1,bn1,
    conv2,bn2,conv3,bn3,downsample.0,downsample.1} fc`. Fresh weights are PyTorch's defaults.

    Raises InputError for another depth or sizes below 1.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 1000,
        width: int = 64,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        if depth not in _DEPTHS:
            raise InputError(f"ResNet: depth is {depth}, expected one of {', '.join(map(str, _DEPTHS))}")
        if num_classes < 1 or width < 1:
            raise InputError(f"ResNet: num_classes is {num_classes} and width is {width}, expected both at least 1")
        block, blocks = _DEPTHS[depth]
        outputs = [block.expansion * width * 2**index for index in range(4)]
        self.normalize = Normalize(mean, std)
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = stage(block, width, width, outputs[0], blocks[0], stride=1)
        self.layer2 = stage(block, outputs[0], 2 * width, outputs[1], blocks[1], stride=2)
        self.layer3 = stage(block, outputs[1], 4 * width, outputs[2], blocks[2], stride=2)
        self.layer4 = stage(block, outputs[2], 8 * width, outputs[3], blocks[3], stride=2)
        self.fc = nn.Linear(outputs[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.maxpool(self.relu(self.bn1(self.conv1(self.normalize(x)))))
        y = self.layer4(self.layer3(self.layer2(self.layer1(y))))
        return self.fc(y.mean((2, 3)))  # type: ignore[no-any-return]
