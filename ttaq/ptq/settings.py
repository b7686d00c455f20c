"""What a reconstruction does: one set of numbers and switches, of which every method is a choice."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, get_args

from ttaq.errors import InputError

__all__ = ["PRESETS", "Reconstruction"]

Statistics = Literal["source", "batch"]
Perturbation = Literal["gaussian", "step", "mix"]
Centring = Literal["off", "channel", "tensor", "compensated"]

# `fast` decides in 400 steps what 20,000 small ones decide: larger steps, and a stronger pull to 0 or 1.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {
        "iterations": 400,
        "weight_lr": 3e-2,
        "scale_lr": 1e-3,
        "affine_lr": 1e-3,
        "rounding_penalty": 0.03,
        "distillation": 400,
    },
    "paper": {},
}


@dataclass(frozen=True)
class Reconstruction:
    """How the units of a model are trained. The defaults are those of QDrop (arXiv 2203.05740).

    single_layers: train layer by layer instead of block by block. units: module names that replace the blocks found.
    iterations, batch_size: steps per unit, and images per step, drawn with replacement.
    weight_lr: of Adam on the rounding variables. scale_lr: of Adam on the scales of the activations, down to 0 along a
        cosine; 0 leaves them. affine_lr: the same for weight and bias of the norms; 0 leaves them.
    keep_quantized: probability that an element of the unit's input, and of each quantized tensor in it, is the
        quantized one; 1 is no drop.
    rounding_penalty: weight of the sum of 1 - |2 h - 1|^beta. warm_up: share of the steps without it. beta: its
        exponent after the warm-up and at the end, linear between.
    norm_statistics: "source", or "batch" to train with the statistics that a model adapting to its batches has; the
        running statistics are then taken anew from the calibration images at the end.
    prediction: weight of KL(p_float || p) of the model whose other units are float (PD-Quant, arXiv 2212.07048).
    perturbation: weight of KL(p(x) || p(x + noise)) of the same model (TTAQ, arXiv 2412.09899). perturbation_kind:
        "gaussian" noise of `perturbation_size` deviations of the input, "step" uniform within half a step of its grid,
        "mix" the input with drop. temperature: of all these predictions.
    correction: how far distribution correction may move the float inputs (PD-Quant's lamb_c, 0.02 for ResNets;
        `correction`), with source statistics only; 0 is off.
    centring: "off", "channel", "tensor" or "compensated": whose mean is taken out of the weights first (`pem`).
        mean_penalty: weight of the squared mean of each output channel's rounded weights, the soft form of the same.
    distillation: steps in which, after the units, the norms learn the predictions of the float model (`distillation`);
        0 is none. distillation_lr, distillation_batch: of these steps.
    augment: share of the calibration images that are taken in a random version (`ttaq.data.augment`), so that scales
        and roundings see more than the source; running statistics are still those of the images themselves.
    """

    single_layers: bool = False
    units: tuple[str, ...] | None = None
    iterations: int = 20_000
    batch_size: int = 32
    weight_lr: float = 1e-3
    scale_lr: float = 4e-5
    affine_lr: float = 0.0
    keep_quantized: float = 0.5
    rounding_penalty: float = 0.01
    warm_up: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    norm_statistics: Statistics = "source"
    prediction: float = 0.0
    perturbation: float = 0.0
    perturbation_kind: Perturbation = "gaussian"
    perturbation_size: float = 0.1
    temperature: float = 4.0
    correction: float = 0.0
    centring: Centring = "off"
    mean_penalty: float = 0.0
    distillation: int = 0
    distillation_lr: float = 1e-3
    distillation_batch: int = 64
    augment: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("iterations", 1), ("batch_size", 2), ("distillation", 0), ("distillation_batch", 2)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"Reconstruction: {name} is {value!r}, expected a whole number from {least}")
        for name in (
            "weight_lr", "scale_lr", "affine_lr", "rounding_penalty", "prediction", "perturbation",
            "perturbation_size", "correction", "mean_penalty", "distillation_lr",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise InputError(f"Reconstruction: {name} is {value!r}, expected a number, 0 or more")
        for name in ("keep_quantized", "warm_up", "augment"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"Reconstruction: {name} is {getattr(self, name)!r}, expected 0 to 1")
        if not self.temperature > 0 or not min(self.beta) > 1:
            raise InputError(
                f"Reconstruction: temperature is {self.temperature} and beta {self.beta}, expected above 0 and above 1"
            )
        if self.correction and self.norm_statistics == "batch":
            raise InputError(
                "Reconstruction: correction fits the inputs to the source statistics, and norm_statistics is 'batch'; "
                "set one of the two"
            )
        if self.single_layers and (self.prediction or self.perturbation):
            raise InputError(
                "Reconstruction: prediction and perturbation need the output of a whole block, and single_layers is "
                "set; set one of the two"
            )
        for name, choices in (
            ("norm_statistics", Statistics),
            ("perturbation_kind", Perturbation),
            ("centring", Centring),
        ):
            if getattr(self, name) not in get_args(choices):
                raise InputError(
                    f"Reconstruction: {name} is {getattr(self, name)!r}, expected {' or '.join(get_args(choices))}"
                )

    def but(self, **changes: Any) -> Self:
        """A copy with other values; `InputError` for a name that does not exist or a value that does not fit."""
        known = {field.name: field for field in fields(self)}
        for name, value in changes.items():
            if name not in known:
                raise InputError(f"Reconstruction: no setting is named {name!r}; there are {', '.join(known)}")
            if isinstance(value, list):
                changes[name] = tuple(value)
        return replace(self, **changes)

    def changed(self) -> dict[str, Any]:
        """What differs from the defaults, as JSON values."""
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        different = {name: value for name, (value, default) in values.items() if value != default}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in different.items()}

    def exponent(self, step: int) -> float | None:
        """The beta of a step, counted from 0; None during the warm-up."""
        start = self.warm_up * self.iterations
        if step < start:
            return None
        first, last = self.beta
        return last + (first - last) * max(0.0, 1 - (step - start) / max(1.0, self.iterations - start))
