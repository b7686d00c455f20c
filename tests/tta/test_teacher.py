"""The teacher: the values it holds, how they follow, and that the model runs with them as a copy would."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from tta_cases import batch_norm_net, group_norm_net, quantized_net, stream

from ttaq.ptq import quantize
from ttaq.tta.teacher import Teacher


class SharedLayers(nn.Module):
    """One convolution and one norm used twice, under two names each, and a tied parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.second, self.again = self.first, self.norm
        self.head = nn.Linear(3, 3)
        self.tail = nn.Linear(3, 3)
        self.tail.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = self.again(self.second(x)).relu()
        return self.tail(self.head(x.mean((2, 3))))


def moved(model: nn.Module, seed: int = 5) -> dict[str, Tensor]:
    """Other values for every parameter."""
    generator = torch.Generator().manual_seed(seed)
    return {name: p.detach() + 0.1 * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


def shared() -> nn.Module:
    return SharedLayers().eval()


def shared_quantized() -> nn.Module:
    return quantize(shared(), torch.cat(stream(seed=99)), "W4A4")


NETS = {"float": batch_norm_net, "W4A4": quantized_net, "layer norm": group_norm_net, "shared": shared}
NETS |= {"shared W4A4": shared_quantized}


@pytest.mark.parametrize("net", sorted(NETS))
def test_the_model_runs_as_a_deep_copy_with_these_values(net: str) -> None:
    model = NETS[net]()
    x = stream()[0]
    before, state = model(x), copy.deepcopy(model.state_dict())
    values = moved(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(values[name])
    teacher = Teacher(values)
    assert torch.equal(teacher(model, x), twin(x))
    assert not torch.equal(teacher(model, x), before)
    # And leaves no trace: neither in the tensors nor in what layers cache.
    assert torch.equal(model(x), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())


@pytest.mark.parametrize("net", ["float", "W4A4"])
def test_buffers_can_be_among_the_values(net: str) -> None:
    model, x = NETS[net](), stream()[0]
    name = next(name for name, _ in model.named_buffers() if name.endswith("running_mean"))
    twin = copy.deepcopy(model)
    twin.get_buffer(name).add_(0.5)
    teacher = Teacher({name: model.get_buffer(name) + 0.5})
    assert torch.equal(teacher(model, x), twin(x))


def test_an_interrupted_forward_leaves_the_model_whole() -> None:
    model = batch_norm_net()
    before = model(stream()[0])
    with pytest.raises(RuntimeError):
        Teacher(moved(model))(model, torch.rand(1, 2, 8, 8))
    assert torch.equal(model(stream()[0]), before)


def test_values_are_copies_and_live() -> None:
    model = batch_norm_net()
    teacher = Teacher(dict(model.named_parameters()))
    with torch.no_grad():
        model[0].weight.add_(1)
    assert not torch.equal(teacher.values()["0.weight"], model[0].weight)
    teacher.values()["0.weight"].fill_(3)
    assert teacher.values()["0.weight"].eq(3).all()
    assert sorted(dict(teacher.named_buffers())) == sorted(
        name.replace(".", "/") for name, _ in model.named_parameters()
    )


def test_follows_the_named_parameters_in_place() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([5.0])
    teacher = Teacher({"x.a": a, "b": b, "c": torch.zeros(1)})
    held = teacher.values()
    for _ in range(2):
        teacher.follow_({"b": torch.tensor([1.0]), "x.a": torch.tensor([0.0, 4.0])}, 0.75)
    torch.testing.assert_close(held["x.a"], torch.tensor([0.5625, 2.875]))
    torch.testing.assert_close(held["b"], torch.tensor([1 + 4 * 0.5625]))
    assert held["c"] == 0


def test_no_gradient_reaches_the_values() -> None:
    model = batch_norm_net()
    logits = Teacher(dict(model.named_parameters()))(model, stream()[0].requires_grad_())
    assert not logits.requires_grad


def test_copies_moves_and_pickles() -> None:
    model, x = batch_norm_net(), stream()[0]
    teacher = Teacher(moved(model))
    expected = teacher(model, x)
    file = io.BytesIO()
    torch.save(teacher, file)
    file.seek(0)
    for other in (copy.deepcopy(teacher), torch.load(file, weights_only=False)):
        assert torch.equal(other(model, x), expected)
        other.values()["0.weight"].zero_()
    assert torch.equal(teacher(model, x), expected)
    assert teacher.double()(batch_norm_net().double(), x.double()).dtype == torch.float64
