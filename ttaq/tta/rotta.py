"""RoTTA: a teacher for streams whose neighbours are alike, learned from a balanced memory of what came."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttaq.data.augment import augment
from ttaq.errors import InputError
from ttaq.nn.adapt_norms import adaptive_batch_norms
from ttaq.nn.batch_norm import AdaptiveBatchNorm2d
from ttaq.nn.classifier import check_classes
from ttaq.tta.norm_learner import NormLearner, NormOptions
from ttaq.tta.running import running_means_
from ttaq.tta.teacher import Teacher
from ttaq_kernels import softmax_cross_entropy, softmax_entropy

__all__ = ["Bank", "RoTTA"]

_FREE = -1  # the label of a place without image


class _Kept(NamedTuple):
    """What is known of an image in the bank; label: the predicted class."""

    label: int
    age: int
    entropy: float


class Bank(nn.Module):
    """Images worth keeping: about as many of every predicted class, the new and the certain rather than the others.

    An image of entropy H and age a, the number of images that came since, itself included, has the score::

        1 / (1 + exp(-a / capacity)) + H / ln classes

    A class below its quota of capacity / classes images gets a new one in: in a free place, or in that of an image of
    the classes that have the most. In a class that has its quota the new image competes with its like. The one to go is
    that with the highest score, if that is above the score of the new one, which else is dropped. An image whose
    entropy is not finite is taken as if it had not come.

    State: images [capacity, C, H, W], without elements until the first come, whose size later ones are resized to;
    labels (-1 where there is no image) and ages, int64, and entropies [capacity].
    """

    images: Tensor
    labels: Tensor
    ages: Tensor
    entropies: Tensor

    def __init__(self, capacity: int, classes: int) -> None:
        super().__init__()
        self.capacity, self.classes = capacity, classes
        self.register_buffer("images", torch.zeros(capacity, 0, 0, 0))
        self.register_buffer("labels", torch.full((capacity,), _FREE))
        self.register_buffer("ages", torch.zeros(capacity, dtype=torch.int64))
        self.register_buffer("entropies", torch.zeros(capacity))

    @torch.no_grad()
    def take(self, x: Tensor, labels: list[int], entropies: list[float]) -> None:
        """The images x [B, C, H, W], one after the other, with predicted classes and entropies."""
        kept, arrived = self._kept(), {}
        for index, (label, entropy) in enumerate(zip(labels, entropies, strict=True)):
            if not math.isfinite(entropy):
                continue
            new = _Kept(label, 0, entropy)
            place = self._place(kept, new)
            if place is not None:
                kept[place : place + 1] = [new]  # appends where the place is the first free one
                arrived[place] = index
            kept = [image._replace(age=image.age + 1) for image in kept]
        for buffer, values in zip((self.labels, self.ages, self.entropies), zip(*kept, strict=True), strict=False):
            buffer[: len(kept)] = torch.tensor(values, dtype=buffer.dtype, device=buffer.device)
        if arrived:
            if not self.images.numel():
                self.images.set_(self.images.new_zeros(self.capacity, *x.shape[1:]))  # type: ignore[call-overload]
            new_images = x[list(arrived.values())].to(self.images.dtype)
            if x.shape[2:] != self.images.shape[2:]:
                new_images = functional.interpolate(new_images, self.images.shape[2:], mode="bilinear")
            self.images[list(arrived)] = new_images

    def contents(self) -> tuple[Tensor, Tensor]:
        """The images [N, C, H, W] and their ages [N]."""
        count = len(self._kept())
        return self.images[:count], self.ages[:count]

    def _kept(self) -> list[_Kept]:
        columns = zip(self.labels.tolist(), self.ages.tolist(), self.entropies.tolist(), strict=True)
        return [_Kept(*values) for values in columns if values[0] != _FREE]

    def _score(self, image: _Kept) -> float:
        timeliness = 1 / (1 + math.exp(-image.age / self.capacity))
        return timeliness + image.entropy / math.log(max(self.classes, 2))

    def _place(self, kept: list[_Kept], new: _Kept) -> int | None:
        """Where the new image goes, which may be behind the others; None to drop it."""
        counts = Counter(image.label for image in kept)
        rivals = {new.label}
        if counts[new.label] < self.capacity / self.classes:
            if len(kept) < self.capacity:
                return len(kept)
            rivals = {label for label, count in counts.items() if count == max(counts.values())}
        places = [place for place, image in enumerate(kept) if image.label in rivals]
        worst = max(places, key=lambda place: self._score(kept[place]))
        return worst if self._score(kept[worst]) > self._score(new) else None


@dataclass(frozen=True, kw_only=True)
class RoTTAOptions(NormOptions):
    """capacity: of the bank, in images. update_every: how many images there are between two steps. teacher_momentum:
    of the running mean that the teacher is. norm_share: of the batch in the running statistics of batch norm."""

    capacity: int = 64
    update_every: int = 64
    teacher_momentum: float = 0.999
    norm_share: float = 0.05


class RoTTA(NormLearner):
    """A student learns the norms from a teacher that is its running mean, on a bank of images balanced by class.

    For every image x of the stream, which is then offered to a `Bank` with class and entropy of the answer, and every
    `update_every` images for the images x_i of the bank, with their ages a_i::

        answer   z(teacher, x)                                       with its running statistics
        y        = z(teacher, x_i),   z = z(student, augment(x_i))   with robust batch norm
        L        = mean_i w_i (-sum_c softmax(y_i)_c ln softmax(z_i)_c)
        w_i      = exp(-s_i) / (1 + exp(-s_i)),   s_i = a_i / capacity
        teacher <- teacher_momentum teacher + (1 - teacher_momentum) student     after the step of the student on L

    Robust batch norm takes the bank into the running statistics, `mean <- (1 - norm_share) mean + norm_share mean_bank`
    and the biased variance likewise, and normalises with the result; gradients go through the share of the bank.
    Student and teacher have running statistics of their own, which begin as those of the source.

    The logits returned are those of the teacher before it sees the batch.

    Args:
        as in `ttaq.tta.norm_learner.NormOptions`; the literature uses Adam with 1e-3. With abl the student's loss is
            balanced.
        capacity, update_every, teacher_momentum, norm_share: 64, 64, 0.999 and 0.05 in the paper.

    Errors: `InputError` for options out of range, for a model without norms or without a last linear layer, and for
        batch norm without running statistics.

    State: the norm parameters and running statistics of the student, those of the teacher, optimizer, and the bank,
        whose images are as many bytes as `capacity` images of the stream.

    Differs from the paper: dropout stays off in the steps. Which images the bank keeps is decided on the host, for
    which a batch waits for the device.

    Source: Yuan et al., "Robust test-time adaptation in dynamic scenarios", arXiv 2303.13899, section 3.
    """

    method: ClassVar[str] = "rotta"
    Options = RoTTAOptions
    settings: RoTTAOptions
    needs_classes = True
    waits = True
    resizable = ("bank.images",)
    teacher: Teacher
    bank: Bank

    def set_norms(self) -> None:
        """Running statistics, outside of the steps."""
        self._norms: dict[str, AdaptiveBatchNorm2d] = adaptive_batch_norms(self.model, "RoTTA")
        for name, layer in self._norms.items():
            if layer.running_mean is None:
                raise InputError(f"RoTTA: {name} has no running statistics to begin with; use 'cotta'")
            layer.alpha, layer.prior_n = None, None

    def prepare(self, affine: dict[str, nn.Parameter], source_images: Tensor | None) -> None:  # noqa: ARG002
        chosen = self.settings
        for name in ("capacity", "update_every"):
            value = getattr(chosen, name)
            if type(value) is not int or value < 1:
                raise InputError(f"RoTTA: {name} is {value!r}, expected an integer of at least 1")
        for name in ("teacher_momentum", "norm_share"):
            value = getattr(chosen, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise InputError(f"RoTTA: {name} is {value!r}, expected a number in [0, 1]")
        statistics = {name: self.model.get_buffer(name) for name in self.changing_buffers()}
        self.teacher = Teacher({**affine, **statistics})
        self.bank = Bank(chosen.capacity, self.classes).to(next(iter(affine.values())).device)

    def changing_buffers(self) -> list[str]:
        return [f"{name}.{key}" for name in self._norms for key in ("running_mean", "running_var")]

    @property
    def augments(self) -> bool:
        return True

    @property
    def horizon(self) -> int:
        """Until there is a step with a full bank."""
        every = self.settings.update_every
        return every * math.ceil(self.settings.capacity / every)

    def fill(self, shape: Sequence[int]) -> None:
        """A bank that has an image in every place, and a step with the next image."""
        count = self.settings.capacity
        images = torch.zeros(count, *shape, device=self.bank.ages.device)
        self.bank.take(images, [place % self.classes for place in range(count)], [0.0] * count)
        self._seen["samples"] = self.settings.update_every - 1

    def step(self, x: Tensor) -> Tensor:
        """The logits of the teacher, then the bank and, when it is time, a step of each."""
        logits = self._taught(x)
        answer = self.answered(logits)
        labels = logits.argmax(1).tolist()
        entropies = softmax_entropy(logits).tolist()
        generator = self.generator()
        every, seen = self.settings.update_every, self._seen["samples"]
        start = 0
        while start < len(x):
            end = min(len(x), start + every - (seen + start) % every)
            self.bank.take(x[start:end], labels[start:end], entropies[start:end])
            if (seen + end) % every == 0:
                self._learn_from_bank(generator)
            start = end
        return answer

    def answer(self, x: Tensor) -> Tensor:
        return self.answered(self._taught(x))

    @torch.no_grad()
    def _taught(self, x: Tensor) -> Tensor:
        logits: Tensor = self.teacher(self.model, x)
        if self._classifier is not None:
            check_classes(logits, self._classifier, "RoTTA")
        return logits

    def _learn_from_bank(self, generator: torch.Generator) -> None:
        images, ages = self.bank.contents()
        if not len(images):
            return
        (taught, _), of_teacher = self._robust(lambda: (self.teacher(self.model, images), None))
        (logits, features), of_student = self._robust(lambda: self.see(augment(images, generator)))
        weights = torch.sigmoid(-ages.float() / self.settings.capacity)
        loss = softmax_cross_entropy(logits, taught, weights, self.offset).mean()
        self.learn(loss, logits, features, weights)
        self.teacher.follow_(dict(self.parameters_adapted()), self.settings.teacher_momentum)
        for mine, new in ((self.teacher.values(), of_teacher), (dict(self.buffers_adapted()), of_student)):
            if new:
                running_means_([mine[name] for name in new], list(new.values()), 0.0)

    def _robust(
        self, run: Callable[[], tuple[Tensor, Tensor | None]]
    ) -> tuple[tuple[Tensor, Tensor | None], dict[str, Tensor]]:
        """`run()` with robust batch norm, and by name what the running statistics become."""
        for layer in self._norms.values():
            layer.alpha, layer.keep_statistics = self.settings.norm_share, True
        try:
            result = run()
            new = {
                f"{name}.{key}": value
                for name, layer in self._norms.items()
                if layer.statistics is not None
                for key, value in zip(("running_mean", "running_var"), layer.statistics, strict=True)
            }
        finally:
            for layer in self._norms.values():
                layer.alpha, layer.keep_statistics, layer.statistics = None, False, None
        return result, new
