"""The residual networks for 32x32 images of He et al., "Deep residual learning for image recognition" (1512.03385),
section 4.2."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from ttaq.errors import InputError
from ttaq.models.normalize import Normalize

__all__ = ["CifarResNet"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PadShortcut(nn.Module):
    """Shortcut without parameters (option A of the paper): every second row and column, zero channels around the old
    ones."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        extra = out_channels - in_channels
        self.before, self.after = extra // 2, extra - extra // 2

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """`relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))`; each ReLU is a module of its own, so that a traced graph
    names it."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = PadShortcut(in_channels, out_channels) if stride != 1 else None
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        y = y + (x if self.shortcut is None else self.shortcut(x))
        return self.relu2(y)  # type: ignore[no-any-return]


class CifarResNet(nn.Module):
    """ResNet of `depth = 6 n + 2` layers: a 3x3 stem, three stages of n basic blocks (width, 2 width, 4 width
    channels; the second and third halve the image), global average, one linear layer.

    Input (N, 3, H, W) in [0, 1]; `mean` and `std` normalise it as the first step. Output: logits (N, num_classes).
    Differentiable everywhere and traceable by torch.fx. Weight names: `conv1 bn1 layer{1,2,3}.i.{conv1,bn1,conv2,bn2}
    linear`. Fresh weights are drawn as in He et al. (1502.01852): normal with variance 2 / fan-in.

    Raises InputError for a depth that is not 6 n + 2 or sizes below 1.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        width: int = 16,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise InputError(
                f"CifarResNet: depth is {depth}, expected 6 n + 2 with n >= 1, such as 8, 20, 32, 44, 56 or 110"
            )
        if num_classes < 1 or width < 1:
            raise InputError(
                f"CifarResNet: num_classes is {num_classes} and width is {width}, expected both at least 1"
            )
        if len(mean) != 3 or len(std) != 3:
            raise InputError(
                f"CifarResNet: got {len(mean)} means and {len(std)} standard deviations, "
                f"expected 3 of each for red, green and blue"
            )
        blocks = (depth - 2) // 6
        self.normalize = Normalize(mean, std)
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(self.normalize(x))))
        y = self.layer3(self.layer2(self.layer1(y)))
        return self.linear(y.mean((2, 3)))  # type: ignore[no-any-return]


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        BasicBlock(in_channels, out_channels, stride),
        *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)),
    )
