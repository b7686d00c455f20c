"""Guards: each alarm is planted, nothing else raises one, and what they take back is exact."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tta_cases import TESTED, Everything, assert_same, batch_norm_net, quantized_net, stream

from ttaq.errors import CheckpointError, InputError
from ttaq.io import load_state, save_state
from ttaq.tta import Guarded, Limits, SlidingWindow, build

QUIET = Limits(entropy=0, classes=0, batch_classes=0, drift=1e9, drift_per_batch=1e9)


def reasons(guarded: Guarded) -> list[str]:
    return [alarm.reason for alarm in guarded.alarms]


@pytest.mark.parametrize("name", sorted(TESTED))
def test_without_an_alarm_it_is_the_adapter(name: str) -> None:
    plain, guarded = TESTED[name](batch_norm_net()), Guarded(TESTED[name](batch_norm_net()), QUIET)
    for x in stream(6, batch=16):
        assert torch.equal(guarded(x), plain(x))
        assert torch.equal(guarded.predict(x), plain.predict(x))
    assert guarded.alarms == []
    assert guarded.counters == {**plain.counters, "paused": 0, "alarms": 0}
    assert_same(guarded.adapter.state_dict(), plain.state_dict())


def test_nearest_is_the_worst_that_each_signal_was() -> None:
    guarded = Guarded(TESTED["tent"](batch_norm_net()), QUIET)
    seen = []
    for x in stream(6, batch=16):
        guarded(x)
        seen.append(dict(guarded.signals))
    worst = {name: min if name in ("entropy", "classes", "batch_classes") else max for name in seen[0]}
    assert guarded.nearest == {name: choose(one[name] for one in seen) for name, choose in worst.items()}
    assert all(len({one[name] for one in seen}) > 1 for name in worst)
    guarded.reset()
    assert guarded.nearest == {}


@pytest.mark.parametrize("net", [batch_norm_net, quantized_net])
@pytest.mark.parametrize("lr", [0.1, 1.0, 30.0])
def test_a_step_that_is_too_large_is_taken_back_and_learning_pauses(net: Any, lr: float) -> None:
    guarded = Guarded(build("tent", net(), lr=lr), Limits(pause=2))
    norm = build("norm", net())
    # Alarm, 2 without learning, alarm, 4 without, alarm, 8 without.
    for x in stream(17):
        assert torch.equal(guarded(x), norm(x))
    assert reasons(guarded) == ["drift"] * 3
    assert [alarm.batch for alarm in guarded.alarms] == [1, 4, 9]
    assert guarded.alarms[0].value > guarded.alarms[0].limit == 0.006
    counters = guarded.counters
    assert (counters["batches"], counters["paused"], counters["alarms"], counters["alarms_drift"]) == (3, 14, 3, 3)


def test_goes_back_to_the_last_good_state_and_then_to_the_source() -> None:
    class Drifts(Everything):
        """Learns a little, and a lot from images that are bright."""

        def step(self, x: Tensor) -> Tensor:
            logits: Tensor = self.model(x)
            self.update(logits.mean() * (100.0 if float(x.mean()) > 0.9 else 0.01))
            return logits

    guarded = Guarded(Drifts(batch_norm_net()), Limits(drift=0.5, drift_per_batch=1e9, snapshot_every=3, pause=0))
    bright = torch.full((4, 3, 8, 8), 0.95)
    source = guarded.adapter.state_dict()["adapted"]
    for x in stream(3):
        guarded(x)
    good = guarded.adapter.state_dict()["adapted"]
    for x in stream(3, seed=5)[:2]:
        guarded(x)
    guarded(bright)
    assert reasons(guarded) == ["drift"]
    assert_same(guarded.adapter.state_dict()["adapted"], good)
    guarded(bright)  # again within the interval: that state was not good
    assert_same(guarded.adapter.state_dict()["adapted"], source)
    assert guarded.counters["updates"] == 7  # what was counted did happen


def test_a_good_state_that_is_gone_back_to_is_let_learn_on() -> None:
    """Its distance from the source is older than the alarm."""
    net, bad = batch_norm_net(), torch.full((4, 3, 8, 8), float("nan"))

    def make(rate: float) -> Guarded:
        limits = Limits(drift_per_batch=rate, snapshot_every=6, pause=1, entropy=0, classes=0, batch_classes=0)
        return Guarded(build("tent", net, lr=2e-3, check_finite=False), limits)

    free = make(1e9)
    for x in stream(12):
        free(x)
    rate = 1.5 * free.nearest["drift_per_batch"]
    guarded = make(rate)
    for x in stream(7):
        guarded(x)
    assert guarded.signals["drift"] > 2 * rate
    guarded.adapter.get_parameter("model.1.weight").data.fill_(float("nan"))
    guarded(bad)
    assert reasons(guarded) == ["nonfinite"]
    for x in stream(12, seed=5):
        guarded(x)
    assert reasons(guarded) == ["nonfinite"]
    assert guarded.signals["drift"] > 2 * rate


def test_an_adapter_that_learned_before_it_was_guarded_goes_back_to_the_source() -> None:
    adapter = build("tent", batch_norm_net(), lr=1e-2)
    source = adapter.state_dict()["adapted"]
    for x in stream(2):
        adapter(x)
    guarded = Guarded(adapter, Limits(spike=0.0, drift_per_batch=0.0))
    resumed = Guarded(build("tent", batch_norm_net(), lr=1e-2), Limits(spike=0.0, drift_per_batch=0.0))
    resumed.load_state_dict(guarded.state_dict())
    for one in (guarded, resumed):
        one(stream()[2])
        assert len(one.alarms) == 1
        assert_same(one.adapter.state_dict()["adapted"], source)
    assert_same(resumed.state_dict(), guarded.state_dict())


def test_a_step_out_of_all_proportion_has_a_figure_that_rows_can_hold() -> None:
    guarded = Guarded(build("tent", batch_norm_net(), lr=1e25))
    guarded(stream()[0])
    assert reasons(guarded) == ["drift"]
    assert math.isfinite(guarded.nearest["drift"])


def test_images_that_are_not_finite_teach_nothing_and_cost_nothing() -> None:
    plain = build("tent", batch_norm_net(), lr=1e-2, check_finite=False)
    guarded = Guarded(build("tent", batch_norm_net(), lr=1e-2, check_finite=False), QUIET)
    bad = torch.full((4, 3, 8, 8), float("nan"))
    first, *rest = stream(4)
    plain(first), guarded(first)
    before = guarded.adapter.state_dict()
    for _ in range(3):
        assert bool(guarded(bad).isnan().all())
    assert reasons(guarded) == ["nonfinite"] * 3
    assert guarded.counters["paused"] == 0
    for part in ("adapted", "optimizer"):
        assert_same(guarded.adapter.state_dict()[part], before[part])
    assert [torch.equal(guarded(x), plain(x)) for x in rest] == [True] * 3


@pytest.mark.parametrize("net", [batch_norm_net, quantized_net])
def test_images_that_are_not_finite_are_seen_whatever_becomes_of_them(net: Any) -> None:
    """Grids of a quantized model make finite numbers of them."""
    guarded = Guarded(build("tent", net(), check_finite=False), QUIET)
    guarded(torch.full((4, 3, 8, 8), float("nan")))
    assert reasons(guarded) == ["nonfinite"]


@pytest.mark.parametrize("name", sorted(TESTED.keys() - {"everything"}))  # which keeps a plain mean: see below
def test_no_method_is_spoiled_by_images_that_are_not_finite(name: str) -> None:
    guarded = Guarded(TESTED[name](batch_norm_net(), check_finite=False), QUIET)
    good, *rest = stream(3)
    guarded(good)
    guarded(torch.full((4, 3, 8, 8), float("nan")))
    for x in rest:
        assert bool(guarded(x).isfinite().all())


def test_a_state_that_is_not_finite_is_taken_back() -> None:
    guarded = Guarded(Everything(batch_norm_net(), check_finite=False), Limits(pause=0, drift=1e9, drift_per_batch=1e9))
    fresh = Everything(batch_norm_net())
    guarded(torch.full((4, 3, 8, 8), float("nan")))  # its mean prediction is NaN now
    assert reasons(guarded) == ["nonfinite"]
    assert torch.equal(guarded.adapter.get_buffer("mean"), fresh.get_buffer("mean"))


def _with_classifier(scale: float, bias: float = 0.0) -> nn.Module:
    net = batch_norm_net()
    with torch.no_grad():
        net[-1].weight.mul_(scale)
        net[-1].bias[0] += bias
    return net


@pytest.mark.parametrize(
    ("net", "limits", "reason", "batches"),
    [
        # keep exp(-500/2000) a batch: from 1 below 0.5 with the third
        (_with_classifier(1e4), {"entropy": 0.5, "classes": 0.0, "batch_classes": 0.0}, "entropy", 3),
        # one class gets everything: at once in the batch, later in the running mean
        (_with_classifier(1.0, 50.0), {"entropy": 0.0}, "classes", 1),
        (_with_classifier(1.0, 50.0), {"entropy": 0.0, "batch_classes": 0.0}, "classes", 6),
    ],
)
def test_collapse_is_seen(net: nn.Module, limits: dict[str, float], reason: str, batches: int) -> None:
    guarded = Guarded(build("norm", net), Limits(**limits))
    for x in stream(8, batch=500):
        guarded(x)
        if guarded.alarms:
            break
    assert (guarded.alarms[0].reason, guarded.alarms[0].batch) == (reason, batches)


def test_a_jump_of_the_entropy_is_seen() -> None:
    class Fades(nn.Module):
        """Sure of what is dark, unsure of what is bright."""

        def forward(self, x: Tensor) -> Tensor:
            classes = torch.eye(4)[torch.arange(len(x)) % 4]
            return classes * 50 * (x.mean((1, 2, 3)) < 0.5).float().unsqueeze(1)

    guarded = Guarded(build("source", Fades()), Limits(entropy=0.0))
    for _ in range(12):
        guarded(torch.zeros(400, 3, 2, 2))
    assert guarded.alarms == []
    guarded(torch.ones(400, 3, 2, 2))
    assert reasons(guarded) == ["spike"]


def test_single_images_of_one_class_are_no_collapse_for_long() -> None:
    guarded = Guarded(build("norm", _with_classifier(1.0, 50.0), alpha=0.1), Limits(entropy=0.0))
    for x in stream(200, batch=1):
        guarded(x)
    assert guarded.alarms == []


def test_state_resumes_in_the_middle_of_a_pause(tmp_path: Any) -> None:
    def make() -> Guarded:
        return Guarded(build("tent", batch_norm_net(), lr=0.02), Limits(pause=3, drift_per_batch=0.02))

    guarded, resumed = make(), make()
    first, rest = stream(12)[:3], stream(12)[3:]
    for x in first:
        guarded(x)
    assert guarded.alarms
    state = guarded.state_dict()
    kept = copy.deepcopy(state)
    save_state(tmp_path / "guarded", state)
    expected = [guarded(x) for x in rest]
    assert_same(state, kept)
    resumed.load_state_dict(load_state(tmp_path / "guarded"))
    assert_same([resumed(x) for x in rest], expected)
    assert_same(resumed.state_dict(), guarded.state_dict())
    guarded.reset()
    assert_same(guarded.state_dict(), make().state_dict())


def test_refuses_a_state_that_does_not_fit() -> None:
    guarded = Guarded(build("tent", batch_norm_net()))
    guarded(stream()[0])
    before = guarded.state_dict()
    other = Guarded(build("tent", batch_norm_net(), lr=0.5)).state_dict()
    for state, message in (
        (other, "option lr"),
        (guarded.adapter.state_dict(), "saved without guards"),
        ({**before, "limits": {}}, "saved with limits"),
        ({**before, "adapter": other["adapter"]}, "option lr"),
        (None, "saved without guards"),
        ({**before, "numbers": {**before["numbers"], "pause": -3}}, "damaged: numbers is .*'pause': -3"),
        ({**before, "numbers": None}, "damaged: numbers is None"),
        ({**before, "mean": [1]}, "damaged: mean is"),
        ({**before, "mean": torch.zeros(2, 2)}, r"damaged: mean is \(2, 2\)"),
        ({**before, "entropy": None}, "damaged: entropy is None"),
        ({**before, "nearest": {"drift": "x"}}, "damaged: nearest is"),
        ({**before, "alarms": [[1]]}, "damaged: alarms is"),
        ({**before, "alarms": [[1, "fire", 0.0, 0.0]]}, "damaged: alarms is"),
    ):
        with pytest.raises(CheckpointError, match=message):
            guarded.load_state_dict(state)  # type: ignore[arg-type]
        assert_same(guarded.state_dict(), before)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"drift": -1}, "drift is -1, expected a number, 0 or more"),
        ({"pause": 0.5}, "pause is 0.5, expected a number of batches"),
        ({"entropy": True}, "entropy is True"),
        ({"classes": float("nan")}, "classes is nan"),
    ],
)
def test_refuses_limits_out_of_range(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Limits(**limits)


def test_refuses_what_is_no_adapter() -> None:
    with pytest.raises(InputError, match="got Sequential, expected an adapter"):
        Guarded(batch_norm_net())  # type: ignore[arg-type]


def test_a_window_of_single_images_is_guarded_too() -> None:
    window = SlidingWindow(Guarded(build("tent", batch_norm_net(), lr=30.0)), 4)
    norm = SlidingWindow(build("norm", batch_norm_net()), 4)
    for x in stream(12, batch=1):
        assert torch.equal(window(x), norm(x))
    assert window.counters["alarms"] == 1


def test_bad_images_are_refused_before_anything_is_counted() -> None:
    guarded = Guarded(build("tent", batch_norm_net()))
    guarded(stream()[0])
    before = guarded.state_dict()
    with pytest.raises(InputError, match="NaN or Inf"):
        guarded(torch.full((4, 3, 8, 8), float("nan")))
    assert_same(guarded.state_dict(), before)
