"""A unit in training: what it computes, what it learns, and what is left of it in the model."""

from __future__ import annotations

import itertools

import pytest
import torch
from ptq_nets import NETS, images, pair
from torch import Tensor, nn
from torch.nn import functional

from ttaq.nn import QuantizedModel, activation_quantizers, convert, quantized_layers
from ttaq.ptq.caches import Budget
from ttaq.ptq.reconstruct import reconstruct
from ttaq.ptq.settings import Reconstruction
from ttaq.ptq.student import Student, unit_module
from ttaq.ptq.units import find_units


@pytest.mark.parametrize("name", NETS)
def test_loss_and_output_are_those_of_the_unit(name: str) -> None:
    """With the rounding decided, a student is the unit with these weights, and its loss the formula."""
    model, teacher = pair(name)
    x = images(name, 3)
    with torch.no_grad():
        for unit, twin in zip(find_units(model), find_units(teacher), strict=True):
            student = Student(model, unit, 1.0)
            for rounding in student.roundings:
                rounding.v.copy_(torch.where(rounding.v >= 0, 30.0, -30.0))
                rounding.w_hat.copy_(rounding.rounded())
            target = unit_module(teacher, twin)(x)
            loss, output = student.loss(x, target), student.output(x)
            student.finish()
            expected = unit_module(model, unit)(x)
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
            channels = -1 if target.ndim == 3 else 1
            per_position = (output.double() - target.double()).square().sum(channels)
            torch.testing.assert_close(loss.double(), per_position.mean(), rtol=1e-4, atol=1e-6)
            x = expected


def test_soft_weights_start_as_the_float_weights_where_the_grid_reaches() -> None:
    model = pair()[0]
    for unit in find_units(model):
        for name, w_hat in zip(unit.layers, Student(model, unit, 1.0).w_hats, strict=True):
            layer = quantized_layers(model)[name]
            grid = layer.weight_quantizer
            scale, zero_point = (t.view(-1, *[1] * (w_hat.ndim - 1)) for t in (grid.scale, grid.zero_point))
            place = layer.weight / scale + zero_point
            inside = (place >= grid.qmin) & (place <= grid.qmax)
            torch.testing.assert_close(w_hat[inside], layer.weight[inside], rtol=1e-5, atol=1e-5 * scale.max().item())
            assert inside.float().mean() > 0.5


def test_finished_weights_lie_on_their_grid_and_stay_there() -> None:
    model = pair()[0]
    for unit in find_units(model):
        Student(model, unit, 0.5).finish()
    for layer in quantized_layers(model).values():
        quantizer = layer.weight_quantizer
        assert torch.equal(quantizer(layer.weight), layer.weight)


class Plain(nn.Module):
    """Nothing but one layer of four weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


def plain() -> tuple[QuantizedModel, QuantizedModel]:
    model = Plain()
    with torch.no_grad():
        model.layer.weight.copy_(torch.tensor([[0.35, 0.45, 0.48, -1.0]]))
    teacher, student = (convert(model, "W2A32,first_last=none").eval() for _ in range(2))
    student.layer.weight_quantizer.set_grid(torch.tensor([1.0]), torch.tensor([1], dtype=torch.int32))
    return student, teacher


def test_finds_the_best_of_all_roundings_by_hand() -> None:
    """Inputs (1, 1, 1, 0): the float output is 1.28 a, nearest rounding gives 0, the best is one weight up: 1."""
    x = torch.tensor([[1.0, 1, 1, 0], [2, 2, 2, 0], [0, 0, 0, 1], [-1, -1, -1, 1]])
    model, teacher = plain()
    settings = Reconstruction(iterations=600, batch_size=16, weight_lr=0.03, rounding_penalty=0.002)
    reconstruct(model, teacher, x.view(4, 4, 1, 1), settings, budget=Budget(10))
    rounded = model.layer.weight.detach()
    errors = {
        choice: functional.mse_loss(x @ torch.tensor(choice), x @ teacher.layer.weight.detach()[0]).item()
        for choice in itertools.product((0.0, 1.0), (0.0, 1.0), (0.0, 1.0), (-1.0, 0.0))
    }
    best = min(errors.values())
    assert errors[tuple(rounded[0].tolist())] == pytest.approx(best)
    assert errors[0.0, 0.0, 0.0, -1.0] > 2 * best
    assert rounded.tolist() == [[0.0, 0.0, 1.0, -1.0]]


def test_the_ending_that_runs_in_one_kernel() -> None:
    def endings(name: str) -> dict[str, tuple[bool, bool, bool]]:
        model = pair(name)[0]
        students = {unit.name: Student(model, unit, 1.0).ending for unit in find_units(model)}
        return {n: (e.residual is not None, e.relu, e.quantizer is not None) for n, e in students.items()}

    resnet, wide, vit = (endings(name) for name in ("resnet", "wide", "vit"))
    assert resnet["conv1"] == (False, True, True)
    assert resnet["layer2.0"] == (True, True, True)
    assert resnet["linear"] == (False, False, False)
    assert wide["block1.layer.0"] == (True, False, False)
    assert vit["blocks.0"] == (True, False, False)


def test_gradients_reach_all_that_learns_and_nothing_else() -> None:
    model, _ = pair()
    unit = find_units(model)[1]
    student = Student(model, unit, 1.0)
    x = torch.rand(4, 4, 8, 8)
    with torch.enable_grad():
        loss = student.loss(x, torch.zeros(4, 4, 8, 8))
        grads = torch.autograd.grad(loss, [*student.w_hats, *student.scales, *student.affine])
    assert all(grad.abs().sum() > 0 for grad in grads)
    assert len(student.scales) == 2
    assert len(student.affine) == 4
    grids = activation_quantizers(model)
    assert all(grids[name].scale.grad is None for name in unit.quantizers)
