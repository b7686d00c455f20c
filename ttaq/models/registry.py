"""Architectures by name, so that a model file can say what to build."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import Tensor, nn

from ttaq.errors import InputError
from ttaq.models.cifar_resnet import CifarResNet

__all__ = ["NAMES", "build", "infer_kwargs"]

_DEPTHS = {f"cifar_resnet{depth}": depth for depth in (8, 20, 32, 44, 56, 110)}
_OPTIONS = tuple(name for name in inspect.signature(CifarResNet).parameters if name != "depth")

NAMES = tuple(_DEPTHS)


def build(name: str, **kwargs: object) -> nn.Module:
    """The architecture `name` with fresh weights, in training mode.

    name: one of NAMES. kwargs: the options of the architecture, all of them JSON values (num_classes, width, mean,
    std), as they stand in the header of a model file. Raises InputError for an unknown name, an unknown option or a
    value it cannot have.
    """
    depth = _depth(name)
    unknown = sorted(set(kwargs) - set(_OPTIONS))
    if unknown:
        raise InputError(f"build: {name} has no option {', '.join(unknown)}; its options are {', '.join(_OPTIONS)}")
    try:
        return CifarResNet(depth, **kwargs)  # type: ignore[arg-type]
    except TypeError as error:
        raise InputError(f"build: {name} cannot be built with {kwargs}: {error}") from error


def infer_kwargs(name: str, state: Mapping[str, Tensor]) -> dict[str, int]:
    """The options of `name` that the shapes of its weights tell: num_classes and width. Weights that are not there
    tell nothing."""
    _depth(name)
    sizes = {"num_classes": state.get("linear.weight"), "width": state.get("conv1.weight")}
    return {option: weight.shape[0] for option, weight in sizes.items() if weight is not None and weight.ndim}


def _depth(name: str) -> int:
    if name not in _DEPTHS:
        raise InputError(f"build: no architecture is named {name!r}; there are {', '.join(NAMES)}")
    return _DEPTHS[name]
