"""The last linear layer of a model: what it reads, and how many classes it tells apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ttaq.errors import InputError

__all__ = ["find_classifier", "reading"]


def find_classifier(model: nn.Module, who: str) -> nn.Linear:
    """The linear layer of `model` that was registered last. `InputError` in the name of `who` where there is none."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise InputError(
            f"{who}: the model has no linear layer, expected one that ends it, whose outputs are the logits; end the "
            f"model with torch.nn.Linear"
        )
    return layers[-1]


@contextmanager
def reading(layer: nn.Linear, who: str) -> Iterator[list[Tensor]]:
    """The inputs [B, features], detached, of `layer` in the forwards inside the block, in order.

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
        inputs.append(x.detach())

    handle = layer.register_forward_pre_hook(keep)
    try:
        yield inputs
    finally:
        handle.remove()
