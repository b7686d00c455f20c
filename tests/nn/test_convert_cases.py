"""Conversion of unusual graphs: shared tensors and layers, schemes, layers that stay float, errors."""

from __future__ import annotations

import pytest
import torch
from nn_nets import calibrate, images
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from ttaq.errors import InputError
from ttaq.nn import QuantConv2d, QuantizedModel, activation_quantizers, convert, quantized_layers


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
