"""Architectures by name, so that a model file can say what to build."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ttaq.errors import InputError
from ttaq.models.cifar_resnet import IMAGENET_MEAN, IMAGENET_STD, CifarResNet
from ttaq.models.external import PACKAGES, build_external, infer_external, is_external
from ttaq.models.mobilenet_v1 import MobileNetV1
from ttaq.models.resnet import ResNet
from ttaq.models.resnext_cifar import CifarResNeXt
from ttaq.models.vit import VisionTransformer
from ttaq.models.wide_resnet import WideResNet

__all__ = ["NAMES", "build", "classifier_name", "infer_kwargs"]


@dataclass(frozen=True)
class _Architecture:
    """make: the class. fixed: the arguments that the name stands for. sizes: options, and the weight whose first
    dimension tells each. defaults: where the published weights want others than those of the class."""

    make: Callable[..., nn.Module]
    fixed: Mapping[str, object]
    sizes: Mapping[str, str]
    defaults: Mapping[str, object] = field(default_factory=dict)

    @property
    def options(self) -> tuple[str, ...]:
        return tuple(name for name in inspect.signature(self.make).parameters if name not in self.fixed)


def _vit(width: int, depth: int, heads: int, **defaults: object) -> _Architecture:
    fixed = {"width": width, "depth": depth, "heads": heads}
    return _Architecture(VisionTransformer, fixed, {"num_classes": "head.weight"}, defaults)


_IMAGENET: dict[str, object] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
_HALVES: dict[str, object] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_FC = {"num_classes": "fc.weight"}
_ARCHITECTURES: dict[str, _Architecture] = {
    **{
        f"cifar_resnet{depth}": _Architecture(
            CifarResNet, {"depth": depth}, {"num_classes": "linear.weight", "width": "conv1.weight"}
        )
        for depth in (8, 20, 32, 44, 56, 110)
    },
    "wrn28_10": _Architecture(WideResNet, {"depth": 28, "widen": 10}, _FC),
    "wrn40_2": _Architecture(WideResNet, {"depth": 40, "widen": 2}, _FC, _HALVES),
    "resnext29_4x32d": _Architecture(
        CifarResNeXt, {"depth": 29, "cardinality": 4, "base_width": 32}, {"num_classes": "classifier.weight"}
    ),
    **{
        f"resnet{depth}": _Architecture(ResNet, {"depth": depth}, {**_FC, "width": "conv1.weight"})
        for depth in (18, 34, 50, 101)
    },
    "mobilenet_v1": _Architecture(MobileNetV1, {}, {**_FC, "width": "conv1.1.weight"}),
    "deit_tiny": _vit(192, 12, 3, **_IMAGENET),
    "deit_small": _vit(384, 12, 6, **_IMAGENET),
    "deit_base": _vit(768, 12, 12, **_IMAGENET),
    "vit_tiny": _vit(192, 12, 3),
    "vit_small": _vit(384, 12, 6),
    "vit_base": _vit(768, 12, 12),
}

NAMES = tuple(_ARCHITECTURES)


def build(name: str, **kwargs: object) -> nn.Module:
    """The architecture `name` with fresh weights, in training mode.

    name: one of NAMES, or `timm:NAME` or `torchvision:NAME` where that package is installed; nothing is downloaded.
    kwargs: the options of the architecture, all of them JSON values (num_classes, mean, std, and for some width or
    image_size), as they stand in the header of a model file. Raises InputError for an unknown name, an unknown option
    or a value it cannot have, MissingPackageError for a package that is not installed or does not work.
    """
    if is_external(name):
        architecture = _Architecture(build_external, {"name": name}, {})
    else:
        architecture = _find(name)
    unknown, options = sorted(set(kwargs) - set(architecture.options)), ", ".join(architecture.options)
    if unknown:
        raise InputError(f"build: {name} has no option {', '.join(unknown)}; its options are {options}")
    try:
        return architecture.make(**{**architecture.fixed, **architecture.defaults, **kwargs})
    except TypeError as error:
        raise InputError(f"build: {name} cannot be built with {kwargs}: {error}") from error


def infer_kwargs(name: str, state: Mapping[str, Tensor]) -> dict[str, int]:
    """The options of `name` that the shapes of its weights tell: num_classes and, where it is an option, width. Weights
    that are not there tell nothing."""
    if is_external(name):
        return infer_external(state)
    sizes = {option: state.get(key) for option, key in _find(name).sizes.items()}
    return {option: weight.shape[0] for option, weight in sizes.items() if weight is not None and weight.ndim}


def classifier_name(name: str) -> str | None:
    """What `name` calls its last layer, such as "fc"; None where only the package of an external model knows."""
    return None if is_external(name) else _find(name).sizes["num_classes"].removesuffix(".weight")


def _find(name: str) -> _Architecture:
    if name not in _ARCHITECTURES:
        others = ", ".join(f"{package}:NAME" for package in PACKAGES)
        raise InputError(f"build: no architecture is named {name!r}; there are {', '.join(NAMES)}, {others}")
    return _ARCHITECTURES[name]
