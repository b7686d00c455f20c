"""Conversion: the same function with the same names, and quantizers where they belong."""

from __future__ import annotations

import copy

import pytest
import torch
from nn_nets import NETS, images, make
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from ttaq.errors import InputError
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
    "transformer": ["norm1", "matmul_1", "norm2", "mlp_1", "getitem_4"],
    "plain": ["_3", "_8"],
}


def calibrate(model: QuantizedModel, x: Tensor) -> QuantizedModel:
    """Grids from one batch: enough for tests of structure."""
    seen: dict[str, Tensor] = {}
    quantizers = activation_quantizers(model)
    handles = [
        quantizer.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
        for name, quantizer in quantizers.items()
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    for name, quantizer in quantizers.items():
        quantizer.calibrate(seen[name], search="minmax")
    for layer in quantized_layers(model).values():
        layer.calibrate_weight("minmax")
    return model


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


class Branches(nn.Module):
    """Layers that share a tensor, a layer used twice, two heads, a pooled and a flat reading of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a = nn.Conv2d(4, 4, 1)
        self.b = nn.Conv2d(4, 4, 1)
        self.twice = nn.Conv2d(4, 4, 1)
        self.head1 = nn.Linear(4, 2)
        self.head2 = nn.Linear(4 * 64, 2)
        self.alias = self.twice

    def forward(self, x: Tensor, scale: float = 1.0, *, heads: bool = True) -> Tensor:
        x = functional.relu(self.stem(input=x)) * scale
        x = self.a(x) + self.b(functional.max_pool2d(x, 1))
        x = functional.relu(self.alias(self.twice(x)))
        if not heads:
            return x
        return self.head1(x.mean((2, 3))) + self.head2(functional.max_pool2d(x, 2).flatten(1))


def branches() -> Branches:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Branches().eval()


def bits_of(model: QuantizedModel) -> dict[str, tuple]:
    return {layer.name: (layer.weight_bits, layer.activation_bits) for layer in model.report}


def test_shared_tensors_and_layers() -> None:
    net, x = branches(), images(2)
    model = convert(net, "W4A4,b=W3A6")
    assert torch.equal(model(x), net(x))
    assert model.alias is model.twice
    assert isinstance(model.twice, QuantConv2d)
    # a and b read the same values, b through a pooling: one quantizer with the larger number of bits.
    assert [q.bits for q in activation_quantizers(model).values()] == [6, 4, 4, 8, 8]
    assert model.a.input_limit == model.b.input_limit == 63
    assert bits_of(model) == {
        "stem": (8, None),
        "a": (4, 6),
        "b": (3, 6),
        "twice": (4, 4),
        "head1": (8, 8),
        "head2": (8, 8),
    }
    calibrate(model, x)
    fresh = convert(net, "W4A4,b=W3A6")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("W4A4,first_last=none", {"stem": (4, None), "a": (4, 4), "head1": (4, 4)}),
        ("W4A4,image=8", {"stem": (8, 8), "a": (4, 4)}),
        ("W4A32", {"stem": (8, None), "a": (4, None), "head1": (8, None)}),
        ("W32A4", {"stem": (None, None), "a": (None, 4), "head1": (None, 8)}),
        ("W4A4,a=float", {"a": (None, None), "b": (4, 4)}),
        ("W4A4,head*=float,stem=W2A2", {"stem": (2, None), "head1": (None, None), "head2": (None, None)}),
        ("float", {"stem": (None, None), "a": (None, None)}),
        ("W3A3,weight_per_tensor,weight_symmetric,activation_symmetric", {"a": (3, 3)}),
    ],
)
def test_schemes(scheme: str, expected: dict) -> None:
    net, x = branches(), images(2)
    model = convert(net, scheme)
    assert torch.equal(model(x), net(x))
    assert bits_of(model).items() >= expected.items()
    assert isinstance(model.a, QuantConv2d) == (bits_of(model)["a"][0] is not None)
    y = calibrate(model, x)(x)
    assert torch.equal(y, net(x)) == (scheme == "float")
    if "symmetric" in scheme:
        assert all(q.symmetric for q in activation_quantizers(model).values())
        assert model.a.weight_quantizer.scale.shape == (1,)
        assert model.a.weight_quantizer.qmin == -4


class OwnForward(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight / self.weight.std(), self.bias)


class Renamed(nn.Conv2d):
    """A subclass that computes what torch's layer does."""


def uncovered() -> nn.Sequential:
    hooked = nn.Conv2d(4, 4, 1)
    hooked.register_forward_hook(lambda module, args, output: output * 2)
    weight_norm = parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), OwnForward(4, 4, 1), hooked, weight_norm, Renamed(4, 4, 1), nn.Conv2d(4, 2, 1)
    )


def test_layers_that_compute_something_else_stay_float() -> None:
    with torch.random.fork_rng(devices=[]):
        net = uncovered().eval()
    model = convert(net, "W4A4")
    assert torch.equal(model(images(2)), net(images(2)))
    assert list(quantized_layers(model)) == ["0", "4", "5"]
    notes = {layer.name: layer.note for layer in model.report}
    assert all(notes[name].startswith("stays float") for name in "123")


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.mean() > 0 else x


class Named(nn.Sequential):
    report = "mine"


CONV = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 2))
ERRORS = {
    "not a module": (lambda: (3, "W4A4"), "got a int and a Scheme"),
    "not a scheme": (lambda: (CONV, 4), "got a Sequential and a int"),
    "bad scheme": (lambda: (CONV, "W4"), "got 'W4', expected W<weight bits>"),
    "typo in a layer name": (lambda: (CONV, "W4A4,layer9.*=W8A8"), "override 'layer9.*' matches no layer"),
    "data dependent": (lambda: (DataDependent(), "W4A4"), "torch.fx cannot trace DataDependent: symbolically traced"),
    "nothing to quantize": (lambda: (nn.Sequential(nn.ReLU()), "W4A4"), "calls no Conv2d or Linear"),
    "only other layers": (lambda: (nn.Sequential(nn.Conv1d(3, 4, 1)), "W4A4"), "calls no Conv2d or Linear"),
    "twice": (lambda: (convert(CONV, "W4A4"), "W4A4"), "the model is quantized already"),
    "a name is taken": (lambda: (Named(nn.Conv2d(3, 4, 1)), "W4A4"), "attribute 'report'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    make_arguments, message = ERRORS[case]
    with pytest.raises(InputError) as caught:
        convert(*make_arguments())
    assert message in str(caught.value)


def test_a_failed_trace_leaves_the_mode_alone() -> None:
    net = DataDependent().train()
    with pytest.raises(InputError):
        convert(net, "W4A4")
    assert net.training
    assert net.conv.training
