"""The last linear layer of a model: what it reads, and how many classes it tells apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ttaq.errors import InputError

__all__ = ["check_classes", "find_classifier", "logits_and_features", "reading"]


def find_classifier(model: nn.Module, who: str) -> nn.Linear:
    """The linear layer of `model` that was registered last. `InputError` in the name of `who` where there is none."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise InputError(
            f"{who}: the model has no linear layer, expected one that ends it, whose outputs are the logits; end the "
            f"model with torch.nn.Linear"
        )
    return layers[-1]


def check_classes(logits: Tensor, classifier: nn.Linear, who: str) -> None:
    """`InputError` in the name of `who` unless `logits` have as many classes as `classifier` has outputs."""
    if logits.shape[1] != classifier.out_features:
        raise InputError(
            f"{who}: the model answers with {logits.shape[1]} classes and its last linear layer has "
            f"{classifier.out_features} outputs, expected the same; end the model with that layer"
        )


def logits_and_features(
    model: nn.Module, x: Tensor, classifier: nn.Linear, who: str, *, detach: bool = True
) -> tuple[Tensor, Tensor]:
    """Logits of `model` on x, and the features [B, d] that its `classifier` read; both are checked.

    detach: whether the features are constants; else gradients reach the model through them.
    """
    with reading(classifier, who) as read:
        logits: Tensor = model(x)
    if not read:
        raise InputError(
            f"{who}: the model answered without its last linear layer, expected it at the end; remove linear layers "
            f"that are not used"
        )
    check_classes(logits, classifier, who)
    return logits, read[-1].detach() if detach else read[-1]


@contextmanager
def reading(layer: nn.Linear, who: str) -> Iterator[list[Tensor]]:
    """The inputs [B, features] of `layer` in the forwards inside the block, in order.

    Raises `InputError` in the name of `who` for an input that is not a matrix.
    """
    inputs: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        x = arguments[0]
        if x.ndim != 2:
            raise InputError(
                f"{who}: the last linear layer reads a tensor of shape {tuple(x.shape)}, expected [B, features]; the "
                f"method needs a model that ends with one linear layer"
            )
        inputs.append(x)

    handle = layer.register_forward_pre_hook(keep)
    try:
        yield inputs
    finally:
        handle.remove()
