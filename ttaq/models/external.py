"""Architectures of timm and torchvision under their own weight names, where those packages are installed."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ttaq.errors import InputError, MissingPackageError
from ttaq.models.cifar_resnet import IMAGENET_MEAN, IMAGENET_STD
from ttaq.models.normalize import Normalize

__all__ = ["PACKAGES", "build_external", "infer_external", "is_external"]

PACKAGES = ("timm", "torchvision")

# What the two packages call their last layer; of a numbered list it is the last one.
_CLASSIFIER = re.compile(r"(?:fc|head|heads\.head|head\.fc|classifier(?:\.(\d+))?)\.weight")

_Statistics = tuple[Sequence[float], Sequence[float]]


def is_external(name: str) -> bool:
    """Whether `name` is PACKAGE:NAME with one of PACKAGES."""
    package, colon, _ = str(name).partition(":")  # a damaged header may say anything
    return bool(colon) and package in PACKAGES


def build_external(
    name: str,
    num_classes: int = 1000,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """The architecture `timm:NAME` or `torchvision:NAME` with fresh weights; nothing is downloaded.

    The names in its state_dict are those of the package. Input (N, 3, H, W) in [0, 1]: `mean` and `std` normalise it as
    the first step; None takes what timm states for the weights of that name (a tag such as `.augreg_in1k` decides), for
    torchvision those of ImageNet.

    Raises MissingPackageError if the package is absent or cannot be imported, InputError for a name it does not have
    and options it refuses.
    """
    if num_classes < 1:
        raise InputError(f"build: num_classes is {num_classes}, expected at least 1")
    package, _, architecture = name.partition(":")
    make = _timm if package == "timm" else _torchvision
    model, (own_mean, own_std) = make(architecture, num_classes)
    if hasattr(model, "normalize"):
        raise InputError(f"build: {name} has an attribute `normalize` of its own, so ttaq cannot put its own in front")
    model.normalize = Normalize(own_mean if mean is None else mean, own_std if std is None else std)
    # A wrapper around the model would put a prefix in front of every weight name, and torch.fx does not see hooks.
    model.__class__ = _normalizing(type(model))
    return model


def infer_external(state: Mapping[str, Tensor]) -> dict[str, int]:
    """`num_classes` from the shape of the last layer, if it has one of the names that the packages use."""
    matches = ((_CLASSIFIER.fullmatch(key), weight) for key, weight in state.items())
    found = {int(match[1] or 0): weight.shape[0] for match, weight in matches if match and weight.ndim > 1}
    return {"num_classes": found[max(found)]} if found else {}


def _timm(architecture: str, num_classes: int) -> tuple[nn.Module, _Statistics]:
    timm = _import("timm")
    # A name with a source in front of it (hf-hub:, local-dir:) would read more than the weights that the user named.
    if ":" in architecture or not timm.is_model(architecture):
        raise InputError(
            f"build: timm {timm.__version__} has no architecture {architecture!r}; timm.list_models() names them all"
        )
    model = _make(timm.create_model, architecture, pretrained=False, num_classes=num_classes)
    stated = getattr(model, "pretrained_cfg", None) or {}
    return model, (stated.get("mean", IMAGENET_MEAN), stated.get("std", IMAGENET_STD))


def _torchvision(architecture: str, num_classes: int) -> tuple[nn.Module, _Statistics]:
    models = _import("torchvision").models
    # The module limits the list to classification; without it detectors and video models are named, too.
    if architecture not in models.list_models(module=models):
        raise InputError(
            f"build: torchvision has no classification architecture {architecture!r}; "
            f"torchvision.models.list_models(module=torchvision.models) names them all"
        )
    model = _make(models.get_model, architecture, weights=None, num_classes=num_classes)
    return model, (IMAGENET_MEAN, IMAGENET_STD)


def _make(make: Callable[..., Any], architecture: str, **options: object) -> nn.Module:
    try:
        model: nn.Module = make(architecture, **options)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise InputError(f"build: {architecture} cannot be built with {options}: {error}") from error
    return model


def _import(package: str) -> ModuleType:
    """The package, or one error for all the ways in which it does not import.

    timm imports torchvision; a torchvision made for another torch ends with `RuntimeError: operator torchvision::nms
    does not exist`, one made for another CUDA with an OSError.
    """
    fitting = f"the torchvision made for torch {torch.__version__}, from the index that torch came from"
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        missing = (error.name or package).partition(".")[0]
        reason = "it is not installed" if missing == package else f"it needs {missing}, which is not installed"
        advice = {
            "timm": "install it with: pip install 'ttaq[timm]'",
            "torchvision": f"install it with: pip install torchvision ({fitting})",
        }.get(missing, f"install it with: pip install {missing}")
        cause: Exception = error
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        advice = f"install {fitting}"
        cause = error
    raise MissingPackageError(f"build: {package} cannot be imported ({reason}); {advice}") from cause


def _normalizing(base: type[nn.Module]) -> type[nn.Module]:
    """`base` with its child `normalize` as the first step of forward."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return base.forward(self, self.get_submodule("normalize")(x))  # type: ignore[no-any-return]

    return type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})
