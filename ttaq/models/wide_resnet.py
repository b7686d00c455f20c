"""Wide residual networks for 32x32 images (Zagoruyko and Komodakis, 1605.07146) under RobustBench's weight names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from ttaq.errors import InputError
from ttaq.models.normalize import Normalize
from ttaq.models.residual import stage

__all__ = ["WideResNet"]


class PreActivationBlock(nn.Module):
    """`conv2(relu(bn2(conv1(a)))) + shortcut` with `a = relu(bn1(x))`.

    The shortcut is x where the number of channels stays, and a 1x1 convolution of a where it changes.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        changes = stride != 1 or in_channels != channels
        self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        y = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return y + (x if self.convShortcut is None else self.convShortcut(activated))  # type: ignore[no-any-return]


class WideResNet(nn.Module):
    """`depth = 6 n + 4` layers: a 3x3 stem of 16 channels, three stages of n pre-activation blocks (16, 32, 64 times
    `widen` channels; the second and third halve the image), batch norm, ReLU, global average, one linear layer.

    Input (N, 3, H, W) in [0, 1]; `mean` and `std` normalise it as the first step, by default not at all (RobustBench's
    `Standard`). Output: logits (N, num_classes). Differentiable almost everywhere and traceable by torch.fx. Weight
    names: `conv1 block{1,2,3}.layer.i.{bn1,conv1,bn2,conv2,convShortcut} bn1 fc`. Without dropout: for weights that
    are trained already. Fresh weights are PyTorch's defaults.

    Raises InputError for a depth that is not 6 n + 4 or sizes below 1.
    """

    def __init__(
        self,
        depth: int,
        widen: int,
        num_classes: int = 10,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise InputError(f"WideResNet: depth is {depth}, expected 6 n + 4 with n >= 1, such as 10, 16, 28 or 40")
        if num_classes < 1 or widen < 1:
            raise InputError(f"WideResNet: num_classes is {num_classes} and widen is {widen}, expected both at least 1")
        blocks = (depth - 4) // 6
        self.normalize = Normalize(mean, std)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = _group(16, 16 * widen, blocks, stride=1)
        self.block2 = _group(16 * widen, 32 * widen, blocks, stride=2)
        self.block3 = _group(32 * widen, 64 * widen, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(64 * widen, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block3(self.block2(self.block1(self.conv1(self.normalize(x)))))
        return self.fc(self.relu(self.bn1(y)).mean((2, 3)))  # type: ignore[no-any-return]


def _group(in_channels: int, channels: int, count: int, stride: int) -> nn.Sequential:
    """A stage under the name that the weights have."""
    blocks = stage(PreActivationBlock, in_channels, channels, channels, count, stride)
    return nn.Sequential(OrderedDict(layer=blocks))
