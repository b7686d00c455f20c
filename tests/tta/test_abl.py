"""The adaptive balance loss: its prior and its term by hand, and what it composes with."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tta_cases import CLASSES, assert_same, batch_norm_net, quantized_net, stream

from ttaq.errors import InputError
from ttaq.tta import build
from ttaq.tta.abl import Balance
from ttaq_kernels import softmax_entropy

ENTROPY_LIKE = ("tent", "eta", "eata", "rdumb", "sar", "roid")
PRIORS = ("frequency", "gradient", "inverse", "soft")
LOSSES = ("soft", "hard", "offset")


def balance(prior: str = "frequency", loss: str = "soft", weight: float = 1.0, momentum: float = 0.5) -> Balance:
    return Balance(2, prior=prior, loss=loss, weight=weight, momentum=momentum)


# Two samples of class 0 and none of class 1; with equal logits in the second row nothing is certain.
LOGITS = torch.tensor([[math.log(3.0), 0.0], [math.log(3.0), 0.0]])
FEATURES = torch.tensor([[1.0, 2.0], [3.0, 2.0]])


def test_prior_from_frequencies() -> None:
    prior = balance()
    prior.observe(LOGITS, None, None)
    # 0.5 * (1/2, 1/2) + 0.5 * (1, 0), above the floor of 0.05
    torch.testing.assert_close(prior.pi, torch.tensor([0.75, 0.25]))


def test_the_floor_keeps_a_class_that_never_comes() -> None:
    prior = balance(momentum=0.0)
    prior.observe(LOGITS, None, None)
    torch.testing.assert_close(prior.pi, torch.tensor([1.0, 0.05]) / 1.05)


@pytest.mark.parametrize(("classes", "images", "momentum"), [(2, 200, 0.9), (10, 50, 0.9), (1000, 50, 0.99)])
def test_the_momentum_goes_by_the_number_of_classes(classes: int, images: int, momentum: float) -> None:
    prior = Balance(classes, prior="frequency", loss="soft", weight=1.0, momentum=None)
    z = torch.zeros(images, classes)
    z[:, 0] = 1.0
    prior.observe(z, None, None)
    others = momentum / classes
    torch.testing.assert_close(prior.pi[0], torch.tensor(1 - others * (classes - 1)), rtol=1e-5, atol=1e-7)


def test_forgets_everything() -> None:
    prior = balance("gradient")
    prior.observe(LOGITS, FEATURES, None)
    prior.forget()
    assert_same(prior.state_dict(), balance("gradient").state_dict())


@pytest.mark.parametrize("kind", ["gradient", "inverse", "soft"])
def test_gradient_of_the_classifier_by_autograd(kind: str) -> None:
    """Phi is the norm of the rows of dH/dW for z = W h."""
    weight = torch.tensor([[0.2, 0.4], [-0.3, 0.1], [0.5, -0.2]], dtype=torch.float64, requires_grad=True)
    z = FEATURES.double() @ weight.T
    p = z.softmax(1)
    gradient = torch.autograd.grad(-(p * p.log()).sum(1).mean(), weight)[0]
    norms = gradient.norm(dim=1)
    prior = Balance(3, prior=kind, loss="soft", weight=1.0, momentum=0.5)
    prior.observe(z.detach().float(), FEATURES, None)
    phi = norms * (0.5 if kind == "soft" else 1.0)
    torch.testing.assert_close(prior.phi.double(), phi, rtol=1e-5, atol=1e-6)
    ratio = phi.min() / phi if kind == "inverse" else phi / phi.mean()
    hard = torch.nn.functional.one_hot(z.argmax(1), 3).double()
    share = (p if kind == "soft" else hard).mean(0)
    expected = (0.5 / 3 + 0.5 * share * ratio).clamp(min=0.1 / 3).detach()
    torch.testing.assert_close(prior.pi.double(), expected / expected.sum(), rtol=1e-5, atol=1e-6)


def test_samples_left_out_add_no_gradient_of_the_classifier() -> None:
    both, one = balance("gradient"), balance("gradient")
    both.observe(LOGITS, FEATURES, torch.tensor([True, False]))
    one.observe(LOGITS, FEATURES * torch.tensor([[1.0], [0.0]]), None)
    torch.testing.assert_close(both.phi, one.phi)


@pytest.mark.parametrize("loss", ["soft", "hard"])
def test_gradient_of_the_term(loss: str) -> None:
    prior = balance(loss=loss, weight=2.0)
    prior.pi.copy_(torch.tensor([0.8, 0.2]))
    z = torch.tensor([[math.log(3.0), 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(prior.correction(z, None), z)
    # p = (3, 1) / 4, p~ = (3 * 0.8, 0.2) / 2.6
    adjusted = torch.tensor([[2.4, 0.2]]) / 2.6
    target = torch.tensor([[0.75, 0.25]]) if loss == "soft" else torch.tensor([[1.0, 0.0]])
    torch.testing.assert_close(gradient, 2.0 * (adjusted - target))


def test_a_uniform_prior_adds_no_gradient() -> None:
    z = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(balance().correction(z, None), z)
    torch.testing.assert_close(gradient, torch.zeros_like(z), rtol=0, atol=1e-7)


def test_weights_leave_samples_out() -> None:
    prior = balance()
    prior.pi.copy_(torch.tensor([0.8, 0.2]))
    z = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    kept = torch.tensor([True, False, True, False])
    torch.testing.assert_close(prior.correction(z, kept), prior.correction(z[kept], None))


def test_offset_is_the_loss_of_adjusted_logits() -> None:
    prior = balance(loss="offset", weight=0.5)
    prior.pi.copy_(torch.tensor([0.8, 0.2]))
    offset = prior.offset
    assert offset is not None
    torch.testing.assert_close(offset, -0.5 * torch.tensor([0.8, 0.2]).log())
    assert float(prior.correction(LOGITS, None)) == 0
    torch.testing.assert_close(softmax_entropy(LOGITS, offset=offset), softmax_entropy(LOGITS + offset))


def test_a_batch_that_is_not_finite_leaves_the_prior() -> None:
    for kind in PRIORS:
        prior = balance(kind)
        prior.observe(LOGITS, FEATURES, None)
        phi = prior.phi.clone()
        prior.observe(LOGITS * math.nan, FEATURES, None)
        assert bool(prior.pi.isfinite().all())
        assert torch.equal(prior.phi, phi)


OPTIONS: dict[str, dict[str, Any]] = {
    "eta": {"entropy_margin": 2.0, "redundancy": 2.0},
    "eata": {"entropy_margin": 2.0, "redundancy": 2.0, "source_images": torch.cat(stream(seed=98))},
    "rdumb": {"entropy_margin": 2.0, "redundancy": 2.0},
    "sar": {"entropy_margin": 2.0},
}


@pytest.mark.parametrize("name", ENTROPY_LIKE)
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("loss", LOSSES)
def test_composes(name: str, prior: str, loss: str) -> None:
    """It changes what is learned, its state resumes and resets, on a float and on a quantized model."""
    for net in (batch_norm_net, quantized_net):
        options = {**OPTIONS.get(name, {}), "lr": 5e-2}
        plain = build(name, net(), **options)
        own, fresh, resumed = (
            build(name, net(), **options, abl=prior, abl_loss=loss, abl_momentum=0.5) for _ in range(3)
        )
        first, *rest = stream(4)
        plain(first), own(first)
        resumed.load_state_dict(own.state_dict())
        expected = [own(x) for x in rest]
        assert_same([resumed(x) for x in rest], expected)
        assert any(not torch.equal(a, plain(x)) for a, x in zip(expected, rest, strict=True))
        own.reset()
        assert_same(own.state_dict(), fresh.state_dict())


@pytest.mark.parametrize("name", ENTROPY_LIKE)
def test_off_is_the_method_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on and does nothing changes no bit; off, nothing of it is even made (`test_parity.py`: the method)."""
    options = OPTIONS.get(name, {}) | {"lr": 5e-2}
    zero = build(name, batch_norm_net(), **options, abl="frequency", abl_weight=0.0, abl_answer=0.0)
    monkeypatch.setattr(Balance, "__init__", lambda *_, **__: pytest.fail("the balance is off"))
    plain = build(name, batch_norm_net(), **options)
    assert not any(option.startswith("abl") for option in plain.options)
    assert_same([plain(x) for x in stream()], [zero(x) for x in stream()])
    assert zero.get_buffer("balance.pi").max() > 1 / CLASSES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"abl": "counts"}, "abl is 'counts', expected one of frequency, gradient, inverse, soft"),
        ({"abl": "soft", "abl_loss": "entropy"}, "abl_loss is 'entropy'"),
        ({"abl": "soft", "abl_weight": -1}, "abl_weight is -1"),
        ({"abl": "soft", "abl_answer": -0.5}, "abl_answer is -0.5"),
        ({"abl": "soft", "abl_momentum": 1.0}, "abl_momentum is 1.0"),
    ],
)
def test_refuses_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build("tent", batch_norm_net(), **options)


def burst(images: int = 8) -> torch.Tensor:
    """Logits of which all but one say class 0."""
    z = torch.zeros(images, 2)
    z[:, 0] = math.log(3.0)
    z[-1] = -z[-1]
    return z


def test_the_answer_follows_a_batch_that_is_not_like_the_stream() -> None:
    z, own = burst(), Balance(2, prior="soft", loss="soft", weight=1.0, momentum=0.5, answer=2.0)
    # v = (7 * 3 + 1) / 32 = 11 / 16; chi2 = 8 * 2 * (3 / 16)^2 / (1 / 2) = 9 / 8; s = 1 / 9
    lift = torch.tensor([(8 * 11 / 16 + 0.5) / 4.5, (8 * 5 / 16 + 0.5) / 4.5]).log()
    torch.testing.assert_close(own.answered(z), z + 2.0 / 9 * lift)
    own.observe(z, burst(), None)
    torch.testing.assert_close(own.shares, torch.tensor([0.5 + 11 / 16, 0.5 + 5 / 16]) / 2)


def test_the_answer_stays_where_the_batch_is_like_the_stream() -> None:
    own = Balance(2, prior="frequency", loss="soft", weight=1.0, momentum=0.0, answer=4.0)
    assert torch.equal(own.answered(LOGITS[:1]), LOGITS[:1])
    own.observe(burst(), None, None)
    assert torch.equal(own.answered(burst()), burst())


def test_the_answer_follows_no_batch_whose_shares_are_a_fair_draw() -> None:
    """Of 1,000 draws from the stream few are answered otherwise, and by little."""
    draw = torch.Generator().manual_seed(0)
    own = Balance(5, prior="frequency", loss="soft", weight=1.0, momentum=0.9, answer=1.0)
    moved = []
    for _ in range(1000):
        z = 8.0 * torch.nn.functional.one_hot(torch.randint(5, (100,), generator=draw), 5)
        moved.append(float((own.answered(z) - z).abs().max()))
        own.observe(z, None, None)
    assert sum(moved) / len(moved) < 0.2
    one = 8.0 * torch.nn.functional.one_hot(torch.full((100,), 3), 5)
    assert float((own.answered(one) - one)[0, 3]) > 1.2  # ln 5 = 1.6


@pytest.mark.parametrize("name", [*ENTROPY_LIKE, "delta", "rmt", "rotta", "cotta"])
def test_learning_does_not_see_what_is_answered(name: str) -> None:
    options = OPTIONS.get(name, {}) | {"source_images": torch.cat(stream(2))}
    net = batch_norm_net()
    net[-1].bias.data[0] = 3.0
    plain = build(name, net, **options, abl="frequency")
    follows = build(name, net, **options, abl="frequency", abl_answer=30.0)
    followed = []
    for x in stream(batch=16):
        z, before = plain(x), follows.predict(x)
        assert_same(before, follows(x))
        followed.append(not torch.equal(z, before))
    assert any(followed)
    assert_same(plain.state_dict()["adapted"], follows.state_dict()["adapted"])


def test_the_answer_stays_finite_for_a_class_of_probability_zero() -> None:
    z = torch.tensor([[0.0, -200.0], [0.0, -200.0]])
    answered = Balance(2, prior="soft", loss="soft", weight=1.0, momentum=0.9, answer=1.0).answered(z)
    assert bool(answered.isfinite().all())
    assert answered.argmax(1).tolist() == [0, 0]
