"""MobileNetV1 (Howard et al., 1704.04861) as Keras stores it: TensorFlow padding, separate batch norm, ReLU6."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ttaq.errors import InputError
from ttaq.models.normalize import Normalize

__all__ = ["MobileNetV1"]

_EPS = 1e-3
# Output channels as multiples of the stem's, and stride, of the 13 blocks (table 1 of the paper).
_BLOCKS = ((2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (16, 2), *((16, 1),) * 5, (32, 2), (32, 1))


class MobileNetV1(nn.Module):
    """A 3x3 stem, 13 blocks of a depthwise 3x3 and a 1x1 convolution, each with batch norm (eps 1e-3) and ReLU6, global
    average, one linear layer.

    width: channels of the stem, 32 alpha: 24 for alpha 0.75. Where the stride is 2 the image is padded on the right and
    at the bottom only, as TensorFlow's "same" does for even sizes; the pad is a module, so the names after it shift by
    one.

    Input (N, 3, H, W) in [0, 1]; `mean` and `std` normalise it as the first step, by default to [-1, 1]. Output: logits
    (N, num_classes). Differentiable almost everywhere and traceable by torch.fx. Weight names: `conv1.{1,2}
    blocks.i.{0,1}.{0,1} fc`, and `blocks.i.0.{1,2}` where the stride is 2. Fresh weights are PyTorch's defaults.

    Raises InputError for sizes below 1.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width: int = 32,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        super().__init__()
        if num_classes < 1 or width < 1:
            raise InputError(
                f"MobileNetV1: num_classes is {num_classes} and width is {width}, expected both at least 1"
            )
        self.normalize = Normalize(mean, std)
        self.conv1 = _convolution(3, width, 3, stride=2)
        inputs = (1, *(multiple for multiple, _ in _BLOCKS))
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    _convolution(before * width, before * width, 3, stride, groups=before * width),
                    _convolution(before * width, after * width, 1),
                )
                for before, (after, stride) in zip(inputs, _BLOCKS, strict=False)
            )
        )
        self.fc = nn.Linear(32 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(self.conv1(self.normalize(x)))
        return self.fc(y.mean((2, 3)))  # type: ignore[no-any-return]


def _convolution(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    uneven = [nn.ZeroPad2d((0, 1, 0, 1))] if stride == 2 else []
    padding = 0 if uneven else kernel // 2
    return nn.Sequential(
        *uneven,
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels, eps=_EPS),
        nn.ReLU6(),
    )
