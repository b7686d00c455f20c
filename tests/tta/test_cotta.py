"""CoTTA against a float64 statement of its update; what it learns in a quantized model; its options."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tta_cases import batch_norm_net, group_norm_net, on_batch_statistics, quantized_net, stream

from ttaq.data.augment import augment
from ttaq.errors import InputError
from ttaq.nn.integer import IntegerLayer
from ttaq.tta.cotta import CoTTA, live_parameters

SGD: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.9, "lr": 0.1}


def versions(model: nn.Module, x: Tensor, count: int, batch: int) -> Tensor:
    generator, dtype = torch.Generator().manual_seed(batch), next(model.parameters()).dtype
    return torch.stack([model(augment(x, generator).to(dtype)) for _ in range(count)]).mean(0)


@pytest.mark.parametrize("loss", ["cifar", "imagenet"])
@pytest.mark.parametrize("confidence", [0.0, 1.0])
def test_follows_the_published_update(loss: str, confidence: float) -> None:
    adapter = CoTTA(
        batch_norm_net(),
        loss=loss,
        confidence=confidence,
        augmentations=3,
        teacher_momentum=0.8,
        restore=0.0,
        **SGD,
    )
    student = on_batch_statistics(batch_norm_net()).double()
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    for number, x in enumerate(stream()):
        y = teacher(x.double()) if confidence == 0 else versions(teacher, x, 3, number)
        z = student(x.double())
        p, q = z.softmax(1), y.softmax(1)
        value = -(q * p.log()).sum(1).mean()
        if loss == "imagenet":
            value = 0.5 * value - 0.5 * (p * q.log()).sum(1).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        with torch.no_grad():
            for mine, other in zip(teacher.parameters(), student.parameters(), strict=True):
                mine.copy_(0.8 * mine + 0.2 * other)
        torch.testing.assert_close(adapter(x).double(), y, rtol=1e-4, atol=1e-5)
    for (name, got), expected in zip(adapter.parameters_adapted(), student.parameters(), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5, msg=name)
    for value, expected in zip(adapter.teacher.values().values(), teacher.parameters(), strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_confidence_is_that_of_the_source_whatever_was_learned() -> None:
    x = stream()[0]
    source = on_batch_statistics(batch_norm_net())
    confidence = source(x).softmax(1).amax(1).mean().item()
    answers = []
    for offset in (-1e-3, 1e-3):
        adapter = CoTTA(batch_norm_net(), augmentations=2, confidence=confidence + offset)
        with torch.no_grad():
            for parameter in (*dict(adapter.parameters_adapted()).values(), *adapter.teacher.values().values()):
                parameter.mul_(1.5)
        teacher = copy.deepcopy(source)
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.mul_(1.5)
        expected = teacher(x) if offset < 0 else versions(teacher, x, 2, 0)
        answers.append(adapter.predict(x))
        torch.testing.assert_close(answers[-1], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(*answers, atol=1e-3)


def test_restores_single_values() -> None:
    never, half, always = (CoTTA(batch_norm_net(), augmentations=1, restore=p, **SGD) for p in (0.0, 0.5, 1.0))
    x = stream()[0]
    for adapter in (never, half, always):
        adapter(x)
    back, all_values = 0, 0
    for step, got, end, source in zip(
        never.parameters_adapted(),
        half.parameters_adapted(),
        always.parameters_adapted(),
        half.source_values,
        strict=True,
    ):
        assert torch.equal(end[1], source)
        assert ((got[1] == source) | (got[1] == step[1])).all()
        moved = step[1] != source
        back += int((moved & (got[1] == source)).sum())
        all_values += int(moved.sum())
    assert 0.4 < back / all_values < 0.6
    # The teacher has followed the student before that.
    assert all(
        torch.equal(a, b)
        for a, b in zip(never.teacher.values().values(), always.teacher.values().values(), strict=True)
    )


def test_masks_differ_between_batches() -> None:
    adapter = CoTTA(batch_norm_net(), augmentations=1, restore=0.5, lr=0.01)
    masks = []
    for x in stream(2):
        adapter(x)
        weight = dict(adapter.parameters_adapted())["3.weight"]
        masks.append(weight == adapter.source_values[[n for n, _ in adapter.parameters_adapted()].index("3.weight")])
    assert not torch.equal(*masks)


def test_the_float_model_learns_everything() -> None:
    model = batch_norm_net()
    assert live_parameters(model).keys() == dict(model.named_parameters()).keys()
    assert dict(CoTTA(model).parameters_adapted()).keys() == dict(model.named_parameters()).keys()


def test_weights_on_grids_stay_and_everything_else_is_learned() -> None:
    model = quantized_net()
    gridded = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, IntegerLayer)}
    assert gridded == {"0.weight", "3.weight", "9.weight"}
    adapter = CoTTA(model, augmentations=1, lr=0.05)
    learned = dict(adapter.parameters_adapted())
    assert learned.keys() == dict(model.named_parameters()).keys() - gridded
    before = {name: value.clone() for name, value in adapter.model.state_dict().items()}
    for x in stream():
        assert torch.isfinite(adapter(x)).all()
    after = adapter.model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == learned.keys()


def test_a_weight_without_grid_is_learned() -> None:
    model = quantized_net()
    layer = model.get_submodule("3")
    assert isinstance(layer, IntegerLayer)
    layer.weight_quantizer.set_grid(None, None)
    assert "3.weight" in live_parameters(model)
    frozen = nn.Sequential(nn.Linear(2, 2))
    frozen.register_parameter("count", nn.Parameter(torch.ones(1, dtype=torch.int64), requires_grad=False))
    assert live_parameters(frozen).keys() == {"0.weight", "0.bias"}


def test_works_without_batch_norm() -> None:
    adapter = CoTTA(group_norm_net(), augmentations=2)
    for x in stream():
        assert torch.isfinite(adapter(x)).all()
    assert adapter.counters["updates"] == 3


def test_images_that_are_not_finite_teach_nothing() -> None:
    adapter = CoTTA(batch_norm_net(), augmentations=1, check_finite=False)
    before = [parameter.clone() for _, parameter in adapter.parameters_adapted()]
    adapter(torch.full((2, 3, 8, 8), float("nan")))
    assert all(torch.equal(p, q) for (_, p), q in zip(adapter.parameters_adapted(), before, strict=True))
    assert all(value.isfinite().all() for value in adapter.teacher.values().values())
    assert adapter.counters["updates"] == 0


def test_composes_with_the_balance_of_the_classes() -> None:
    plain, balanced = (CoTTA(batch_norm_net(), augmentations=1, abl=abl, **SGD) for abl in (None, "gradient"))
    for x in stream():
        plain(x), balanced(x)
    assert not torch.equal(plain.predict(stream()[0]), balanced.predict(stream()[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "mse"}, "CoTTA: loss is 'mse', expected cifar or imagenet"),
        ({"teacher_momentum": 1.5}, r"CoTTA: teacher_momentum is 1.5, expected a number in \[0, 1\]"),
        ({"restore": -0.1}, "CoTTA: restore is -0.1"),
        ({"confidence": "high"}, "CoTTA: confidence is 'high'"),
        ({"augmentations": 0}, "CoTTA: augmentations is 0, expected an integer of at least 1"),
        ({"augmentations": 2.0}, "CoTTA: augmentations is 2.0"),
        ({"lr": -1}, "CoTTA: lr is -1"),
        ({"rst": 0.1}, "CoTTA: no option is named rst"),
    ],
)
def test_refuses_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CoTTA(batch_norm_net(), **options)


def test_refuses_a_model_without_norms() -> None:
    with pytest.raises(InputError, match="no weight or bias in a batch, layer or group norm"):
        CoTTA(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)))
