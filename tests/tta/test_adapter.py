"""The parts of Adapter that are not a promise of every method: errors of models, interruption, building by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tta_cases import CLASSES, TESTED, Everything, assert_same, batch_norm_net, stream

from ttaq.errors import CheckpointError, InputError
from ttaq.tta import METHODS, Guarded, Norm, Source, Tent, build


class Answer(nn.Module):
    """A model that answers with whatever it is told to make of its logits."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.net, self.change = batch_norm_net(), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.net(x))


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda z: {"logits": z}, "dict"),
        (lambda z: (z, z), "tuple"),
        (lambda z: z[:, :, None], r"shape \(4, 5, 1\)"),
        (lambda z: z[0], r"shape \(5,\)"),
        (lambda z: z.repeat(2, 1), r"shape \(8, 5\)"),
    ],
)
def test_answers_that_are_no_logits_are_refused(change: Any, got: str) -> None:
    adapter = Tent(Answer(change))
    before = adapter.state_dict()
    with pytest.raises(InputError, match=rf"Tent: the model answers with {got}, expected logits \[4, classes\]"):
        adapter(stream()[0])
    assert_same(adapter.state_dict(), before)


def test_a_model_that_stops_gradients_is_refused() -> None:
    adapter = Tent(Answer(torch.Tensor.detach))
    before = adapter.state_dict()
    with pytest.raises(InputError, match="Tent: the loss does not depend on any adapted parameter"):
        adapter(stream()[0])
    assert_same(adapter.state_dict(), before)


def test_a_model_that_cannot_take_one_image_takes_more() -> None:
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192, track_running_stats=False), nn.Linear(192, 5))
    adapter = Source(net)
    assert adapter(stream()[0]).shape == (4, 5)


def test_running_out_of_memory_is_not_an_error_of_the_images() -> None:
    def fail(_z: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Tent(Answer(fail))(stream()[0])


def test_an_interrupted_step_leaves_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, twin = Tent(batch_norm_net()), Tent(batch_norm_net())
    first, second = stream(2)

    def interrupt(*_args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(adapter.optimizer, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            adapter(first)
    assert all(parameter.grad is None for parameter in adapter.parameters())
    assert_same(adapter.state_dict(), twin.state_dict())
    assert torch.equal(adapter(second), twin(second))


def test_gradients_are_computed_outside_autocast() -> None:
    inside = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            inside.append(torch.is_autocast_enabled("cpu"))
            return z.clone()

        @staticmethod
        def backward(ctx: Any, *grad: Tensor) -> Tensor:
            inside.append(torch.is_autocast_enabled("cpu"))
            return grad[0]

    adapter = Tent(Answer(Watch.apply))
    adapter.predict(stream()[0])
    inside.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adapter(stream()[0])
    assert inside == [True, True, False]  # the first look at images under autocast, the step's forward, its backward


def test_counters_count() -> None:
    for adapter, updates in ((Source(batch_norm_net()), 0), (Norm(batch_norm_net()), 0), (Tent(batch_norm_net()), 3)):
        for size in (4, 1, 2):
            adapter(stream(1, size)[0])
        assert adapter.counters == {"batches": 3, "samples": 7, "updates": updates}
        adapter.reset()
        assert set(adapter.counters.values()) == {0}


def test_source_is_the_model_in_eval_mode() -> None:
    net = batch_norm_net()
    for x in stream():
        assert torch.equal(Source(net.train())(x), net.eval()(x).detach())


def test_state_of_a_method_with_buffers() -> None:
    adapter = Everything(batch_norm_net())
    assert list(adapter.state_dict()["extra"]) == ["_tally", "mean"]
    adapter(stream()[0])
    assert adapter.mean.sum().item() == pytest.approx(1)
    assert adapter.mean.std() > 0
    adapter.reset()
    assert torch.equal(adapter.mean, torch.full((5,), 0.2))


def test_a_shared_norm_is_learned_and_hashed_once() -> None:
    norm = nn.BatchNorm2d(3)
    adapter = Tent(nn.Sequential(norm, nn.ReLU(), norm, nn.Flatten(), nn.Linear(192, 4)), lr=0.1)
    assert [name for name, _ in adapter.parameters_adapted()] == ["0.weight", "0.bias"]
    source = Tent(nn.Sequential(norm, nn.ReLU(), norm, nn.Flatten(), adapter.model[4]), lr=0.1).state_dict()["source"]
    adapter(stream()[0])
    assert adapter.model[0] is adapter.model[2]
    assert adapter.state_dict()["source"] == source


def test_a_model_that_normalises_in_place_sees_each_image_once() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2).sub_(0.5)

    x = stream()[0]
    expected = Source(batch_norm_net())(x * 2 - 0.5)
    assert torch.equal(Source(nn.Sequential(InPlace(), batch_norm_net()))(x), expected)


def test_a_parent_cannot_save_an_adapter_in_passing() -> None:
    with pytest.raises(InputError, match=r"Tent.state_dict: takes no arguments"):
        nn.Sequential(Tent(batch_norm_net())).state_dict()


def test_build_by_name() -> None:
    assert list(METHODS)[:3] == ["source", "norm", "tent"]
    tent = build("tent", batch_norm_net(), lr=0.5, optimizer="sgd", check_finite=False)
    assert isinstance(tent, Tent)
    assert not tent.check_finite
    assert tent.options == {"lr": 0.5, "optimizer": "sgd", "momentum": 0.9, "nesterov": False}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tend", {}, "build: unknown method 'tend', expected one of "),
        (
            "tent",
            {"alpha": 1},
            "Tent: no option is named alpha, expected some of: lr, optimizer, momentum, nesterov, abl, abl_loss",
        ),
        ("source", {"lr": 1}, "build: source: got an unexpected keyword argument 'lr'"),
        ("norm", {"alpha": 2}, "Norm: alpha is 2"),
    ],
)
def test_build_refuses_names_and_options_it_does_not_know(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(name, batch_norm_net(), **options)


class Narrowing(nn.Module):
    """A model that answers with fewer classes when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.net = batch_norm_net()
        self.register_buffer("classes", torch.tensor(CLASSES), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits[:, : int(self.classes)]


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("name", sorted(TESTED))
def test_another_number_of_classes_is_refused_and_changes_nothing(name: str, guarded: bool) -> None:
    adapter, twin = TESTED[name](Narrowing()), TESTED[name](Narrowing())
    stepper, other = (Guarded(adapter), Guarded(twin)) if guarded else (adapter, twin)
    first, second = stream(2)
    assert torch.equal(stepper(first), other(first))
    before = stepper.state_dict()
    adapter.model.classes.fill_(CLASSES - 1)
    with pytest.raises(InputError, match="answers with 4 classes"):
        stepper(second)
    assert_same(stepper.state_dict(), before)
    adapter.model.classes.fill_(CLASSES)
    assert torch.equal(stepper(second), other(second))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_gray_images_are_taken_or_refused_before_anything_changes(name: str) -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 1), *batch_norm_net()).eval()
    options = {"source_images": torch.cat(stream(seed=98))[:, :1]} if METHODS[name].source_images else {}
    adapter = METHODS[name](net, **options)
    before, gray = adapter.state_dict(), stream()[0][:, :1]
    if adapter.augments:
        with pytest.raises(InputError, match=r"expected \[B, 3, H, W\], whose colours it can change"):
            adapter(gray)
        assert_same(adapter.state_dict(), before)
    else:
        assert adapter(gray).shape == (4, CLASSES)
    assert adapter.augments == (name in {"cotta", "rmt", "roid", "rotta"})


@pytest.mark.parametrize("name", ["cotta", "rmt", "roid", "rotta"])
def test_a_seed_draws_what_a_method_draws(name: str) -> None:
    options = {"rotta": {"update_every": 4}, "cotta": {"augmentations": 2}}.get(name, {})
    options |= {"source_images": torch.cat(stream(seed=98))}
    none, zero, one = (build(name, batch_norm_net(), **options, **seed) for seed in ({}, {"seed": 0}, {"seed": 1}))
    outputs = [[adapter(x) for x in stream()] for adapter in (none, zero, one)]
    assert_same(outputs[0], outputs[1])
    assert not all(torch.equal(a, b) for a, b in zip(outputs[0], outputs[2], strict=True))
    with pytest.raises(CheckpointError, match="saved with seed 1, expected 0"):
        zero.load_state_dict(one.state_dict())


@pytest.mark.parametrize("seed", [-1, 2**31, 0.5, None])
def test_refuses_seeds_out_of_range(seed: Any) -> None:
    with pytest.raises(InputError, match=r"seed is .*, expected an integer from 0 below 2\^31"):
        build("tent", batch_norm_net(), seed=seed)
