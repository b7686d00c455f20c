"""Guards: an adapter that is watched, and taken back when adaptation goes wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ttaq.errors import CheckpointError, InputError
from ttaq.nn.adapt_norms import norm_affine
from ttaq.tta.adapter import Adapter

__all__ = ["FROM_BELOW", "REASONS", "Guarded", "Limits"]

REASONS = ("nonfinite", "entropy", "classes", "spike", "drift")
FROM_BELOW = ("entropy", "classes", "batch_classes")
_REASON_OF = {"batch_classes": "classes", "drift_per_batch": "drift"}
_HORIZON = 2000  # images that the running means remember, more for many classes
_MOST_DOUBLINGS = 6
_FEWEST = 16  # images of which the share of each class means something


@dataclass(frozen=True, kw_only=True)
class Limits:
    """From where on a guard calls it wrong. Entropies are shares of ln C.

    entropy: running mean of the entropy, from below: the model is sure of everything.
    classes: entropy of the running mean prediction, from below: few classes get everything.
    batch_classes: the same of one batch of at least 16 images, as a share of what so many images can have.
    spike: how far the entropy of one batch may lie above its running mean.
    drift: ||theta - theta0|| / ||theta0|| over weight and bias of the norms. drift_per_batch: the same for each batch
        that the present state has learned from.
    snapshot_every: batches without an alarm after which a state counts as good. pause: batches that follow an alarm
        without learning; each further alarm doubles it, up to 64 times.
    """

    entropy: float = 0.01
    classes: float = 0.5
    batch_classes: float = 0.25
    spike: float = 0.5
    drift: float = 0.5
    drift_per_batch: float = 0.006
    snapshot_every: int = 50
    pause: int = 10

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            whole = name in ("snapshot_every", "pause")
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not value >= 0:
                expected = "a number of batches" if whole else "a number"
                raise InputError(f"Limits: {name} is {value!r}, expected {expected}, 0 or more")


class Alarm(NamedTuple):
    """batch: which one it was, counted from 1. reason: of `REASONS`. value, limit: what was measured and allowed."""

    batch: int
    reason: str
    value: float
    limit: float


class Guarded:
    """`logits = guarded(x)`: the adapter's, unless a guard finds that adaptation went wrong.

    After each batch a handful of figures, computed on the device, is read once (`signals`, by the names of the limits):

        nonfinite   a logit is NaN or infinite, or a value of the images: a grid of activations makes numbers of those
        entropy     the running mean of the entropy is below its limit
        classes     the entropy of the mean prediction, running or of this batch, is below its limit
        spike       the entropy of this batch is too far above its running mean
        drift       the norms' parameters are too far from those of the source

    `nearest` has, by the same names, the value of each that came nearest to its limit, or went farthest beyond.

    On an alarm the adapter returns to its last good state, or to the source if it came from that state less than
    `snapshot_every` batches ago; the batch is answered again from there; nothing is learned for `pause` batches, twice
    as long after each further alarm and half as long after each good snapshot. Non-finite logits alone, with a state
    that is finite, are no reason to go back: the step was left out (`Adapter.update`), and the answer is returned as it
    is.

    Args:
        adapter: any method. One that learns nothing is only watched.
        limits: `Limits`; the defaults were fixed on validation streams of CIFAR-10 (docs/adaptation.md).

    Learning more than one step ahead of the first alarm is not undone: the answers in between stand. Costs one
    synchronisation per batch and some ten small operations.

    State: that of the adapter, the last good one, the running means, the nearest values, the alarms.
    """

    def __init__(self, adapter: Adapter, limits: Limits | None = None) -> None:
        if not isinstance(adapter, Adapter):
            raise InputError(f"Guarded: got {type(adapter).__name__}, expected an adapter of ttaq.tta")
        self.adapter = adapter
        self.limits = limits or Limits()
        self._begin()

    def _begin(self) -> None:
        self.signals: dict[str, float] = {}
        self.nearest: dict[str, float] = {}
        self.alarms: list[Alarm] = []
        self._numbers = dict.fromkeys(("batches", "since", "pause", "paused", "strikes", "age", "good_age"), 0)
        # An adapter may have learned before it is guarded.
        self._numbers["age"] = self.adapter.counters["batches"]
        self.keep()
        self._forget()

    def keep(self) -> None:
        """Take the present state for a good one: the one to go back to."""
        self._good = self.adapter.state_dict()
        self._numbers["good_age"] = self._numbers["age"]

    def _forget(self) -> None:
        """The running means belong to the state that was left. They begin where nothing is wrong."""
        self._mean: Tensor | None = None
        self._entropy = 1.0

    def _watched(self) -> tuple[list[Tensor], list[Tensor]]:
        """Those of the adapted parameters that belong to norms, and their source values."""
        if not self.adapter.parameters_adapted():
            return [], []
        norms = {id(parameter) for parameter in norm_affine(self.model, "Guarded").values()}
        adapted = [parameter for _, parameter in self.adapter.parameters_adapted()]
        pairs = [(p.detach(), s) for p, s in zip(adapted, self.adapter.source_values, strict=True) if id(p) in norms]
        return [parameter for parameter, _ in pairs], [source for _, source in pairs]

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [B, classes]."""
        numbers = self._numbers
        learns = numbers["pause"] == 0
        logits: Tensor = self.adapter(x) if learns else self.predict(x)
        numbers["batches"] += 1
        if not learns:
            numbers["pause"] -= 1
            numbers["paused"] += 1
            return logits
        numbers["since"] += 1
        numbers["age"] += 1
        alarm = self._judge(logits, x)
        if alarm is None:
            if self.limits.snapshot_every and numbers["since"] % self.limits.snapshot_every == 0:
                self.keep()
                numbers["strikes"] = max(numbers["strikes"] - 1, 0)
            return logits
        self.alarms.append(alarm)
        if alarm.reason == "nonfinite" and self._state_is_finite():
            return logits
        self._take_back()
        return self.predict(x)

    def predict(self, x: Tensor) -> Tensor:
        """That of the adapter."""
        return self.adapter.predict(x)

    @property
    def model(self) -> nn.Module:
        """The adapter's."""
        return self.adapter.model

    @property
    def counters(self) -> dict[str, int]:
        """Those of the adapter, whose batches and samples are those that it could learn from; `paused` batches, in
        which it could not; `alarms`, and those of each reason."""
        reasons = [alarm.reason for alarm in self.alarms]
        counts = {f"alarms_{reason}": reasons.count(reason) for reason in REASONS if reason in reasons}
        return {**self.adapter.counters, "paused": self._numbers["paused"], "alarms": len(reasons), **counts}

    def reset(self) -> None:
        """Back to the source, with no alarms."""
        self.adapter.reset()
        self._begin()

    def state_dict(self) -> dict[str, Any]:
        """Everything mutable, in copies."""
        return {
            "adapter": self.adapter.state_dict(),
            "good": self._good,
            "limits": asdict(self.limits),
            "numbers": dict(self._numbers),
            "mean": None if self._mean is None else self._mean.clone(),
            "entropy": self._entropy,
            "nearest": dict(self.nearest),
            "alarms": [list(alarm) for alarm in self.alarms],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was called. CheckpointError, nothing changed, for a state that does not fit."""
        own = self.state_dict()
        if not isinstance(state, Mapping) or set(state) != set(own):
            raise CheckpointError(
                "Guarded: the state is not one of a guarded adapter; it is damaged or was saved without guards"
            )
        if state["limits"] != own["limits"]:
            raise CheckpointError(
                f"Guarded: the state was saved with limits {state['limits']}, expected {own['limits']}; use the same"
            )
        alarms = self._check_state(state)
        # The good state is checked by loading it: it becomes the present one for a moment.
        before = own["adapter"]
        try:
            self.adapter.load_state_dict(state["good"])
            self.adapter.load_state_dict(state["adapter"])
        except CheckpointError:
            self.adapter.load_state_dict(before)
            raise
        self._good, self._numbers, self._entropy = state["good"], dict(state["numbers"]), float(state["entropy"])
        self.signals, self.nearest, self.alarms = {}, dict(state["nearest"]), alarms
        device = next(self.model.parameters()).device
        self._mean = None if state["mean"] is None else state["mean"].to(device)

    def _check_state(self, state: Mapping[str, Any]) -> list[Alarm]:
        """That what is not the adapter's is what `state_dict` makes; its alarms."""
        numbers, mean, entropy, nearest = (state[name] for name in ("numbers", "mean", "entropy", "nearest"))
        problem = None
        if not isinstance(numbers, Mapping) or set(numbers) != set(self._numbers):
            problem = f"numbers is {numbers!r}, expected {', '.join(self._numbers)}"
        elif any(type(number) is not int or number < 0 for number in numbers.values()):
            problem = f"numbers is {numbers!r}, expected integers from 0"
        elif not (mean is None or (isinstance(mean, Tensor) and mean.ndim == 1 and mean.is_floating_point())):
            problem = f"mean is {tuple(mean.shape) if isinstance(mean, Tensor) else mean!r}, expected [classes] or None"
        elif not isinstance(entropy, float):
            problem = f"entropy is {entropy!r}, expected a number"
        elif not isinstance(nearest, Mapping) or any(not isinstance(value, float) for value in nearest.values()):
            problem = f"nearest is {nearest!r}, expected numbers by name"
        try:
            alarms = [Alarm(*alarm) for alarm in state["alarms"]]
            known = all(type(alarm.batch) is int and alarm.reason in REASONS for alarm in alarms)
        except TypeError:
            known = False
        if not known:
            problem = f"alarms is {state['alarms']!r}, expected a list of (batch, reason, value, limit)"
        if problem is not None:
            raise CheckpointError(f"Guarded: the state is damaged: {problem}")
        return alarms

    def _take_back(self) -> None:
        numbers = self._numbers
        now = self.adapter.state_dict()
        if numbers["since"] < self.limits.snapshot_every:
            self.adapter.reset()
            numbers["age"] = 0
            self.keep()
        good = {**self._good, "counters": now["counters"]}
        good["extra"] = {**good["extra"], "_tally": now["extra"]["_tally"]}  # what was counted did happen
        self.adapter.load_state_dict(good)
        numbers["age"] = numbers["good_age"]
        numbers["pause"] = self.limits.pause << min(numbers["strikes"], _MOST_DOUBLINGS)
        numbers["strikes"] += 1
        numbers["since"] = 0
        self._forget()

    def _state_is_finite(self) -> bool:
        state = self.adapter.state_dict()
        values = [value for part in ("adapted", "optimizer", "extra") for value in state[part].values()]
        return all(bool(value.isfinite().all()) for value in values)

    @torch.no_grad()
    def _signals(self, logits: Tensor, x: Tensor) -> list[float]:
        """Whether all is finite; entropy; that of the running and of this batch's mean prediction; drift."""
        p = logits.float().softmax(1)
        classes = p.shape[1]
        own = p.mean(0)
        keep = math.exp(-len(p) / max(_HORIZON, 10 * classes))
        mean = torch.full_like(own, 1 / classes) if self._mean is None else self._mean
        finite = p.isfinite().all() & x.isfinite().all()
        self._mean = torch.where(finite, keep * mean + (1 - keep) * own, mean)
        entropy = torch.special.entr(p).sum(1).mean()
        diversity, own_diversity = torch.special.entr(torch.stack([self._mean, own])).sum(1)
        drift = entropy.new_zeros(())
        now, source = self._watched()
        if now:
            norms = [torch.stack(torch._foreach_norm(v)).norm() for v in (torch._foreach_sub(now, source), source)]
            most = torch.finfo(torch.float32).max  # beyond what squares in float32 can say
            drift = (norms[0] / norms[1].clamp(min=1e-30)).float().nan_to_num(nan=most, posinf=most)
        values: list[float] = torch.stack([finite.to(entropy.dtype), entropy, diversity, own_diversity, drift]).tolist()
        return values

    def _judge(self, logits: Tensor, x: Tensor) -> Alarm | None:
        batch, classes = len(logits), max(logits.shape[1], 2)
        finite, entropy, diversity, own, drift = self._signals(logits, x)
        number = self._numbers["batches"]
        if not finite:
            return Alarm(number, "nonfinite", math.nan, 0.0)
        entropy, diversity = entropy / math.log(classes), diversity / math.log(classes)
        rise = entropy - self._entropy
        keep = math.exp(-batch / _HORIZON)
        self._entropy = keep * self._entropy + (1 - keep) * entropy
        own = own / math.log(min(batch, classes)) if batch >= _FEWEST else 1.0
        limits = self.limits
        self.signals = {
            "entropy": self._entropy,
            "classes": diversity,
            "batch_classes": own,
            "spike": rise,
            "drift_per_batch": drift / max(self._numbers["age"], 1),
            "drift": drift,
        }
        for name, value in self.signals.items():
            worse = min if name in FROM_BELOW else max
            self.nearest[name] = worse(value, self.nearest.get(name, value))
        for name, value in self.signals.items():
            limit = getattr(limits, name)
            if value < limit if name in FROM_BELOW else value > limit:
                return Alarm(number, _REASON_OF.get(name, name), value, limit)
        return None
