"""Reconstruction: unit by unit, the quantized model learns to do what the float model does.

For each unit, in order, the rounding of its weights and the scales of its activations are trained on

    L = mean sum_c (unit(mixed input) - float unit(float input))^2 + penalty * R      (+ what the settings add)

Then the weights are rounded for good, and the inputs of the next unit follow from those of this one: no prefix runs
twice. Everything random comes from the seed and the number of the unit, so a run that was interrupted goes on behind
its last finished unit and ends with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ttaq.errors import InputError
from ttaq.nn import QuantizedModel, Quantizer
from ttaq.ptq.caches import Budget, Rows, chunks
from ttaq.ptq.correction import corrected
from ttaq.ptq.observe import Progress
from ttaq.ptq.settings import Reconstruction
from ttaq.ptq.statistics import batch_statistics
from ttaq.ptq.student import unit_module
from ttaq.ptq.train_unit import Lesson, train_unit
from ttaq.ptq.unit_store import UnitStore
from ttaq.ptq.units import Unit, find_units, layer_by_layer

__all__ = ["reconstruct"]

_REPORTS = 20  # steps between two calls of progress


def reconstruct(
    model: QuantizedModel,
    teacher: QuantizedModel,
    images: Tensor,
    settings: Reconstruction,
    *,
    seed: int = 0,
    budget: Budget,
    store: UnitStore | None = None,
    progress: Progress | None = None,
) -> None:
    """Train the calibrated `model` to do what `teacher` does, in place.

    teacher: the same conversion of the float model, uncalibrated. images: [N, C, H, W]. budget: of the memory for the
    inputs of a unit. store: where finished units are kept and found again.
    """
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    if parameter.dtype != torch.float32:
        raise InputError(f"quantize: the model is {parameter.dtype}, expected float32 to train; call model.float()")
    device, places = parameter.device, chunks(images)
    units, theirs = (_units(each, settings) for each in (model, teacher))
    teachers = [unit_module(teacher, unit) for unit in theirs]

    def batches() -> Iterator[Tensor]:
        for place in places:
            yield images[place].to(device, torch.float32).contiguous(memory_format=torch.channels_last)

    by_batch = settings.norm_statistics == "batch"
    with batch_statistics(model, teacher) if by_batch else nullcontext():
        predicts = settings.prediction or settings.perturbation
        logits = torch.cat([teacher(batch) for batch in batches()]) if predicts else None
        floating = quantized = _collect(batches(), places, budget)
        for number, (unit, twin) in enumerate(zip(units, theirs, strict=True)):
            outputs = _collect(_through(teachers[number], floating, places, device), places, budget)
            if store is None or not store.load(number, unit, model):
                inputs, targets = floating, outputs
                if settings.correction:
                    moved = (
                        corrected(teachers[number], x, settings.correction) for x in _read(floating, places, device)
                    )
                    inputs = _collect(moved, places, budget)
                    targets = _collect(_through(teachers[number], inputs, places, device), places, budget)
                parts = [(unit, twin)]
                if settings.single_layers:
                    parts = list(zip(layer_by_layer(model, unit), layer_by_layer(teacher, twin), strict=True))
                generator = torch.Generator(device).manual_seed(seed * 100_003 + number)
                for done, (part, example) in enumerate(parts):
                    known = targets if part is unit and not by_batch else None
                    lesson = Lesson(
                        part, inputs, quantized, known, unit_module(teacher, example), teachers[number + 1 :], logits
                    )
                    span = number + done / len(parts), number + (done + 1) / len(parts)
                    report = _reporter(progress, settings.iterations, len(units), span, part.name)
                    train_unit(model, lesson, settings, generator, report)
                if settings.correction:
                    inputs.release()
                    targets.release()
                if store is not None:
                    store.save(number, unit, model)
            after = _through(unit_module(model, unit), quantized, places, device)
            after_rows = _collect(after, places, budget, _last_grid(model, unit))
            floating.release()
            if quantized is not floating:
                quantized.release()
            floating, quantized = outputs, after_rows


def _units(model: QuantizedModel, settings: Reconstruction) -> list[Unit]:
    units = find_units(model, settings.units)
    names = [name for unit in units for name in unit.layers]
    for unit in units:
        # A layer that several units use keeps its nearest rounding: each would undo what the other learned.
        unit.layers = [name for name in unit.layers if names.count(name) == 1]
    return units


def _collect(batches: Iterator[Tensor], places: list[slice], budget: Budget, grid: Quantizer | None = None) -> Rows:
    rows: Rows | None = None
    for place, batch in zip(places, batches, strict=True):
        rows = budget.rows(batch, places[-1].stop, grid) if rows is None else rows
        rows.write(place, batch)
    if rows is None:
        raise InputError("quantize: there are no calibration images, expected at least 2")
    return rows


def _through(module: nn.Module, inputs: Rows, places: list[slice], device: torch.device) -> Iterator[Tensor]:
    return (module(x) for x in _read(inputs, places, device))


def _read(inputs: Rows, places: list[slice], device: torch.device) -> Iterator[Tensor]:
    return (inputs.read(place, device) for place in places)


def _last_grid(model: nn.Module, unit: Unit) -> Quantizer | None:
    module = model.get_submodule(str(unit.output.target)) if unit.output.op == "call_module" else None
    return module if type(module) is Quantizer else None  # a twin grid has too many integers for one byte


def _reporter(
    progress: Progress | None, iterations: int, units: int, span: tuple[float, float], name: str
) -> Callable[[int, Tensor], None]:
    """What tells the progress of a training that goes from unit span[0] to span[1] of `units`."""

    def report(step: int, loss: Tensor) -> None:
        if progress is not None and ((step + 1) % _REPORTS == 0 or step + 1 == iterations):
            place = span[0] + (span[1] - span[0]) * (step + 1) / iterations
            progress(round(place * iterations), units * iterations, f"{name} loss {loss.item():.4g}")

    return report
