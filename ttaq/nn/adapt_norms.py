"""The norm layers of a model, made ready for adaptation: which there are, and which values they learn."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ttaq.errors import InputError
from ttaq.nn.batch_norm import AdaptiveBatchNorm2d

__all__ = ["adapt_norms", "adaptive_batch_norms", "norm_affine"]


def adapt_norms(model: nn.Module) -> nn.Module:
    """Replace, in place, every `torch.nn.BatchNorm2d` of `model` by an `AdaptiveBatchNorm2d`, and return the model.

    Outputs and state_dict keys stay as they were until a layer's `alpha` or `prior_n` is set. A layer that is used in
    several places stays one layer; layers that are adaptive already keep their setting. Subclasses of BatchNorm2d are
    left alone, since their forward may do more than normalise (timm's BatchNormAct2d applies the activation too).
    """
    if type(model) is nn.BatchNorm2d:
        return AdaptiveBatchNorm2d.from_float(model)
    replaced: dict[nn.Module, AdaptiveBatchNorm2d] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children would skip the second name of a shared layer
            if type(child) is nn.BatchNorm2d:
                if child not in replaced:
                    replaced[child] = AdaptiveBatchNorm2d.from_float(child)
                setattr(parent, name, replaced[child])
    return model


def adaptive_batch_norms(model: nn.Module, who: str) -> dict[str, AdaptiveBatchNorm2d]:
    """The batch norm layers, by name, of a model that went through `adapt_norms`; empty for a model without any.

    `InputError` in the name of `who` for batch norm layers of another type: they would silently keep the statistics of
    the source data while the rest of the model leaves them.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    adaptive = {name: layer for name, layer in layers.items() if isinstance(layer, AdaptiveBatchNorm2d)}
    if other := [f"{name} ({type(layer).__name__})" for name, layer in layers.items() if name not in adaptive]:
        raise InputError(
            f"{who}: {len(other)} batch norm layers cannot take statistics of the batch: {', '.join(other[:3])}"
            f"{', ...' if len(other) > 3 else ''}; expected torch.nn.BatchNorm2d, replace them with it first"
        )
    return adaptive


def norm_affine(model: nn.Module, who: str) -> dict[str, nn.Parameter]:
    """Weight and bias of every batch, layer and group norm by name, each once, in the order of `model.named_modules()`.

    `InputError` in the name of `who` when there is none.
    """
    affine: dict[nn.Parameter, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, (_BatchNorm, nn.LayerNorm, nn.GroupNorm)):
            for key, parameter in module.named_parameters(prefix=name, recurse=False):
                affine.setdefault(parameter, key)
    if not affine:
        raise InputError(
            f"{who}: the model has no weight or bias in a batch, layer or group norm, expected at least one to adapt; "
            f"use a method that learns nothing: 'source', or 'norm' for a model with batch norm"
        )
    return {key: parameter for parameter, key in affine.items()}
