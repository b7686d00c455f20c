"""What the methods share that learn weight and bias of the norms from an entropy-like loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ttaq.errors import InputError
from ttaq.nn.adapt_norms import adaptive_batch_norms, norm_affine
from ttaq.nn.classifier import check_classes, find_classifier, logits_and_features
from ttaq.tta.abl import Balance
from ttaq.tta.adapter import Adapter
from ttaq.tta.optimizer import make_optimizer

__all__ = ["NormLearner", "NormOptions"]


@dataclass(frozen=True, kw_only=True)
class NormOptions:
    """Options of every method that learns the norms.

    lr: learning rate. optimizer: "adam" (betas 0.9, 0.999) or "sgd" (`momentum`, `nesterov`, dampening 0); no weight
        decay.
    abl: None, or the prior of the adaptive balance loss (`ttaq.tta.abl`): "frequency", "gradient", "inverse" or
        "soft". abl_loss: "soft", "hard" or "offset". abl_weight: of its term, 0 for none. abl_momentum: of the prior,
        None for what the number of classes asks for. abl_answer: how much the answer follows the classes of the batch
        where they are not those of the stream so far, 0 for not at all; 1 is Bayes' rule where, without batch norm, no
        image changes what is seen in another.
    """

    lr: float = 1e-3
    optimizer: str = "adam"
    momentum: float = 0.9
    nesterov: bool = False
    abl: str | None = None
    abl_loss: str = "soft"
    abl_weight: float = 1.0
    abl_momentum: float | None = None
    abl_answer: float = 4.0


class NormLearner(Adapter):
    """A method whose parameters are weight and bias of every batch, layer and group norm; all else is frozen.

    Batch norm runs on the statistics of the batch. A subclass names its dataclass of options in `Options`, finds them
    in `self.settings`, registers its buffers in `prepare`, and its `step` calls `see`, then `answered`, whose result it
    returns, then `learn`.
    """

    Options: ClassVar[type[NormOptions]] = NormOptions
    needs_classes: ClassVar[bool] = False
    settings: NormOptions
    balance: Balance | None

    @torch.inference_mode(False)
    def __init__(
        self, model: nn.Module, *, source_images: Tensor | None = None, check_finite: bool = True, **options: Any
    ) -> None:
        who = type(self).__name__
        known = [field.name for field in fields(self.Options)]
        if unknown := [name for name in options if name not in known]:
            raise InputError(f"{who}: no option is named {', '.join(unknown)}, expected some of: {', '.join(known)}")
        chosen = self.Options(**options)
        values = {name: value for name, value in asdict(chosen).items() if chosen.abl or not name.startswith("abl")}
        super().__init__(model, options=values, check_finite=check_finite)
        self.settings = chosen
        self.set_norms()
        affine = self.choose(norm_affine(self.model, who))
        for parameter in affine.values():
            self._refuse_half(parameter.dtype)
        optimizer = make_optimizer(
            who, affine.values(), chosen.optimizer, lr=chosen.lr, momentum=chosen.momentum, nesterov=chosen.nesterov
        )
        self._classifier = find_classifier(self.model, who) if self.needs_classes or chosen.abl else None
        self.balance = None
        if chosen.abl is not None and self._classifier is not None:
            self.balance = Balance(
                self.classes,
                prior=chosen.abl,
                loss=chosen.abl_loss,
                weight=chosen.abl_weight,
                momentum=chosen.abl_momentum,
                answer=chosen.abl_answer,
            ).to(next(iter(affine.values())).device)
        self.prepare(affine, source_images)
        self.adapt(affine, optimizer, self.changing_buffers())

    def set_norms(self) -> None:
        """Put the batch norms into the mode that the method needs."""
        for layer in adaptive_batch_norms(self.model, self._who).values():
            layer.alpha, layer.prior_n = 1.0, None

    def choose(self, affine: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Which of the norms' parameters are learned: all of them, unless a method says otherwise."""
        return affine

    def prepare(self, affine: dict[str, nn.Parameter], source_images: Tensor | None) -> None:
        """Check the options of the method, and register its buffers on the device of the model."""

    def changing_buffers(self) -> list[str]:
        """Names of the model's buffers that a step changes: none, unless a method says otherwise."""
        return []

    @property
    def classes(self) -> int:
        """How many the model tells apart, by its last linear layer."""
        if self._classifier is None:
            raise RuntimeError(f"{self._who}: classes without needs_classes")
        return self._classifier.out_features

    def see(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and the features that the classifier read if something here needs them."""
        if self._classifier is not None and self.balance is not None and self.balance.needs_features:
            return logits_and_features(self.model, x, self._classifier, self._who)
        logits: Tensor = self.model(x)
        if self._classifier is not None:
            check_classes(logits, self._classifier, self._who)
        return logits, None

    def answered(self, logits: Tensor) -> Tensor:
        """What `step` returns for these logits of the model."""
        return logits if self.balance is None else self.balance.answered(logits)

    def answer(self, x: Tensor) -> Tensor:
        return self.answered(self.see(x)[0])

    @property
    def offset(self) -> Tensor | None:
        """What the loss of the method adds to its logits: None, or [classes] where the balance acts through it."""
        return None if self.balance is None else self.balance.offset

    def learn(
        self,
        loss: Tensor,
        logits: Tensor,
        features: Tensor | None,
        weights: Tensor | None = None,
        when: Tensor | None = None,
        start: Sequence[Tensor] | None = None,
    ) -> None:
        """`update` on `loss`, with the balance of the classes where it is on.

        weights: bool or float [B], what the samples count for in `loss`; None for 1 each.
        """
        if self.balance is None:
            self.update(loss, when, start)
            return
        self.update(loss + self.balance.correction(logits, weights), when, start)
        self.balance.observe(logits.detach(), features, weights)
