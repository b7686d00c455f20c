"""ETA, EATA, RDumb, SAR and ROID beyond their steps (test_parity.py): options, counters, edges, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tta_cases import CLASSES, assert_same, batch_norm_net, group_norm_net, stream

from ttaq.errors import InputError
from ttaq.tta import Adapter, build

NAMES = ("eta", "eata", "rdumb", "sar", "roid")
ALL = {"entropy_margin": 2.0, "redundancy": 2.0}


def make(name: str, net: nn.Module | None = None, **options: Any) -> Adapter:
    return build(name, net or batch_norm_net(), source_images=torch.cat(stream(seed=98)), **options)


def learned(adapter: Adapter) -> list[Tensor]:
    return [parameter.detach().clone() for _, parameter in adapter.parameters_adapted()]


@pytest.mark.parametrize("name", ["eta", "eata", "rdumb", "sar"])
def test_nothing_reliable_nothing_learned(name: str) -> None:
    adapter = make(name, entropy_margin=1e-3)
    state = adapter.state_dict()
    for x in stream():
        adapter(x)
    after = adapter.state_dict()
    for part in ("adapted", "optimizer"):
        assert_same(after[part], state[part])
    assert {adapter.counters[key] for key in ("updates", "reliable")} == {0}


def test_what_repeats_is_redundant() -> None:
    adapter = make("eta", entropy_margin=2.0, redundancy=0.5)
    (x,) = stream(1)
    adapter(x)
    assert adapter.counters["chosen"] == len(x)
    adapter(x)  # the same predictions again
    assert adapter.counters["reliable"] == 2 * len(x)
    assert adapter.counters["chosen"] == len(x)
    assert adapter.counters["updates"] == 1


def test_eata_without_weight_is_eta_and_with_much_weight_stays() -> None:
    eta, none, held = make("eta", **ALL), make("eata", fisher_weight=0, **ALL), make("eata", fisher_weight=1e9, **ALL)
    source = learned(eta)
    xs = stream(6)
    assert_same([none(x) for x in xs], [eta(x) for x in xs])
    for x in xs:
        held(x)
    moved, kept = (
        sum(float((a - b).norm()) for a, b in zip(learned(each), source, strict=True)) for each in (eta, held)
    )
    assert kept < 0.8 * moved


def test_the_fisher_information_is_part_of_the_state() -> None:
    state = make("eata").state_dict()
    assert sum(key.startswith("fisher/") for key in state["extra"]) == 4
    assert all(bool((value > 0).any()) for key, value in state["extra"].items() if key.startswith("fisher/"))


@pytest.mark.parametrize("balance", [{}, {"abl": "gradient"}])
def test_rdumb_is_eta_until_it_starts_anew(balance: dict[str, str]) -> None:
    eta, rdumb = make("eta", **ALL, **balance), make("rdumb", reset_every=3, **ALL, **balance)
    xs = stream(7)
    first = [eta(x) for x in xs[:3]]
    eta.reset()
    second = [eta(x) for x in xs[3:6]]
    eta.reset()
    assert_same([rdumb(x) for x in xs], [*first, *second, eta(xs[6])])
    assert rdumb.counters["batches"] == 7


def test_sar_leaves_the_last_norms_alone() -> None:
    names = [[name for name, _ in make("sar", skip_last=share).parameters_adapted()] for share in (0, 0.5, 0.25)]
    assert names[0] == ["1.weight", "1.bias", "4.weight", "4.bias"] == names[2]
    assert names[1] == ["1.weight", "1.bias"]


def test_sar_restores_its_parameters_when_it_is_interrupted() -> None:
    class Breaks(nn.Sequential):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 3:  # the first is the trial of the images, the second the forward, the third at theta'
                raise KeyboardInterrupt
            return super().forward(x)

    adapter = make("sar", Breaks(*batch_norm_net()).eval(), entropy_margin=2.0)
    before = adapter.state_dict()
    with pytest.raises(KeyboardInterrupt):
        adapter(stream()[0])
    assert_same(adapter.state_dict()["adapted"], before["adapted"])
    assert all(parameter.grad is None for parameter in adapter.parameters())


def test_roid_without_its_parts() -> None:
    xs = stream()
    plain = make("roid", source_share=0, consistency=False, prior_correction=False)
    assert torch.equal(plain(xs[0]), build("tent", batch_norm_net())(xs[0]))
    tied = make("roid", source_share=1)
    source = learned(tied)
    for x in xs:
        tied(x)
    assert_same(learned(tied), source)
    assert 0 < tied.counters["chosen"] < tied.counters["samples"]


@pytest.mark.parametrize("name", NAMES)
def test_single_images_and_models_without_batch_norm(name: str) -> None:
    adapter = make(name, group_norm_net())
    for x in (*stream(3, 1), *stream(1, 5)):
        assert bool(adapter(x).isfinite().all())
    assert all(bool(value.isfinite().all()) for value in learned(adapter))


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_that_is_not_finite_teaches_nothing(name: str) -> None:
    options = {} if name == "roid" else {"entropy_margin": 2.0}
    adapter = make(name, check_finite=False, **options)
    first, second = stream(2)
    adapter(first)
    before = adapter.state_dict()
    adapter(torch.full_like(first, float("nan")))
    after = adapter.state_dict()
    for part in ("optimizer", *(() if name == "roid" else ("adapted",))):  # ROID ensembles all the same
        assert_same(after[part], before[part])
    assert bool(adapter(second).isfinite().all())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("eta", {"entropy_margin": 0}, "ETA: entropy_margin is 0"),
        ("rdumb", {"redundancy": -0.1}, "RDumb: redundancy is -0.1"),
        ("rdumb", {"reset_every": 0}, "RDumb: reset_every is 0"),
        ("eata", {"fisher_weight": -1}, "EATA: fisher_weight is -1"),
        ("eata", {"fisher": 1}, "EATA: no option is named fisher, expected some of: lr, "),
        ("sar", {"skip_last": 1}, "SAR: skip_last is 1"),
        ("sar", {"radius": float("nan")}, "SAR: radius is nan"),
        ("roid", {"temperature": 0}, "ROID: temperature is 0"),
        ("roid", {"source_share": 1.5}, "ROID: source_share is 1.5"),
    ],
)
def test_refuses_options_out_of_range(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(name, **options)


@pytest.mark.parametrize("images", [None, torch.rand(1, 3, 8, 8), torch.rand(3, 8, 8)])
def test_eata_needs_images_of_the_source(images: Tensor | None) -> None:
    with pytest.raises(InputError, match=r"EATA: source_images is .*; without any use 'eta'"):
        build("eata", batch_norm_net(), source_images=images)


@pytest.mark.parametrize("name", NAMES)
def test_needs_a_last_linear_layer(name: str) -> None:
    net = nn.Sequential(*batch_norm_net()[:-1])
    with pytest.raises(InputError, match="the model has no linear layer"):
        make(name, net)
    wrong = nn.Sequential(*batch_norm_net(), nn.Linear(CLASSES, 3), nn.Flatten(), nn.ZeroPad1d(1))
    with pytest.raises(InputError, match="answers with 5 classes and its last linear layer has 3 outputs"):
        make(name, wrong)(stream()[0])


@pytest.mark.parametrize("bad", [torch.full((4, 3, 8, 8), math.nan), torch.zeros(4, 3, 8, 8, dtype=torch.uint8)])
def test_source_images_that_say_nothing_are_refused(bad: torch.Tensor) -> None:
    for name in ("eata", "rmt"):
        with pytest.raises(InputError, match="expected finite floating point"):
            build(name, batch_norm_net(), source_images=bad)
