"""Tent against steps worked by hand in float64, and on the kinds of model it adapts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tta_cases import CLASSES, batch_norm_net, group_norm_net, quantized_net, stream

from ttaq.errors import InputError
from ttaq.tta import Tent

IMAGES = torch.tensor([0.0, 2.0]).view(2, 1, 1, 1)


def _two_layers() -> nn.Sequential:
    """Pixel x -> (x, -x) -> batch norm (weights 1, biases 0.5 and 0, eps 3) -> two logits.

    IMAGES give each channel variance 1, so the normalised channels are (-1/2, 1/2) for the first image and (1/2, -1/2)
    for the second. An image's entropy h depends on the gap of its two logits only: with weights a, b and biases u, v
    the gaps are d1 = (a + b)/2 - u + v and d2 = (a + b)/2 + u - v, and h'(d) = -d sigmoid(d) sigmoid(-d).
    """
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2, eps=3.0), nn.Flatten(), nn.Linear(2, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
        net[1].bias.copy_(torch.tensor([0.5, 0.0]))
        net[3].weight.copy_(torch.eye(2))
        net[3].bias.zero_()
    return net


def _slope(gap: float) -> float:
    return -gap / (1 + math.exp(-gap)) / (1 + math.exp(gap))


def _gradient(a: float, b: float, u: float, v: float) -> list[float]:
    """Of the mean entropy of IMAGES, for weights a, b and biases u, v."""
    first, second = _slope((a + b) / 2 - u + v), _slope((a + b) / 2 + u - v)
    return [(first + second) / 4] * 2 + [(second - first) / 2, (first - second) / 2]


def _learned(tent: Tent) -> list[float]:
    return [value for _, parameter in tent.parameters_adapted() for value in parameter.tolist()]


def test_two_steps_by_hand_with_sgd() -> None:
    lr, momentum = 0.5, 0.9
    tent = Tent(_two_layers(), lr=lr, optimizer="sgd", momentum=momentum)
    values, velocity = [1.0, 1.0, 0.5, 0.0], [0.0] * 4
    for _ in range(2):
        a, b, u, v = values
        # Scored before the update.
        expected = torch.tensor([[-a / 2 + u, b / 2 + v], [a / 2 + u, -b / 2 + v]])
        torch.testing.assert_close(tent(IMAGES), expected, rtol=1e-6, atol=1e-6)
        velocity = [momentum * old + new for old, new in zip(velocity, _gradient(*values), strict=True)]
        values = [value - lr * step for value, step in zip(values, velocity, strict=True)]
        assert _learned(tent) == pytest.approx(values, rel=1e-6, abs=1e-7)
    # The first gradient in plain numbers: the slopes are -0.117502 at gap 0.5 and -0.223720 at gap 1.5.
    assert _gradient(1, 1, 0.5, 0) == pytest.approx([-0.085305, -0.085305, -0.053109, 0.053109], abs=1e-6)


def test_two_steps_by_hand_with_adam() -> None:
    lr = 0.01
    tent = Tent(_two_layers(), lr=lr)
    values, first, second = [1.0, 1.0, 0.5, 0.0], [0.0] * 4, [0.0] * 4
    for step in (1, 2):
        tent(IMAGES)
        gradient = _gradient(*values)
        first = [0.9 * m + 0.1 * g for m, g in zip(first, gradient, strict=True)]
        second = [0.999 * s + 0.001 * g * g for s, g in zip(second, gradient, strict=True)]
        values = [
            value - lr * (m / (1 - 0.9**step)) / (math.sqrt(s / (1 - 0.999**step)) + 1e-8)
            for value, m, s in zip(values, first, second, strict=True)
        ]
        assert _learned(tent) == pytest.approx(values, rel=1e-6)


def _entropy(logits: Tensor) -> float:
    p = logits.softmax(1)
    return float(-(p * p.log()).sum(1).mean())


@pytest.mark.parametrize("net", [batch_norm_net, group_norm_net, quantized_net])
@pytest.mark.parametrize("options", [{"lr": 0.1}, {"lr": 1.0, "optimizer": "sgd"}])
def test_entropy_of_a_repeated_batch_falls(net: Any, options: dict[str, Any]) -> None:
    tent = Tent(net(), **options)
    x = stream(1, 16)[0]
    entropies = [_entropy(tent(x)) for _ in range(20)]
    assert entropies[-1] < 0.99 * entropies[0] <= 0.99 * math.log(CLASSES)


def test_learns_the_affine_of_every_norm_and_nothing_else() -> None:
    names = [name for name, _ in Tent(group_norm_net()).parameters_adapted()]
    assert names == ["1.weight", "1.bias", "5.weight", "5.bias"]
    names = [name for name, _ in Tent(batch_norm_net()).parameters_adapted()]
    assert names == ["1.weight", "1.bias", "4.weight", "4.bias"]


def test_every_norm_of_a_quantized_model_gets_a_gradient() -> None:
    tent = Tent(quantized_net(), lr=0.01)
    before = {name: parameter.detach().clone() for name, parameter in tent.parameters_adapted()}
    tent(stream(1, 16)[0])
    assert len(before) == 4
    assert all(not torch.equal(parameter, before[name]) for name, parameter in tent.parameters_adapted())


def test_uses_the_statistics_of_the_batch() -> None:
    x = stream(1, 8)[0]
    net = batch_norm_net()
    shifted = Tent(net).predict(3 * x - 1)  # batch norm behind a linear layer removes gain; the zero padding remains
    for layer in net:
        layer.train(isinstance(layer, nn.BatchNorm2d))
    torch.testing.assert_close(shifted, net(3 * x - 1).detach(), rtol=1e-5, atol=1e-5)


def test_one_value_per_channel_learns_the_bias_only() -> None:
    tent = Tent(_two_layers(), lr=0.1, optimizer="sgd")
    assert tent(IMAGES[:1]).tolist() == [[0.5, 0.0]]
    weight, bias = (parameter for _, parameter in tent.parameters_adapted())
    assert weight.tolist() == [1, 1]
    assert bias[0] > 0.5
    assert bias[1] < 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0, expected a finite number >= 0"),
        ({"lr": float("inf")}, "lr is inf"),
        ({"lr": "1e-3"}, "lr is '1e-3'"),
        ({"optimizer": "adamw"}, "optimizer is 'adamw', expected 'adam' or 'sgd'"),
        ({"optimizer": "sgd", "momentum": 1.0}, "momentum is 1.0"),
        ({"nesterov": True}, "nesterov is set with optimizer 'adam'"),
        (
            {"optimizer": "sgd", "momentum": 0.0, "nesterov": True},
            "nesterov is set with optimizer 'sgd' and momentum 0",
        ),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^Tent: {message}"):
        Tent(batch_norm_net(), **options)


def test_a_model_without_norm_parameters_is_refused() -> None:
    for net in (
        nn.Sequential(nn.Flatten(), nn.Linear(3, 2)),
        nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Flatten()),
    ):
        with pytest.raises(InputError, match="Tent: the model has no weight or bias in a batch, layer or group norm"):
            Tent(net)


def test_batch_norm_that_cannot_take_batch_statistics_is_refused_by_name() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 2))
    with pytest.raises(
        InputError, match=r"Tent: 1 batch norm layers cannot take statistics of the batch: 2 \(BatchNorm1d\)"
    ):
        Tent(net)
