"""Norm against hand-worked numbers, and its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from tta_cases import batch_norm_net, group_norm_net, stream

from ttaq.errors import InputError
from ttaq.tta import Norm, Source


def _two_values() -> nn.Sequential:
    """One channel with source mean 1, variance 1, weight 2, bias 10 and eps 0.5."""
    norm = nn.BatchNorm2d(1, eps=0.5)
    with torch.no_grad():
        norm.running_mean.fill_(1)
        norm.running_var.fill_(1)
        norm.weight.fill_(2)
        norm.bias.fill_(10)
    return nn.Sequential(norm, nn.Flatten())


@pytest.mark.parametrize(
    ("options", "mean", "variance"),
    [
        ({}, 2, 4),
        ({"alpha": 1}, 2, 4),
        ({"alpha": 0.0}, 1, 1),
        ({"alpha": 0.5}, 1.5, 2.5),
        ({"alpha": 0.25}, 1.25, 1.75),
        ({"prior_n": 0}, 2, 4),
        ({"prior_n": 2}, 1.5, 2.5),
        ({"prior_n": 6}, 1.25, 1.75),
    ],
)
def test_hand_worked_statistics(options: dict[str, Any], mean: float, variance: float) -> None:
    x = torch.tensor([0.0, 4.0]).view(2, 1, 1, 1)  # mean 2, biased variance 4
    expected = [[(value - mean) / (variance + 0.5) ** 0.5 * 2 + 10] for value in (0, 4)]
    torch.testing.assert_close(Norm(_two_values(), **options)(x), torch.tensor(expected))


def test_prior_counts_the_images_of_each_batch() -> None:
    norm = Norm(batch_norm_net(), prior_n=12)
    for x in (*stream(1, 4), *stream(1, 1)):
        expected = Norm(batch_norm_net(), alpha=len(x) / (len(x) + 12))(x)
        torch.testing.assert_close(norm(x), expected, rtol=1e-6, atol=1e-6)


def test_all_batch_is_torch_in_training_mode_and_no_batch_is_source() -> None:
    x = stream(1, 6)[0]
    net = batch_norm_net()
    for layer in net:
        layer.train(isinstance(layer, nn.BatchNorm2d))
    torch.testing.assert_close(Norm(batch_norm_net())(x), net(x).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(Norm(batch_norm_net(), alpha=0)(x), Source(batch_norm_net())(x), rtol=1e-5, atol=1e-5)


def test_one_value_per_channel_becomes_the_bias() -> None:
    x = torch.full((1, 1, 1, 1), 7.0)
    net = _two_values()
    assert Norm(net)(x).item() == 10
    assert Norm(net, alpha=0.5)(x).item() == pytest.approx((7 - 4) / (0.5 + 0.5) ** 0.5 * 2 + 10)


def test_running_statistics_stay() -> None:
    norm = Norm(batch_norm_net(), alpha=0.3)
    before = {name: buffer.clone() for name, buffer in norm.model.named_buffers()}
    norm(stream()[0])
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.model.named_buffers())


def test_a_model_without_running_statistics_takes_alpha_1_only() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten())
    assert torch.isfinite(Norm(net)(stream()[0])).all()
    for options in ({"alpha": 0.5}, {"prior_n": 4}):
        with pytest.raises(InputError, match="Norm: 0 has no running statistics"):
            Norm(net, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.5, "prior_n": 4}, "got alpha 0.5 and prior_n 4, expected at most one"),
        ({"alpha": 1.5}, r"alpha is 1.5, expected a number in \[0, 1\]"),
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": "all"}, "alpha is 'all'"),
        ({"prior_n": -1}, "prior_n is -1, expected an integer >= 0"),
        ({"prior_n": 2.5}, "prior_n is 2.5"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^Norm: {message}"):
        Norm(batch_norm_net(), **options)


def test_a_model_without_batch_norm_is_refused() -> None:
    with pytest.raises(InputError, match="Norm: the model has no batch norm"):
        Norm(group_norm_net())
