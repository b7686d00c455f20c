"""Swap nn.Conv2d and nn.Linear for QuantConv2d and QuantLinear inside a module of your own."""

import torch
from torch import Tensor, nn

from ttaq.nn import QuantConv2d, Quantizer, QuantLinear


class Net(nn.Module):
    """Any module works; only the two layer types are parameters here, to build it both ways."""

    def __init__(self, conv: type[nn.Conv2d] = nn.Conv2d, linear: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.conv1 = conv(3, 16, 3, padding=1)
        self.conv2 = conv(16, 32, 3, stride=2, padding=1)
        self.head = linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x).relu()).relu()
        return self.head(y.mean((2, 3)))


def main() -> None:
    torch.manual_seed(0)
    images = torch.rand(8, 3, 32, 32)
    plain, quantized = Net(), Net(QuantConv2d, QuantLinear)

    # The same constructor arguments and the same names: the weights of one fit the other.
    quantized.load_state_dict(plain.state_dict())
    print("equal before calibration:", torch.equal(plain(images), quantized(images)))

    # A grid per output channel for each weight, found by its mean squared error.
    for bits in (8, 4, 3):
        for layer in (quantized.conv1, quantized.conv2, quantized.head):
            layer.weight_quantizer = Quantizer(bits, axis=0)
            layer.weight_quantizer.calibrate(layer.weight)
        gap = (quantized(images) - plain(images)).pow(2).mean() / plain(images).var()
        print(f"{bits}-bit weights: error {100 * gap:.3f} % of the output's variance")

    # Gradients pass the rounding straight through, so the quantized module trains like the other.
    quantized(images).square().mean().backward()
    print("gradients arrive:", all(parameter.grad is not None for parameter in quantized.parameters()))


if __name__ == "__main__":
    main()
