"""The training of one unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ttaq.nn import QuantizedModel
from ttaq.ptq.caches import Rows, mixed
from ttaq.ptq.prediction import prediction_loss
from ttaq.ptq.settings import Reconstruction
from ttaq.ptq.student import Student
from ttaq.ptq.units import Unit
from ttaq_kernels import soft_round_step_

__all__ = ["Lesson", "train_unit"]

_SMALLEST = torch.finfo(torch.float32).eps  # scale
_WARM_UP = 3  # steps before a CUDA graph is captured, so that everything lazy has happened


@dataclass
class Lesson:
    """What a unit learns from.

    floating, quantized: its input in the float and in the quantized model. targets: the outputs of the float unit, None
    to compute them from the batch. teacher: the float unit. tail: the float units after it. logits: what they give.
    """

    unit: Unit
    floating: Rows
    quantized: Rows
    targets: Rows | None
    teacher: nn.Module
    tail: Sequence[nn.Module]
    logits: Tensor | None


def train_unit(
    model: QuantizedModel,
    lesson: Lesson,
    settings: Reconstruction,
    generator: torch.Generator,
    report: Callable[[int, Tensor], None],
) -> None:
    """Train the unit of `lesson` in `model`, in place. report: called with each step and its reconstruction loss."""
    step = _Step(model, lesson, settings, generator)
    with torch.enable_grad():
        if step.device.type == "cuda" and step.rows_are_here:
            _run_captured(step, report)
        else:
            for number in range(settings.iterations):
                step.prepare(number)
                step.compute()
                report(number, step.loss)
    step.finish()


def _run_captured(step: _Step, report: Callable[[int, Tensor], None]) -> None:
    """The same steps, all but the first few of them as replays of a CUDA graph."""
    stream = torch.cuda.Stream(step.device)  # type: ignore[no-untyped-call]
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(step.generator)
    for number in range(step.settings.iterations):
        step.prepare(number)
        if number < _WARM_UP:
            stream.wait_stream(torch.cuda.current_stream(step.device))
            with torch.cuda.stream(stream):
                step.compute()
            torch.cuda.current_stream(step.device).wait_stream(stream)
        else:
            if number == _WARM_UP:
                with torch.cuda.graph(graph):
                    step.compute()
            graph.replay()
        report(number, step.loss)


class _Step:
    """One step of training, all of whose inputs are tensors that stay where they are."""

    def __init__(
        self, model: QuantizedModel, lesson: Lesson, settings: Reconstruction, generator: torch.Generator
    ) -> None:
        self.lesson, self.settings, self.generator = lesson, settings, generator
        self.student = Student(model, lesson.unit, settings.keep_quantized)
        self.device = self.student.seeds.device
        self.scales = self.student.scales if settings.scale_lr else []
        self.affine = self.student.affine if settings.affine_lr else []
        self.frozen = [p for p in self.affine if not p.requires_grad]
        for parameter in self.affine:
            parameter.requires_grad_()
        self.optimizers = [
            torch.optim.Adam(parameters, lr=torch.tensor(lr, device=self.device), fused=True)
            for parameters, lr in ((self.scales, settings.scale_lr), (self.affine, settings.affine_lr))
            if parameters
        ]
        self.rates = [optimizer.param_groups[0]["lr"].clone() for optimizer in self.optimizers]
        self.tail = nn.Sequential(*lesson.tail)
        self.count = len(lesson.floating.values)
        self.index = torch.zeros(settings.batch_size, dtype=torch.int64, device=self.device)
        self.schedule = torch.tensor(list(map(self._knobs, range(settings.iterations))), device=self.device)
        self.knobs = self.schedule[0, :4].clone()
        self.loss = torch.zeros((), device=self.device)

    @property
    def rows_are_here(self) -> bool:
        rows = [self.lesson.floating, self.lesson.quantized, self.lesson.targets]
        return all(r is None or r.values.device == self.device for r in rows)

    def _knobs(self, step: int) -> tuple[float, ...]:
        """Of a step: learning rate, beta, penalty and number for the weights; the share left of the other rates."""
        beta = self.settings.exponent(step)
        penalty = 0.0 if beta is None else self.settings.rounding_penalty
        decay = 0.5 * (1 + math.cos(math.pi * step / self.settings.iterations))
        return self.settings.weight_lr, beta or 2.0, penalty, step + 1, decay

    def prepare(self, step: int) -> None:
        """Draw the images and the drop of a step, and set its rates."""
        self.index.random_(self.count, generator=self.generator)
        self.student.seeds.random_(generator=self.generator)
        self.knobs.copy_(self.schedule[step, :4])
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            torch.mul(rate, self.schedule[step, 4], out=optimizer.param_groups[0]["lr"])

    def compute(self) -> None:
        student, settings = self.student, self.settings
        x = self._input(settings.keep_quantized)
        loss = student.loss(x, self._target())
        total = loss
        if self.lesson.logits is not None:
            logits, step = self.lesson.logits.index_select(0, self.index), self.lesson.quantized.scale
            total = total + prediction_loss(
                student.output, self.tail, self._input(1.0), x, logits, settings, step, self.generator
            )
        if settings.mean_penalty:
            means = torch.cat([w_hat.flatten(1).mean(1) for w_hat in student.w_hats])
            total = total + settings.mean_penalty * means.square().sum()
        others = [*self.scales, *self.affine]
        grads = torch.autograd.grad(total, [*student.w_hats, *others])
        soft_round_step_(student.roundings, grads[: len(student.w_hats)], self.knobs)
        for parameter, grad in zip(others, grads[len(student.w_hats) :], strict=True):
            parameter.grad = grad
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            for scale in self.scales:
                scale.abs_().clamp_(min=_SMALLEST)
            self.loss.copy_(loss)

    def _input(self, keep_quantized: float) -> Tensor:
        return mixed(self.lesson.quantized, self.lesson.floating, self.index, keep_quantized, self.student.seeds[0])

    def _target(self) -> Tensor:
        if self.lesson.targets is not None:
            return self.lesson.targets.take(self.index)
        # With statistics of the batch, what the float unit does to an image depends on the others.
        with torch.no_grad():
            return self.lesson.teacher(self.lesson.floating.take(self.index))  # type: ignore[no-any-return]

    def finish(self) -> None:
        """Round for good."""
        for parameter in self.affine:
            parameter.grad = None
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        self.student.finish()
