"""RMT: a mean teacher with a symmetric loss, and features pulled towards the prototypes of the source."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttaq.data.augment import augment
from ttaq.errors import InputError
from ttaq.nn.adapt_norms import adaptive_batch_norms
from ttaq.nn.classifier import find_classifier, logits_and_features
from ttaq.tta.cotta import live_parameters
from ttaq.tta.images import check_source_images
from ttaq.tta.norm_learner import NormLearner, NormOptions
from ttaq.tta.teacher import Teacher
from ttaq_kernels import softmax_cross_entropy

__all__ = ["RMT"]

_BATCH = 64
_PROJECTED = 128
_PROJECTOR = "projector/"  # in front of the names of its parameters; no parameter of a model has a slash


@dataclass(frozen=True, kw_only=True)
class RMTOptions(NormOptions):
    """teacher_momentum: of the running mean that the teacher is. contrast_weight: of the contrastive loss.
    temperature: of its similarities."""

    teacher_momentum: float = 0.999
    contrast_weight: float = 1.0
    temperature: float = 0.1


class RMT(NormLearner):
    """A student learns all of its parameters from a teacher that is its running mean, and keeps near the source.

    With z the logits and h the features of the student for x, z', h' those for augment(x), y the logits of the teacher
    for x, CE(a, b) = -sum_c softmax(b)_c ln softmax(a)_c, and SCE(a, b) = CE(a, b)/2 + CE(b, a)/2::

        L   = mean_i( SCE(z_i, y_i)/2 + SCE(z'_i, y_i)/2 ) + contrast_weight L_c
        L_c = mean_v mean_{u in P(v)} -ln( exp(<v, u>/temperature) / sum_{w != v} exp(<v, w>/temperature) )
        teacher <- teacher_momentum teacher + (1 - teacher_momentum) student     after the step on L

    The v, u, w are 3 views for each sample, projected by a small network (d -> 128 -> ReLU -> 128, learned too) and
    normalised: h_i, h'_i, and the prototype of highest cosine with h_i. P(v) are the other two views of its sample.
    Prototypes are the means over `source_images` of the features of the source model, for each class that it predicts;
    a class that it predicts for none takes its row of the classifier, which is the direction in which its logit grows,
    with the mean length of the features.

    The logits returned are z + y, before the update. Batch norm runs on the statistics of the batch, in both; for the
    prototypes on those of the source. Learned are the parameters that `ttaq.tta.cotta.live_parameters` tells.

    Args:
        as in `ttaq.tta.norm_learner.NormOptions`; the literature uses Adam with 1e-3 for CIFAR-C, SGD with 0.01 for
            ImageNet-C. With abl the logits z are balanced.
        source_images: [N, 3, H, W] of the data that the model was trained on, without labels.
        teacher_momentum, contrast_weight, temperature: 0.999, 1 and 0.1 in the paper.

    Errors: `InputError` for options out of range, without source images, and for a model without norms or without a
        last linear layer.

    State: the parameters, those of the projector, optimizer, teacher, prototypes.

    Differs from the paper: it is its source-free form, without the loss on labelled source images and without the
    warm-up on them; the prototypes come from predictions instead of labels. The projector begins with a fixed seed. In
    a quantized model weights on grids are not learned.

    Source: Döbler et al., "Robust mean teacher for continual and gradual test-time adaptation", arXiv 2211.13081,
    section 3.
    """

    method: ClassVar[str] = "rmt"
    Options = RMTOptions
    settings: RMTOptions
    needs_classes = True
    source_images = 2000
    prototypes: Tensor
    teacher: Teacher
    projector: nn.Sequential
    _head: nn.Linear

    def choose(self, affine: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        some = next(iter(affine.values()))
        self._head = find_classifier(self.model, "RMT")
        self.projector = _projector(self._head.in_features).to(some)
        own = {f"{_PROJECTOR}{name}": parameter for name, parameter in self.projector.named_parameters()}
        return {**live_parameters(self.model), **own}

    def prepare(self, affine: dict[str, nn.Parameter], source_images: Tensor | None) -> None:
        ranges = {"teacher_momentum": (0.0, 1.0), "contrast_weight": (0.0, 1e6), "temperature": (1e-3, 1e3)}
        for name, (low, high) in ranges.items():
            value = getattr(self.settings, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise InputError(f"RMT: {name} is {value!r}, expected a number from {low:g} to {high:g}")
        images = check_source_images("RMT", source_images, "cotta")
        self.teacher = Teacher(self._of_the_model(affine))
        self.register_buffer("prototypes", self._class_means(images))

    @staticmethod
    def _of_the_model(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in parameters.items() if not name.startswith(_PROJECTOR)}

    @torch.no_grad()
    def _class_means(self, images: Tensor) -> Tensor:
        """[classes, d], float32."""
        for layer in adaptive_batch_norms(self.model, "RMT").values():
            layer.alpha = None
        device = next(self.projector.parameters()).device
        read = [self._read(batch.to(device)) for batch in torch.split(images.detach(), _BATCH)]
        self.set_norms()
        logits, features = (torch.cat(parts).float() for parts in zip(*read, strict=True))
        # A product adds in a fixed order, where scattered additions on a GPU would not.
        belongs = functional.one_hot(logits.argmax(1), self.classes).float()
        count = belongs.sum(0).unsqueeze(1)
        # The rows by what they do, which a packed layer tells too.
        unit = torch.eye(features.shape[1], device=device, dtype=read[0][1].dtype)
        rows: Tensor = (self._head(unit) - self._head(torch.zeros_like(unit[:1]))).float().T
        rows = functional.normalize(rows) * features.norm(dim=1).mean()
        return torch.where(count > 0, belongs.T @ features / count.clamp(min=1), rows)

    def _read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and features of the student, with gradients."""
        return logits_and_features(self.model, x, self._head, "RMT", detach=False)

    @property
    def augments(self) -> bool:
        return True

    def step(self, x: Tensor) -> Tensor:
        """The logits of student and teacher, then a step of each."""
        taught: Tensor = self.teacher(self.model, x)
        logits, features = self._read(x)
        answer = self.answered(logits + taught)
        others, features_of_others = self._read(augment(x, self.generator()))
        direct = softmax_cross_entropy(logits, taught, None, self.offset, symmetric=True)
        across = softmax_cross_entropy(others, taught, None, self.offset, symmetric=True)
        loss = (direct + across).mean() / 2
        loss = loss + self.settings.contrast_weight * self._contrast(features, features_of_others)
        watched = features.detach() if self.balance is not None and self.balance.needs_features else None
        self.learn(loss, logits, watched)
        self.teacher.follow_(self._of_the_model(dict(self.parameters_adapted())), self.settings.teacher_momentum)
        return answer

    def answer(self, x: Tensor) -> Tensor:
        taught: Tensor = self.teacher(self.model, x)
        return self.answered(self._read(x)[0] + taught)

    def _contrast(self, features: Tensor, others: Tensor) -> Tensor:
        """L_c"""
        with torch.autocast(features.device.type, enabled=False):
            features, others = features.float(), others.float()
            similarity = functional.normalize(features.detach()) @ functional.normalize(self.prototypes).T
            near = self.prototypes[similarity.argmax(1)]
            views = functional.normalize(self.projector(torch.stack([near, features, others], 1).flatten(0, 1)))
            alike = views @ views.T / self.settings.temperature
            sample = torch.arange(len(views), device=views.device) // 3
            itself = torch.eye(len(views), dtype=torch.bool, device=views.device)
            positive = (sample.unsqueeze(0) == sample.unsqueeze(1)) & ~itself
            log_share = alike.masked_fill(itself, -math.inf).log_softmax(1)
            loss: Tensor = -torch.where(positive, log_share, 0.0).sum(1).mean() / 2
            return loss


def _projector(features: int) -> nn.Sequential:
    """d -> 128 -> ReLU -> 128, initialised as torch does, but always to the same values."""
    generator = torch.Generator().manual_seed(0)
    layers = [nn.Linear(width, _PROJECTED, device="meta").to_empty(device="cpu") for width in (features, _PROJECTED)]
    with torch.no_grad():
        for layer in layers:
            bound = 1 / math.sqrt(layer.in_features)
            for parameter in layer.parameters():
                parameter.uniform_(-bound, bound, generator=generator)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])
