"""The integer expression from its formula, without the code under test."""

from __future__ import annotations

import copy
import random

import numpy as np
import torch
from torch import Tensor, nn

from ttaq.nn import QuantConv2d, QuantLinear


def draw(seed: int) -> random.Random:
    torch.manual_seed(seed)
    return random.Random(seed)


def random_grid_input(shape: tuple[int, ...], bits: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Values on a grid of some zero point, their codes and their scale."""
    zero_point = int(torch.randint(0, 2**bits, ()))
    codes = torch.randint(-zero_point, 2**bits - zero_point, shape).float()
    return codes * torch.tensor(scale), codes, torch.tensor([scale])


def weight_codes(layer: QuantConv2d | QuantLinear) -> Tensor:
    """q - zero_point in float64 from the formula, without the code under test."""
    quantizer = layer.weight_quantizer
    shape = (-1, *[1] * (layer.weight.ndim - 1))
    scale = quantizer.scale.numpy().reshape(shape)
    zero_point = quantizer.zero_point.numpy().reshape(shape)
    inverse = np.float32(1) / scale
    q = np.clip(np.rint(layer.weight.detach().float().numpy() * inverse) + zero_point, quantizer.qmin, quantizer.qmax)
    return torch.from_numpy((q - zero_point).astype(np.float64))


def expected(layer: QuantConv2d | QuantLinear, codes: Tensor, scale: Tensor) -> Tensor:
    """fp32(acc) * (scale_w * scale_a) + bias, with acc summed in float64."""
    exact = copy.deepcopy(layer)
    float_layer = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    exact.weight, exact.bias = nn.Parameter(weight_codes(layer)), None
    acc = float_layer.forward(exact, codes.double()).float()
    shape = (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
    y = acc * (layer.weight_quantizer.scale * scale).view(shape)
    return y if layer.bias is None else y + layer.bias.float().view(shape)
