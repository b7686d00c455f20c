"""Conversion: the same function with the same names, and quantizers where they belong."""

from __future__ import annotations

import copy

import pytest
import torch
from nn_nets import NETS, calibrate, images, make
from torch import nn

from ttaq.models import build
from ttaq.nn import (
    AdaptiveBatchNorm2d,
    QuantConv2d,
    QuantizedModel,
    QuantLinear,
    activation_quantizers,
    convert,
    quantized_layers,
)
from ttaq.scheme import Scheme

PLACES = {
    "cifar": ["relu", "relu_1", "relu_2", "relu_3", "relu_4", "relu_5", "view"],
    "imagenet": [
        "maxpool",
        *("layer1_0_relu", "layer1_0_relu_1", "layer1_0_relu_2"),
        *("layer1_1_relu", "layer1_1_relu_1", "flatten"),
    ],
    "wide": ["relu", "dropout", "relu_2", "dropout_1", "flatten"],
    "mobile": [
        "stem_3",
        *("blocks_0_act", "mean", "relu", "mul", "add"),
        *("blocks_1_act", "mean_1", "relu_1", "mul_1", "drop"),
    ],
    "transformer": [
        "norm1",
        "getitem_1",
        "transpose_1",
        "softmax",
        "getitem_3",
        "matmul_1",
        "norm2",
        "mlp_1",
        "getitem_4",
    ],
    "plain": ["_3", "_8"],
}


@pytest.mark.parametrize("name", NETS)
def test_uncalibrated_is_the_float_model_bit_for_bit(name: str) -> None:
    net, x = make(name), images(3)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    model = convert(net, "W4A4")
    assert torch.equal(model(x), net(x))
    for module in (model, net):
        module.zero_grad()
        module(x).square().sum().backward()
    grads = {key: value.grad for key, value in net.named_parameters()}
    assert all(
        value.grad is grads[key] is None or torch.equal(value.grad, grads[key])
        for key, value in model.named_parameters()
    )
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("name", NETS)
def test_a_float_state_loads_strictly_and_a_calibrated_one_too(name: str) -> None:
    net, x = make(name), images(3)
    model = convert(net, "W4A4")
    assert list(model.state_dict()) == list(net.state_dict())
    other = make(name, seed=1)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), other(x))

    calibrate(model, x)
    y = model(x)
    assert not torch.equal(y, other(x))
    fresh = convert(net, "W4A4")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), y)
    fresh.load_state_dict({key: value for key, value in model.state_dict().items() if "bn" in key}, strict=False)
    assert torch.equal(fresh(x), y), "a partial state must not uncalibrate"
    fresh.load_state_dict(other.state_dict())
    assert torch.equal(fresh(x), other(x))


@pytest.mark.parametrize("name", NETS)
def test_quantizers_are_where_they_belong(name: str) -> None:
    model = convert(make(name), "W4A3")
    quantizers = activation_quantizers(model)
    assert list(quantizers) == [f"after_{place}" for place in PLACES[name]]
    assert [quantizer.bits for quantizer in quantizers.values()] == [3] * (len(quantizers) - 1) + [8]
    layers = quantized_layers(model)
    bits = [layer.weight_quantizer.bits for layer in layers.values()]
    assert bits == [8] + [4] * (len(layers) - 2) + [8]
    assert list(activation_quantizers(convert(make(name, seed=1), "W4A3"))) == list(quantizers)


@pytest.mark.parametrize("name", NETS)
def test_every_layer_but_the_first_reads_a_grid(name: str) -> None:
    """And the convolution gets the scale of just that grid."""
    model, x = calibrate(convert(make(name), "W4A4"), images(3)), images(4, seed=1)
    first = next(iter(quantized_layers(model)))
    seen = []

    def check(layer: nn.Module, args: tuple) -> None:
        codes = args[0] / args[1]
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
        seen.append(layer)

    for layer_name, layer in quantized_layers(model).items():
        if layer_name != first:
            layer.register_forward_pre_hook(check)
    with torch.no_grad():
        model(x)
    assert len(seen) == len(quantized_layers(model)) - 1


def test_the_identity_shortcut_reads_the_quantized_tensor() -> None:
    model = convert(make("cifar"), "W4A4")
    users = {node.name: [user.name for user in node.users] for node in model.graph.nodes}
    assert users["relu"] == ["activation_quantizers_after_relu"]
    assert sorted(users["activation_quantizers_after_relu"]) == ["add", "layer1_0_conv1"]
    assert sorted(users["activation_quantizers_after_relu_4"]) == ["getitem", "layer2_0_conv1"]


def test_the_stream_of_a_preactivation_net_stays_float() -> None:
    model = convert(make("wide"), "W4A4")
    stream = [node for node in model.graph.nodes if node.name in ("conv1", "add", "add_1")]
    assert len(stream) == 3
    assert not any("quantizer" in user.name for node in stream for user in node.users)


def test_grids_of_layer_norms_clip_less() -> None:
    grids = activation_quantizers(convert(make("transformer"), "W4A4"))
    assert [name for name, grid in grids.items() if grid.p == 3] == ["after_norm1", "after_norm2"]
    assert {grid.p for grid in activation_quantizers(convert(make("cifar"), "W4A4")).values()} == {2.4}


def test_layer_types_and_training_flags() -> None:
    net = make("cifar")
    net.layer1[0].bn1.train()
    model = convert(net, "W4A4")
    assert isinstance(model.conv1, QuantConv2d)
    assert isinstance(model.linear, QuantLinear)
    assert isinstance(model.layer1[0].bn1, AdaptiveBatchNorm2d)
    assert type(model.unused) is nn.Linear
    flags = {name: module.training for name, module in model.named_modules() if module.training}
    assert list(flags) == ["layer1.0.bn1", *(n for n in flags if "quantizer" in n)]


def test_functional_dropout_is_that_of_eval_mode() -> None:
    net = make("wide").train()
    model = convert(net, "W4A4")
    assert net.training
    assert net.block1[0].training
    assert model.training
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert torch.equal(model(images(2)), make("wide")(images(2)))


@pytest.mark.parametrize("name", NETS)
def test_copies_are_independent_and_complete(name: str) -> None:
    model, x = calibrate(convert(make(name), "W4A4"), images(3)), images(2, seed=1)
    y = model(x)
    twin = copy.deepcopy(model)
    assert type(twin).__mro__[1] is QuantizedModel
    assert torch.equal(twin(x), y)
    assert (twin.scheme, twin.report, list(twin.state_dict())) == (model.scheme, model.report, list(model.state_dict()))
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    assert torch.equal(model(x), y)
    assert torch.equal(copy.deepcopy(model)(x), y)


def test_other_types() -> None:
    model, x = calibrate(convert(make("imagenet"), "W8A8"), images(16)), images(8)
    y = model(x)
    short = copy.deepcopy(model).to(torch.bfloat16)
    assert short(x.bfloat16()).dtype == torch.bfloat16
    assert (short(x.bfloat16()) - y).abs().max() < 0.1 * y.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x) - y).abs().max() < 0.1 * y.abs().max()
    assert torch.equal(model.to(memory_format=torch.channels_last)(x), y)


def test_empty_batch_and_inference_mode() -> None:
    model = calibrate(convert(make("imagenet"), "W4A4"), images(3))
    assert model(images(0)).shape == (0, 10)
    with torch.inference_mode():
        y = model(images(2))
    assert torch.equal(y, model(images(2)))


def test_only_norm_parameters_learn() -> None:
    model = calibrate(convert(make("cifar"), "W4A4"), images(3)).requires_grad_(False)
    norms = [module.requires_grad_() for module in model.modules() if isinstance(module, AdaptiveBatchNorm2d)]
    model(images(4)).square().sum().backward()
    assert all(norm.weight.grad.abs().sum() > 0 for norm in norms)
    assert all(p.grad is None for name, p in model.named_parameters() if "bn" not in name)


def test_registry_model() -> None:
    net = build("cifar_resnet8").eval()
    x = images(2)
    model = convert(net, Scheme(4, 4))
    assert torch.equal(model(x), net(x))
    assert "normalize.mean" not in model.state_dict(), "a buffer that is not saved stays so"
    assert model.load_state_dict(net.state_dict())
