"""RoTTA: its bank against a statement with a list for each class, its step against two whole models, its options."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tta_cases import CLASSES, assert_same, batch_norm_net, group_norm_net, quantized_net, stream

from ttaq.data.augment import augment
from ttaq.errors import CheckpointError, InputError
from ttaq.tta.rotta import Bank, RoTTA

SGD: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.9, "lr": 0.1}


class ListedBank:
    """For each class a list of [image, entropy, age]: the memory of the paper's algorithm."""

    def __init__(self, capacity: int, classes: int) -> None:
        self.capacity, self.classes = capacity, classes
        self.lists: list[list[list[Any]]] = [[] for _ in range(classes)]

    def score(self, entropy: float, age: float) -> float:
        return 1 / (1 + math.exp(-age / self.capacity)) + entropy / math.log(self.classes)

    def make_room(self, label: int, score: float) -> bool:
        sizes = [len(items) for items in self.lists]
        if sizes[label] < self.capacity / self.classes:
            if sum(sizes) < self.capacity:
                return True
            among = [index for index, size in enumerate(sizes) if size == max(sizes)]
        else:
            among = [label]
        candidates = [(self.score(item[1], item[2]), index, item) for index in among for item in self.lists[index]]
        highest, index, item = max(candidates, key=lambda entry: entry[0])
        if highest > score:
            self.lists[index].remove(item)
            return True
        return False

    def add(self, image: int, label: int, entropy: float) -> None:
        if self.make_room(label, self.score(entropy, 0)):
            self.lists[label].append([image, entropy, 0])
        for items in self.lists:
            for item in items:
                item[2] += 1

    def contents(self) -> list[tuple[int, int, int]]:
        """(image, label, age)"""
        return sorted((item[0], label, item[2]) for label, items in enumerate(self.lists) for item in items)


@pytest.mark.parametrize(("capacity", "classes"), [(8, 3), (6, 6), (5, 20), (64, 10)])
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("skewed", [False, True])
def test_the_bank_keeps_what_the_paper_keeps(capacity: int, classes: int, batch: int, skewed: bool) -> None:
    generator = torch.Generator().manual_seed(capacity)
    bank, listed = Bank(capacity, classes), ListedBank(capacity, classes)
    entropies = torch.rand(280, generator=generator) * math.log(classes)
    labels = torch.randint(classes, (280,), generator=generator)
    if skewed:  # runs of one class
        labels = labels.sort().values
    images = torch.arange(280.0).view(-1, 1, 1, 1)
    for start in range(0, 280, batch):
        part = slice(start, start + batch)
        bank.take(images[part], labels[part].tolist(), entropies[part].tolist())
        for index in range(start, start + batch):
            listed.add(index, int(labels[index]), float(entropies[index]))
        kept, ages = bank.contents()
        got = sorted(zip(kept.flatten().int().tolist(), bank.labels[: len(kept)].tolist(), ages.tolist(), strict=True))
        assert got == listed.contents()
    assert (bank.labels == -1).sum() == capacity - len(kept)
    assert len(kept) == capacity or capacity < classes or capacity % classes  # a class has its quota, rounded up
    for place, image in enumerate(kept.flatten().int().tolist()):
        assert bank.entropies[place] == entropies[image]


def test_the_bank_by_hand() -> None:
    bank = Bank(2, 2)  # one image per class; scores 0.5 + H / ln 2 when they come
    image = torch.arange(5.0).view(5, 1, 1, 1, 1)
    bank.take(image[0], [0], [0.1])
    bank.take(image[1], [0], [0.3])  # 0.93 against 1 / (1 + exp(-1/2)) + 0.14 = 0.77: dropped
    assert bank.labels.tolist() == [0, -1]
    assert bank.ages.tolist() == [2, 0]
    bank.take(image[2], [0], [0.2])  # 0.79 against 1 / (1 + exp(-1)) + 0.14 = 0.88: in its place
    assert bank.images.flatten().tolist() == [2, 0]
    assert bank.ages.tolist() == [1, 0]
    bank.take(image[3], [1], [0.6])  # a free place, however uncertain
    assert bank.images.flatten().tolist() == [2, 3]
    bank.take(image[4], [1], [math.nan])
    assert bank.images.flatten().tolist() == [2, 3]
    assert bank.ages.tolist() == [2, 1]


def test_images_of_another_size_are_resized() -> None:
    bank = Bank(4, 2)
    bank.take(torch.zeros(1, 3, 4, 4), [0], [0.1])
    bank.take(torch.ones(1, 3, 2, 6), [1], [0.1])
    images, _ = bank.contents()
    assert images.shape == (2, 3, 4, 4)
    assert images[1].eq(1).all()


class RobustNorm(nn.Module):
    """Running statistics that take in the batch before they are used."""

    def __init__(self, layer: nn.BatchNorm2d, share: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.share = layer.weight, layer.bias, layer.eps, share
        self.mean, self.var = layer.running_mean.clone(), layer.running_var.clone()

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.mean, self.var
        if self.training:
            mean = (1 - self.share) * mean + self.share * x.mean((0, 2, 3))
            var = (1 - self.share) * var + self.share * x.var((0, 2, 3), correction=0)
            self.mean, self.var = mean.detach(), var.detach()
        shape = (1, -1, 1, 1)
        x = (x - mean.view(shape)) / (var.view(shape) + self.eps).sqrt()
        return x * self.weight.view(shape) + self.bias.view(shape)


def robust_net(share: float) -> nn.Sequential:
    net = batch_norm_net().requires_grad_(False)
    for index, layer in enumerate(net):
        if isinstance(layer, nn.BatchNorm2d):
            net[index] = RobustNorm(layer.requires_grad_(True), share)
    net[8] = nn.Identity()  # dropout
    return net


def test_follows_the_published_update() -> None:
    share, momentum, capacity, every = 0.1, 0.8, 6, 5
    adapter = RoTTA(
        batch_norm_net(), capacity=capacity, update_every=every, teacher_momentum=momentum, norm_share=share, **SGD
    )
    student, teacher = robust_net(share), robust_net(share)
    norms = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(norms, lr=0.1, momentum=0.9)
    listed, seen, steps = ListedBank(capacity, CLASSES), 0, 0
    everything = torch.cat(stream(4, batch=7))
    for number, x in enumerate(everything.split(7)):
        answers = teacher.eval()(x).detach()
        p = answers.softmax(1)
        entropy = -(p * p.log()).sum(1)
        generator = torch.Generator().manual_seed(number)
        for label, value in zip(answers.argmax(1).tolist(), entropy.tolist(), strict=True):
            listed.add(seen, label, value)
            seen += 1
            if seen % every == 0:
                steps += 1
                held = listed.contents()
                images, ages = everything[[item[0] for item in held]], torch.tensor([item[2] for item in held])
                y = teacher.train()(images).detach()
                z = student.train()(augment(images, generator))
                weight = (-ages / capacity).exp() / (1 + (-ages / capacity).exp())
                loss = (weight * -(y.softmax(1) * z.log_softmax(1)).sum(1)).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    for mine, other in zip(teacher.parameters(), student.parameters(), strict=True):
                        mine.copy_(momentum * mine + (1 - momentum) * other)
        torch.testing.assert_close(adapter(x), answers, rtol=1e-4, atol=1e-5)
    assert adapter.counters["updates"] == steps == 5
    for (name, got), expected in zip(adapter.parameters_adapted(), norms, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=name)
    values = adapter.teacher.values()
    for index in (1, 4):
        for key, got in (("mean", "running_mean"), ("var", "running_var")):
            torch.testing.assert_close(values[f"{index}.{got}"], getattr(teacher[index], key))
            # The noise falls on the images in the order of the bank, which is another one here.
            buffer = adapter.model.get_buffer(f"{index}.{got}")
            torch.testing.assert_close(buffer, getattr(student[index], key), rtol=1e-3, atol=1e-4)


def test_answers_are_those_of_the_teacher_and_one_batch_may_hold_several_steps() -> None:
    whole, parts = (RoTTA(batch_norm_net(), capacity=8, update_every=4, lr=0.05) for _ in range(2))
    x = torch.cat(stream(3))
    before = copy.deepcopy(whole)
    answers = whole(x)
    assert torch.equal(answers, before.predict(x))
    assert whole.counters["updates"] == 3
    for part in x.split(3):
        parts(part)
    assert parts.counters["updates"] == 3
    assert parts.bank.contents()[0].shape == whole.bank.contents()[0].shape


def test_the_teacher_is_slow_and_the_convolutions_stay() -> None:
    adapter = RoTTA(batch_norm_net(), capacity=8, update_every=4, lr=0.05)
    source = batch_norm_net()
    for x in stream():
        adapter(x)
    learned = dict(adapter.parameters_adapted())
    assert sorted(learned) == ["1.bias", "1.weight", "4.bias", "4.weight"]
    for name, parameter in learned.items():
        mine, begin = adapter.teacher.values()[name], source.get_parameter(name)
        assert 0 < (mine - begin).norm() < 0.01 * (parameter - begin).norm()
    assert torch.equal(adapter.model[3].weight, source[3].weight)


def test_the_bank_is_saved_reset_and_refused_when_damaged() -> None:
    adapter = RoTTA(batch_norm_net(), capacity=8, update_every=4)
    fresh = adapter.state_dict()
    assert fresh["extra"]["bank.images"].shape == (8, 0, 0, 0)
    adapter(stream(1, size=9)[0])
    state = adapter.state_dict()
    assert state["extra"]["bank.images"].shape == (8, 3, 9, 9)
    other = RoTTA(batch_norm_net(), capacity=8, update_every=4)
    other(stream()[0])  # images of another size
    other.load_state_dict(state)
    assert_same(other.state_dict(), state)
    adapter.reset()
    assert_same(adapter.state_dict(), fresh)
    for value in (torch.zeros(7, 3, 9, 9), torch.zeros(8, 3, 9), torch.zeros(8, 3, 9, 9).double(), None):
        damaged = copy.deepcopy(state)
        damaged["extra"]["bank.images"] = value
        with pytest.raises(CheckpointError, match=r"extra bank.images is .*, expected torch.float32 \(8, 'any'"):
            other.load_state_dict(damaged)
    assert_same(other.state_dict(), state)


def test_images_that_are_not_finite_are_neither_kept_nor_learned() -> None:
    adapter = RoTTA(batch_norm_net(), capacity=8, update_every=4, check_finite=False)
    adapter(torch.full((4, 3, 8, 8), math.nan))
    assert adapter.counters["updates"] == 0
    assert (adapter.bank.labels == -1).all()
    mixed = stream()[0]
    mixed[1] = math.nan
    adapter(mixed)
    assert adapter.counters["updates"] == 1
    assert len(adapter.bank.contents()[0]) <= 3
    assert torch.isfinite(adapter(stream()[1])).all()


@pytest.mark.parametrize("net", [group_norm_net, quantized_net])
def test_other_norms_and_quantized_models(net: Any) -> None:
    adapter = RoTTA(net(), capacity=8, update_every=2)
    for x in stream(batch=1, batches=4):
        assert torch.isfinite(adapter(x)).all()
    assert adapter.counters["updates"] == 2


def test_composes_with_the_balance_of_the_classes() -> None:
    plain, balanced = (
        RoTTA(batch_norm_net(), capacity=8, update_every=4, abl=abl, teacher_momentum=0.5, **SGD)
        for abl in (None, "gradient")
    )
    for x in stream():
        plain(x), balanced(x)
    assert not torch.equal(plain.predict(stream()[0]), balanced.predict(stream()[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, "RoTTA: capacity is 0, expected an integer of at least 1"),
        ({"update_every": 1.5}, "RoTTA: update_every is 1.5"),
        ({"teacher_momentum": 2}, r"RoTTA: teacher_momentum is 2, expected a number in \[0, 1\]"),
        ({"norm_share": -0.1}, "RoTTA: norm_share is -0.1"),
        ({"nu": 0.001}, "RoTTA: no option is named nu"),
    ],
)
def test_refuses_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RoTTA(batch_norm_net(), **options)


def test_refuses_models_that_do_not_fit() -> None:
    net = batch_norm_net()
    net[4] = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(InputError, match="RoTTA: 4 has no running statistics"):
        RoTTA(net)
    net = nn.Sequential(*batch_norm_net(), nn.Linear(CLASSES, 7), nn.Unflatten(1, (7, 1)), nn.Flatten(2), nn.Flatten())
    net.append(nn.ZeroPad1d((0, 1)))
    with pytest.raises(InputError, match="answers with 8 classes and its last linear layer has 7"):
        RoTTA(net)(stream()[0])
