"""Units: which parts a model falls into, and that they are all of it."""

from __future__ import annotations

import pytest
import torch
from ptq_nets import NETS, images, net, pair
from torch import Tensor, nn

from ttaq.errors import InputError
from ttaq.models import build
from ttaq.nn import convert, quantized_layers
from ttaq.ptq.student import unit_module
from ttaq.ptq.units import find_units, layer_by_layer

# Stem, blocks and classifier; in the pre-activation net the last norm goes with the classifier.
COUNTS = {
    "cifar_resnet20": 11, "cifar_resnet32": 17, "resnet18": 10, "resnet50": 18, "wrn28_10": 14, "wrn40_2": 20,
    "resnext29_4x32d": 11, "mobilenet_v1": 15, "deit_tiny": 14,
}  # fmt: skip


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_how_many(name: str, count: int) -> None:
    with torch.device("meta"):
        model = build(name)
    units = find_units(convert(model, "W4A4"))
    assert len(units) == count
    layers = [layer for unit in units for layer in unit.layers]
    assert layers == list(dict.fromkeys(layers))
    assert set(layers) == set(quantized_layers(convert(model, "W4A4")))
    nodes = [node for unit in units for node in unit.nodes]
    assert nodes == sorted(set(nodes), key=nodes.index)


def test_names() -> None:
    names = {name: [unit.name for unit in find_units(convert(net(name), "W4A4"))] for name in NETS}
    assert names["resnet"] == ["conv1", "layer1.0", "layer2.0", "layer3.0", "linear"]
    assert names["wide"] == ["conv1", "block1.layer.0", "block2.layer.0", "block3.layer.0", "fc"]
    assert names["vit"] == ["patch_embed.proj", "blocks.0", "blocks.1", "head"]
    assert names["mobilenet"] == ["conv1.1", *(f"blocks.{index}" for index in range(13)), "fc"]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_one_after_another_they_are_the_model(name: str, calibrated: bool) -> None:
    model = pair(name)[0 if calibrated else 1]
    x = images(name, 5, seed=2)
    with torch.no_grad():
        y = x
        for unit in find_units(model):
            y = unit_module(model, unit)(y)
        assert torch.equal(y, model(x))


def test_norms_and_activations_belong_to_the_layer_before_them_and_after_a_join_to_the_next() -> None:
    model = convert(net("resnet"), "W4A4")
    assert str(find_units(model)[0].output.target) == "activation_quantizers.after_relu"
    model = convert(net("wide"), "W4A4")
    stem, first, *_, last = find_units(model)
    assert str(stem.output.target) == "conv1"
    assert [str(node.target) for node in first.nodes[:2]] == ["block1.layer.0.bn1", "block1.layer.0.relu1"]
    assert str(last.nodes[0].target) == "bn1"


def test_given_by_the_caller() -> None:
    model = convert(net("resnet"), "W4A4")
    units = find_units(model, ["layer1", "layer2.0"])
    assert [unit.name for unit in units] == ["conv1", "layer1.0", "layer2.0", "layer3.0", "linear"]
    whole = find_units(convert(net("vit"), "W4A4"), ["blocks"])
    assert [unit.name for unit in whole] == ["patch_embed.proj", "blocks", "head"]
    assert len(whole[1].layers) == 8


@pytest.mark.parametrize(
    ("names", "message"),
    [(["layer9"], "'layer9' holds no quantized layer"), (["layer1.0.conv1"], "through a branch")],
)
def test_names_that_do_not_fit(names: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_units(convert(net("resnet"), "W4A4"), names)


class Twice(nn.Module):
    """A layer before and behind another one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.b(self.a(x)))


def test_layers_of_a_name_that_do_not_follow_each_other() -> None:
    with pytest.raises(InputError, match="'a' do not follow one another"):
        find_units(convert(Twice().eval(), "W4A4"), ["a"])


def test_a_model_without_a_cut_is_one_unit() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(6, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.cat((x, self.a(x)), 1)) + x

    units = find_units(convert(Dense().eval(), "W4A4"))
    assert [unit.layers for unit in units] == [["a", "b"]]


def test_layer_by_layer() -> None:
    model = pair("resnet")[0]
    unit = find_units(model)[1]
    first, second = layer_by_layer(model, unit)
    assert (first.layers, second.layers) == (["layer1.0.conv1"], ["layer1.0.conv2"])
    assert str(first.output.target) == "activation_quantizers.after_layer1_0_relu1"
    assert str(second.output.target) == "layer1.0.bn2"  # the join is not the layer's own
    assert first.quantizers == ["after_layer1_0_relu1"]
    assert second.quantizers == []
    x = torch.rand(2, 4, 8, 8)
    with torch.no_grad():
        parts = unit_module(model, second)(x)
        whole = unit_module(model, unit)
        assert torch.equal(model.activation_quantizers["after_layer1_0_relu2"]((parts + x).relu()), whole(x))
