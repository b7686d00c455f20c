"""RMT against a statement of its update with two whole models; prototypes; the projector; its options."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tta_cases import CLASSES, batch_norm_net, group_norm_net, on_batch_statistics, quantized_net, stream

from ttaq.data.augment import augment
from ttaq.errors import InputError
from ttaq.tta.rmt import RMT

SGD: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.9, "lr": 0.1}


def source_images() -> Tensor:
    return torch.cat(stream(20, seed=98))


def build(model: nn.Module | None = None, **options: Any) -> RMT:
    return RMT(batch_norm_net() if model is None else model, **{"source_images": source_images(), **options})


def symmetric(a: Tensor, b: Tensor) -> Tensor:
    p, q = a.softmax(1), b.softmax(1)
    return -0.5 * (q * p.log()).sum(1) - 0.5 * (p * q.log()).sum(1)


def contrast(views: list[list[Tensor]], temperature: float) -> Tensor:
    """views[sample][view], normalised: one anchor after the other."""
    flat = [(sample, view) for sample, of_sample in enumerate(views) for view in of_sample]
    losses = []
    for anchor, (sample, v) in enumerate(flat):
        others = [(s, v @ w / temperature) for index, (s, w) in enumerate(flat) if index != anchor]
        total = torch.logsumexp(torch.stack([value for _, value in others]), 0)
        positives = [value - total for s, value in others if s == sample]
        assert len(positives) == 2
        losses.append(-torch.stack(positives).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 0.1), (0.0, 0.1), (2.0, 0.5)])
def test_follows_the_published_update(weight: float, temperature: float) -> None:
    adapter = build(contrast_weight=weight, temperature=temperature, teacher_momentum=0.8, **SGD)
    projector = copy.deepcopy(adapter.projector)
    student = on_batch_statistics(batch_norm_net())
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.SGD([*student.parameters(), *projector.parameters()], lr=0.1, momentum=0.9)
    for number, x in enumerate(stream()):
        y = teacher(x)
        h, g = (student[:-1](v) for v in (x, augment(x, torch.Generator().manual_seed(number))))
        z = student[-1](h)
        loss = (0.5 * symmetric(z, y) + 0.5 * symmetric(student[-1](g), y)).mean()
        cosine = nn.functional.cosine_similarity(h.detach()[:, None], adapter.prototypes[None], dim=2)
        near = adapter.prototypes[cosine.argmax(1)]
        views = [[nn.functional.normalize(projector(v), dim=0) for v in each] for each in zip(near, h, g, strict=True)]
        loss = loss + weight * contrast(views, temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mine, other in zip(teacher.parameters(), student.parameters(), strict=True):
                mine.copy_(0.8 * mine + 0.2 * other)
        torch.testing.assert_close(adapter(x), (z + y).detach(), rtol=1e-4, atol=1e-5)
    expected = [*student.parameters(), *projector.parameters()]
    for (name, got), value in zip(adapter.parameters_adapted(), expected, strict=True):
        torch.testing.assert_close(got, value, rtol=2e-4, atol=2e-5, msg=name)
    for value, other in zip(adapter.teacher.values().values(), teacher.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)


def test_prototypes_are_class_means_of_the_source_model() -> None:
    adapter = build()
    model, images = batch_norm_net(), source_images()
    with torch.no_grad():
        features = model[:-1](images)
        labels = model(images).argmax(1)
    predicted = labels.unique().tolist()
    assert 0 < len(predicted) < CLASSES  # so that both cases are tested
    length = features.norm(dim=1).mean()
    for label in range(CLASSES):
        row = model[-1].weight[label].detach()
        mean = features[labels == label].mean(0) if label in predicted else row / row.norm() * length
        torch.testing.assert_close(adapter.prototypes[label], mean, rtol=1e-4, atol=1e-5)


def test_prototypes_use_the_statistics_of_the_source_whatever_the_batches() -> None:
    images = source_images()
    one = build(source_images=images[:65]).prototypes
    other = build(source_images=images[:65].flip(0)).prototypes
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_prototypes_of_a_quantized_model_are_those_of_its_own_features() -> None:
    model = quantized_net()
    adapter = build(model)
    inputs: list[Tensor] = []
    handle = model.get_submodule("9").register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    labels = model(source_images()).argmax(1)
    handle.remove()
    label = int(labels.mode().values)
    torch.testing.assert_close(adapter.prototypes[label], inputs[0][labels == label].mean(0), rtol=1e-3, atol=1e-4)


def test_prototypes_stay() -> None:
    adapter = build(lr=0.1)
    before = adapter.prototypes.clone()
    for x in stream():
        adapter(x)
    assert torch.equal(adapter.prototypes, before)


def test_the_projector_begins_the_same_and_draws_nothing_from_the_user() -> None:
    torch.manual_seed(1)
    model = batch_norm_net()
    state = torch.get_rng_state()
    one = build(model)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    two = build(model)
    widths = []
    for a, b in zip(one.projector.parameters(), two.projector.parameters(), strict=True):
        assert torch.equal(a, b)
        widths.append(tuple(a.shape))
    assert widths == [(128, 4), (128,), (128, 128), (128,)]
    for layer in (one.projector[0], one.projector[2]):
        bound = 1 / math.sqrt(layer.in_features)
        assert 0.9 * bound < layer.weight.detach().abs().max() <= bound
        assert layer.weight.detach().mean().abs() < 0.1 * bound


def test_the_projector_is_learned_and_comes_back() -> None:
    adapter = build(lr=0.01)
    names = [name for name, _ in adapter.parameters_adapted() if name.startswith("projector/")]
    assert names == ["projector/0.weight", "projector/0.bias", "projector/2.weight", "projector/2.bias"]
    before = [parameter.detach().clone() for parameter in adapter.projector.parameters()]
    clone = copy.deepcopy(adapter)
    for x in stream():
        adapter(x)
    changed = [not torch.equal(p, q) for p, q in zip(adapter.projector.parameters(), before, strict=True)]
    assert all(changed)
    assert all(torch.equal(p, q) for p, q in zip(clone.projector.parameters(), before, strict=True))
    clone.load_state_dict(adapter.state_dict())
    pairs = zip(clone.projector.parameters(), adapter.projector.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    adapter.reset()
    assert all(torch.equal(p, q) for p, q in zip(adapter.projector.parameters(), before, strict=True))
    assert "projector/0.weight" not in adapter.teacher.values()


def test_without_contrast_the_projector_stays() -> None:
    adapter = build(contrast_weight=0.0, **SGD)
    before = [parameter.detach().clone() for parameter in adapter.projector.parameters()]
    adapter(stream()[0])
    assert all(torch.equal(p, q) for p, q in zip(adapter.projector.parameters(), before, strict=True))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("net", [batch_norm_net, group_norm_net, quantized_net])
def test_every_batch_and_norm(net: Any, batch: int) -> None:
    adapter = build(net())
    for x in stream(batch=batch):
        assert torch.isfinite(adapter(x)).all()
    assert adapter.counters["updates"] == 3


def test_composes_with_the_balance_of_the_classes() -> None:
    plain, balanced = (build(abl=abl, **SGD) for abl in (None, "gradient"))
    for x in stream():
        plain(x), balanced(x)
    assert not torch.equal(plain.predict(stream()[0]), balanced.predict(stream()[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source_images": None}, "RMT: source_images is None, expected at least 2 images .* use 'cotta'"),
        ({"source_images": torch.rand(3, 8, 8)}, r"RMT: source_images is shape \(3, 8, 8\)"),
        ({"teacher_momentum": 1.1}, "RMT: teacher_momentum is 1.1, expected a number from 0 to 1"),
        ({"contrast_weight": -1}, "RMT: contrast_weight is -1"),
        ({"contrast_weight": math.nan}, "RMT: contrast_weight is nan"),
        ({"temperature": 0}, "RMT: temperature is 0, expected a number from 0.001 to 1000"),
        ({"temperature": True}, "RMT: temperature is True"),
        ({"tau": 0.1}, "RMT: no option is named tau"),
    ],
)
def test_refuses_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(**options)


def test_refuses_a_model_without_a_last_linear_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(InputError, match="RMT: the model has no linear layer"):
        build(model)
