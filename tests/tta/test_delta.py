"""DELTA against an independent float64 statement of its losses, weights and renormalised batch norm."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tta_cases import CLASSES, batch_norm_net, group_norm_net, stream

from ttaq.errors import InputError
from ttaq.tta import METHODS, Tent

DELTA = METHODS["delta"]
SGD = {"optimizer": "sgd", "lr": 0.05}


def decided_net() -> nn.Sequential:
    """A net that is sure of some images and not of others."""
    net = batch_norm_net()
    with torch.no_grad():
        net[-1].weight.mul_(6)
    return net


def varied(batches: int) -> list[Tensor]:
    """Batches of 8 images of different brightness, whose predictions therefore differ."""
    return [x * torch.linspace(0.2, 2, 8).view(8, 1, 1, 1) for x in stream(batches, batch=8)]


class Reference:
    def __init__(self, loss: str, renormalise: bool, reweight: bool, prior: float = 0.95, statistics: float = 0.95):
        self.net = decided_net().double()
        self.loss, self.renormalise, self.reweight = loss, renormalise, reweight
        self.prior, self.keep = prior, statistics
        self.norms = [layer for layer in self.net if isinstance(layer, nn.BatchNorm2d)]
        affine = [parameter for layer in self.norms for parameter in layer.parameters()]
        self.optimizer = torch.optim.SGD(affine, lr=SGD["lr"], momentum=0.9)
        self.moving: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.frequency = torch.full((CLASSES,), 1 / CLASSES, dtype=torch.float64)
        self.used: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        x = x.double()
        for layer in self.net:
            if layer not in self.norms:
                x = layer(x)
                continue
            mean = x.mean((0, 2, 3))
            std = (x.var((0, 2, 3), correction=0) + layer.eps).sqrt()
            old = self.moving.get(layer, (mean.detach(), std.detach()))
            x = (x - mean[:, None, None]) / std[:, None, None]
            if self.renormalise:
                r, d = (std / old[1]).detach(), ((mean - old[0]) / old[1]).detach()
                x = x * r[:, None, None] + d[:, None, None]
            x = x * layer.weight[:, None, None] + layer.bias[:, None, None]
            batch = (mean.detach(), std.detach())
            self.moving[layer] = tuple(self.keep * a + (1 - self.keep) * b for a, b in zip(old, batch, strict=True))
        return x

    def step(self, x: Tensor) -> Tensor:
        logits = self.forward(x)
        p = logits.softmax(1)
        total = []
        inverse = [1 / self.frequency[row.argmax()] for row in p]
        for row, one in zip(p, inverse, strict=True):
            entropy = -(row * row.log()).sum()
            w = len(p) * one / sum(inverse) if self.reweight else 1.0
            if self.loss == "entropy":
                total.append(w * entropy)
            elif self.loss == "weighted":
                e = (0.5 * math.log(CLASSES) - entropy).exp().detach()
                total += [w * e * entropy] if e > 1 else []
            elif row.max() > 0.4:
                total.append(-w * row.max().log())
        self.used.append(len(total))
        if total:
            self.optimizer.zero_grad()
            (sum(total) / len(total)).backward()
            self.optimizer.step()
        self.frequency = self.prior * self.frequency + (1 - self.prior) * p.detach().mean(0)
        return logits.detach()


@pytest.mark.parametrize("reweight", [True, False])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("loss", ["entropy", "weighted", "pseudo_label"])
def test_is_the_update_of_the_paper(loss: str, renormalise: bool, reweight: bool) -> None:
    reference = Reference(loss, renormalise, reweight)
    delta = DELTA(decided_net(), loss=loss, renormalise=renormalise, reweight=reweight, **SGD)
    xs = varied(4)
    for x in xs:
        torch.testing.assert_close(delta(x).double(), reference.step(x), rtol=1e-4, atol=1e-4)
    for name, parameter in delta.parameters_adapted():
        expected = reference.net.get_parameter(name).detach()
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(delta.frequency.double(), reference.frequency, rtol=1e-5, atol=1e-6)
    assert delta.counters["used"] == sum(reference.used)
    if loss != "entropy":
        assert 0 < sum(reference.used) < 32


def test_the_momenta_are_options() -> None:
    reference = Reference("entropy", True, True, prior=0.5, statistics=0.25)
    delta = DELTA(decided_net(), prior_momentum=0.5, statistics_momentum=0.25, **SGD)
    for x in varied(4):
        torch.testing.assert_close(delta(x).double(), reference.step(x), rtol=1e-4, atol=1e-4)
    for layer, own in zip(reference.norms, (delta.model[1], delta.model[4]), strict=True):
        torch.testing.assert_close(own.moving_mean.double(), reference.moving[layer][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own.moving_std.double(), reference.moving[layer][1], rtol=1e-4, atol=1e-5)


def test_hand_worked_class_weights() -> None:
    delta = DELTA(decided_net())
    delta.frequency.copy_(torch.tensor([0.5, 0.25, 0.125, 0.0, 0.125]))
    weights = delta._class_weights(torch.tensor([0, 0, 1, 2]))  # 1/q: 2, 2, 4, 8 with mean 4
    assert weights.tolist() == [0.5, 0.5, 1.0, 2.0]
    assert delta._class_weights(torch.tensor([3, 0])).isfinite().all()


def test_without_both_corrections_it_is_tent() -> None:
    tent, delta = Tent(batch_norm_net(), **SGD), DELTA(batch_norm_net(), renormalise=False, reweight=False, **SGD)
    assert delta.buffers_adapted() == []
    for x in stream():
        torch.testing.assert_close(delta(x), tent(x), rtol=1e-6, atol=1e-6)


def test_the_first_batch_stands_in_for_the_moving_statistics() -> None:
    tent, delta = Tent(batch_norm_net()), DELTA(batch_norm_net())
    first, second = stream(2)
    torch.testing.assert_close(delta.predict(first), tent.predict(first), rtol=1e-6, atol=1e-6)
    assert [name for name, _ in delta.buffers_adapted()] == [
        "1.moving_mean",
        "1.moving_std",
        "4.moving_mean",
        "4.moving_std",
    ]
    assert not any(buffer.any() for _, buffer in delta.buffers_adapted())
    conv = delta.model[0](first).detach()
    delta(first)
    torch.testing.assert_close(delta.model[1].moving_mean, conv.mean((0, 2, 3)))
    std = (conv.var((0, 2, 3), correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(delta.model[1].moving_std, std)
    conv = delta.model[0](second).detach()
    delta(second)
    torch.testing.assert_close(
        delta.model[1].moving_std, 0.95 * std + 0.05 * (conv.var((0, 2, 3), correction=0) + 1e-5).sqrt()
    )


def test_a_batch_that_is_not_finite_is_no_first_batch() -> None:
    delta, fresh = DELTA(batch_norm_net(), check_finite=False), DELTA(batch_norm_net(), check_finite=False)
    delta(torch.full((2, 3, 8, 8), float("nan")))
    assert delta.counters["updates"] == 0
    for x in stream():
        assert torch.equal(delta(x), fresh(x))


def test_where_no_sample_is_used_only_statistics_and_frequencies_move() -> None:
    net = batch_norm_net()
    with torch.no_grad():
        net[-1].weight.mul_(0.01)
        net[-1].bias.zero_()
    for loss in ("weighted", "pseudo_label"):
        delta = DELTA(net, loss=loss, **SGD)
        before = delta.state_dict()
        delta(stream()[0])
        after = delta.state_dict()
        assert delta.counters["used"] == delta.counters["updates"] == 0
        assert all(torch.equal(after["adapted"][name], value) for name, value in before["adapted"].items())
        assert all(torch.equal(after["optimizer"][name], value) for name, value in before["optimizer"].items())
        assert not torch.equal(after["extra"]["frequency"], before["extra"]["frequency"])
        assert after["extra"]["model.1.moving_std"].all()


@pytest.mark.parametrize("loss", ["entropy", "weighted", "pseudo_label"])
@pytest.mark.parametrize("abl", [{"abl": "gradient"}, {"abl": "frequency", "abl_loss": "offset"}])
def test_composes_with_the_balance(loss: str, abl: dict[str, Any]) -> None:
    plain, balanced = DELTA(decided_net(), loss=loss, **SGD), DELTA(decided_net(), loss=loss, **abl, **SGD)
    xs = varied(3)
    for x in xs:
        plain(x), balanced(x)
    assert balanced.balance.pi.sum().item() == pytest.approx(1)
    assert not torch.allclose(balanced.balance.pi, torch.full((CLASSES,), 1 / CLASSES))
    assert not torch.allclose(plain.predict(xs[0]), balanced.predict(xs[0]))


def test_a_model_without_batch_norm_has_nothing_to_renormalise() -> None:
    delta = DELTA(group_norm_net(), **SGD)
    assert delta.buffers_adapted() == []
    before = delta.state_dict()["adapted"]
    delta(stream()[0])
    assert any(not torch.equal(value, before[name]) for name, value in delta.parameters_adapted())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "mse"}, "loss is 'mse', expected one of entropy, weighted, pseudo_label"),
        ({"renormalise": 1}, "renormalise is 1, expected True or False"),
        ({"reweight": None}, "reweight is None, expected True or False"),
        ({"prior_momentum": 1}, r"prior_momentum is 1, expected a number in \[0, 1\)"),
        ({"prior_momentum": -0.1}, "prior_momentum is -0.1"),
        ({"statistics_momentum": float("nan")}, "statistics_momentum is nan"),
        ({"statistics_momentum": "slow"}, "statistics_momentum is 'slow'"),
        ({"margin": 1}, "no option is named margin"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^DELTA: {message}"):
        DELTA(batch_norm_net(), **options)
