"""Replacing batch norm and finding norm parameters."""

from __future__ import annotations

import torch
from torch import nn
from tta_cases import batch_norm_net, stream

from ttaq.nn.adapt_norms import adapt_norms, norm_affine
from ttaq.nn.batch_norm import AdaptiveBatchNorm2d


def test_outputs_and_keys_stay() -> None:
    net = batch_norm_net()
    keys, expected = list(net.state_dict()), [net(x) for x in stream()]
    assert adapt_norms(net) is net
    assert list(net.state_dict()) == keys
    assert all(torch.equal(net(x), z) for x, z in zip(stream(), expected, strict=True))
    assert [type(net[i]) for i in (1, 4)] == [AdaptiveBatchNorm2d] * 2


def test_a_layer_in_several_places_stays_one() -> None:
    norm = nn.BatchNorm2d(2)
    net = nn.ModuleDict({"a": norm, "b": norm, "deep": nn.Sequential(norm, nn.Sequential(norm))})
    adapt_norms(net)
    assert type(net["a"]) is AdaptiveBatchNorm2d
    assert net["a"] is net["b"] is net["deep"][0] is net["deep"][1][0]


def test_a_lone_layer_adaptive_layers_and_subclasses() -> None:
    assert type(adapt_norms(nn.BatchNorm2d(2))) is AdaptiveBatchNorm2d

    class WithActivation(nn.BatchNorm2d):
        pass

    adaptive = AdaptiveBatchNorm2d(2)
    adaptive.alpha = 0.3
    net = adapt_norms(nn.Sequential(adaptive, WithActivation(2)))
    assert net[0] is adaptive
    assert adaptive.alpha == 0.3
    assert type(net[1]) is WithActivation


def test_norm_affine_lists_each_parameter_once() -> None:
    shared = nn.LayerNorm(3)
    net = nn.Sequential(
        shared,
        nn.GroupNorm(1, 3),
        nn.Linear(3, 3),
        shared,
        nn.BatchNorm1d(3),
        nn.LayerNorm(3, elementwise_affine=False),
    )
    net[1].weight = shared.weight
    assert list(norm_affine(net, "test")) == ["0.weight", "0.bias", "1.bias", "4.weight", "4.bias"]
