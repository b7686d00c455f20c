"""CoTTA: a weight-averaged teacher that sees many versions of the images, and a student that forgets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ttaq.data.augment import augment
from ttaq.errors import InputError
from ttaq.nn.integer import IntegerLayer
from ttaq.tta.norm_learner import NormLearner, NormOptions
from ttaq.tta.teacher import Teacher, forward_with, values_in
from ttaq_kernels import softmax_cross_entropy

__all__ = ["CoTTA", "live_parameters"]

_LOSSES = ("cifar", "imagenet")


def live_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `model`, by name, that a gradient step can move: all of floating type in a float model.

    In a quantized model the weights that lie on a calibrated grid stay: the integers are what such a model is, and a
    step smaller than their spacing would change nothing or everything. What is left there are the biases, the norms,
    the weights of layers that stayed float, and embeddings. Grids are buffers and no parameters.
    """
    layers = [module for module in model.modules() if isinstance(module, IntegerLayer)]
    on_grids = {layer.weight for layer in layers if layer.weight_quantizer.scale is not None}
    return {name: p for name, p in model.named_parameters() if p.is_floating_point() and p not in on_grids}


@dataclass(frozen=True, kw_only=True)
class CoTTAOptions(NormOptions):
    """loss: "cifar" or "imagenet", those of the two experiments. teacher_momentum: of the running mean that the teacher
    is. restore: probability for each value of the student to return to the source after a step. confidence: of the
    source model, below which the versions are used. augmentations: how many versions."""

    loss: str = "cifar"
    teacher_momentum: float = 0.999
    restore: float = 0.01
    confidence: float = 0.92
    augmentations: int = 32


class CoTTA(NormLearner):
    """A student learns all of its parameters from a teacher that is its running mean and is asked about many versions.

    With z(theta, x) the logits, student theta, teacher phi and source theta0, beginning all three alike::

        y     = 1/N sum_n z(phi, augment_n(x))   if mean_i max_c softmax(z(theta0, x))_ic < confidence,
                z(phi, x)                        else
        L     = mean_i CE(softmax(y_i), z_i)     "cifar": -sum_c softmax(y)_c ln softmax(z)_c,   z = z(theta, x)
                                                 "imagenet": the mean of that and of the same with y and z exchanged
        theta <- optimizer step on L             gradients reach theta alone
        phi   <- teacher_momentum phi + (1 - teacher_momentum) theta
        theta <- m theta0 + (1 - m) theta        m ~ Bernoulli(restore), for every value

    The logits returned are y: those of the teacher, before it learns from the batch. Batch norm runs on the statistics
    of the batch, in all three.

    Learned are all parameters of a float model; of a quantized one those that `live_parameters` tells.

    Args:
        as in `ttaq.tta.norm_learner.NormOptions`; the literature uses Adam with 1e-3 for CIFAR-C, SGD with 0.01 for
            ImageNet-C. With abl the student's loss is balanced.
        loss, teacher_momentum, augmentations: "cifar", 0.999, 32.
        restore: 0.01 for CIFAR-C, 0.001 for ImageNet-C.
        confidence: 0.92 for CIFAR10-C, 0.72 for CIFAR100-C, 0.1 for ImageNet-C.

    Errors: `InputError` for options out of range, and for a model without norms.

    State: the parameters, optimizer, teacher.

    Differs from the paper: the versions are computed for every batch, one after the other, and the confidence decides
    on the device which answer counts, so that nothing waits for it. The time is that of `augmentations` + 3 forwards
    and a backward whatever the confidence, as in the authors' code for CIFAR, and the memory that of one forward. In a
    quantized model weights on grids are not learned.

    Source: Wang et al., "Continual test-time domain adaptation", arXiv 2203.13591, section 3.
    """

    method: ClassVar[str] = "cotta"
    Options = CoTTAOptions
    settings: CoTTAOptions
    teacher: Teacher

    def choose(self, affine: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:  # noqa: ARG002
        return live_parameters(self.model)

    def prepare(self, affine: dict[str, nn.Parameter], source_images: Tensor | None) -> None:  # noqa: ARG002
        chosen = self.settings
        if chosen.loss not in _LOSSES:
            raise InputError(f"CoTTA: loss is {chosen.loss!r}, expected {' or '.join(_LOSSES)}")
        for name in ("teacher_momentum", "restore", "confidence"):
            value = getattr(chosen, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise InputError(f"CoTTA: {name} is {value!r}, expected a number in [0, 1]")
        if type(chosen.augmentations) is not int or chosen.augmentations < 1:
            raise InputError(f"CoTTA: augmentations is {chosen.augmentations!r}, expected an integer of at least 1")
        self.teacher = Teacher(affine)

    @property
    def augments(self) -> bool:
        return True

    def step(self, x: Tensor) -> Tensor:
        """The logits of the teacher, then a step of the student, one of the teacher, and some forgetting."""
        generator = self.generator()
        taught = self._taught(x, generator)
        answer = self.answered(taught)
        logits, features = self.see(x)
        symmetric = self.settings.loss == "imagenet"
        loss = softmax_cross_entropy(logits, taught, None, self.offset, symmetric).mean()
        self.learn(loss, logits, features)
        self.teacher.follow_(dict(self.parameters_adapted()), self.settings.teacher_momentum)
        self._forget(generator)
        return answer

    def answer(self, x: Tensor) -> Tensor:
        return self.answered(self._taught(x, self.generator()))

    @torch.no_grad()
    def _taught(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """y"""
        names = [name for name, _ in self.parameters_adapted()]
        source = forward_with(self.model, dict(zip(names, self.source_values, strict=True)), x)
        confidence = source.float().softmax(1).amax(1).mean()
        with values_in(self.model, self.teacher.values()):
            plain: Tensor = self.model(x)
            total = torch.zeros_like(plain, dtype=torch.float32)
            for _ in range(self.settings.augmentations):
                total += self.model(augment(x, generator))
        versions = (total / self.settings.augmentations).to(plain.dtype)
        return torch.where(confidence < self.settings.confidence, versions, plain)

    @torch.no_grad()
    def _forget(self, generator: torch.Generator) -> None:
        """Some values of the student back to the source, which ones drawn on the device."""
        seed = torch.randint(2**62, (1,), generator=generator).tolist()[0]
        parameters = [parameter for _, parameter in self.parameters_adapted()]
        on_device = torch.Generator(parameters[0].device).manual_seed(seed)
        for parameter, source in zip(parameters, self.source_values, strict=True):
            # A draw in float32 whatever the type of the parameter: the same mask for every type.
            draw = torch.rand(parameter.shape, generator=on_device, device=parameter.device)
            parameter.copy_(torch.where(draw < self.settings.restore, source, parameter))
