"""Model files: the tensors of a model and a header that says how to build it again."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ttaq.errors import CheckpointError, InputError
from ttaq.io.container import read, read_tensors, write
from ttaq.models import build, infer_kwargs
from ttaq.nn import QuantizedModel, QuantMatmul, TwinQuantizer, convert
from ttaq.nn.hash_tensors import hash_tensors
from ttaq.scheme import Scheme

__all__ = ["LoadedModel", "load_model", "load_weights", "model_hash", "save_model"]


class LoadedModel(NamedTuple):
    """A model in eval mode on the CPU, and the header of the file it came from."""

    model: nn.Module
    header: dict[str, Any]


def model_hash(model: nn.Module) -> str:
    """`hash_tensors` of the model's state_dict: the same number as `hash` in the header of the file the model is saved
    to."""
    return hash_tensors(model.state_dict())


def save_model(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    architecture: str | None,
    kwargs: Mapping[str, Any],
    scheme: Scheme | None = None,
    method: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Save a float or quantized model; the file is written completely or not at all.

    architecture, kwargs: what `ttaq.models.build` needs to make the float model again; None for an architecture of
    your own, which is then handed to `load_model`. scheme: how the model is quantized, None to take it from the model
    (`model.scheme`), where a float model has none. method: what quantized it, extra: anything else worth keeping; JSON
    values.

    Raises InputError if architecture and kwargs do not build this model, CheckpointError if the file cannot be written.
    """
    if architecture is not None:
        _check_rebuilds(model, architecture, kwargs)
    found = getattr(model, "scheme", None)
    scheme = scheme if scheme is not None or not isinstance(found, Scheme) else found
    fields = {
        "architecture": architecture,
        "kwargs": dict(kwargs),
        "scheme": None if scheme is None else scheme.to_dict(),
        "method": method,
        "extra": dict(extra or {}),
    }
    write("save_model", path, "model", fields, model.state_dict())


def load_model(path: str | os.PathLike[str], model: nn.Module | None = None) -> LoadedModel:
    """Build the model that the file describes, quantized where its header has a scheme, and load its tensors strictly.

    model: the float model, for an architecture of your own; it is copied, not changed. The tensors keep the types they
    were saved with. Raises CheckpointError for a file that is missing, truncated, damaged, foreign, newer than this
    ttaq or made for another model.
    """
    header, tensors = read("load_model", path, "model")
    architecture, scheme = header.get("architecture"), header.get("scheme")
    if model is not None:
        result = copy.deepcopy(model)
    elif architecture is None:
        raise CheckpointError(
            f"load_model: {path} names no architecture; hand over the float model it was made from: "
            f"load_model(path, model=...)"
        )
    else:
        try:
            result = _build_quietly(architecture, **header["kwargs"])
        except (InputError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"load_model: {path} needs an architecture that this ttaq cannot build: {error}"
            ) from error
    result.eval()
    if scheme is not None:
        try:
            result = _converted(result, scheme).eval()
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"load_model: {path} has a scheme that this ttaq cannot apply: {error}") from error
    _take_dtypes(result, tensors)
    _load_strictly(result, tensors, f"load_model: {path}")
    return LoadedModel(result, header)


def load_weights(name: str, path: str | os.PathLike[str], **kwargs: Any) -> nn.Module:
    """The float architecture `name` in eval mode with the weights of a plain safetensors file (key -> tensor), cast to
    fp32.

    kwargs: options of the architecture; num_classes and width come from the shapes of the weights unless they are
    given. Missing batch counters of norm layers count as zero. Raises InputError for an unknown name or option,
    CheckpointError for a file that is missing, not safetensors, or holds other tensors than the model has.
    """
    return build_with(name, read_tensors("load_weights", path), f"load_weights: {path} as {name}", **kwargs)


def build_with(name: str, tensors: Mapping[str, Tensor], what: str, **kwargs: Any) -> nn.Module:
    """`load_weights` for tensors that are in memory; `what` opens the error."""
    model = _build_quietly(name, **{**infer_kwargs(name, tensors), **kwargs})
    _load_strictly(model, tensors, what)
    return model.eval()


def _converted(model: nn.Module, fields: Mapping[str, Any]) -> QuantizedModel:
    """The model on the scheme with these fields."""
    scheme = Scheme.from_dict(fields)
    converted = convert(model, scheme)
    if "quantize_matmul" not in fields and any(
        isinstance(m, (QuantMatmul, TwinQuantizer)) for m in converted.modules()
    ):
        # Files from before there were such: products were float, and all grids uniform.
        return convert(model, replace(scheme, quantize_matmul=False, twin_softmax=False, twin_gelu=False))
    return converted


def _build_quietly(name: str, **kwargs: Any) -> nn.Module:
    """Build without drawing from the caller's random numbers: the fresh weights are overwritten anyway."""
    with torch.random.fork_rng(devices=[]):
        return build(name, **kwargs)


def _load_strictly(model: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    for name, own in model.state_dict().items():
        if name in tensors and tensors[name].shape != own.shape:
            hint = ""
            if own.ndim and tensors[name].ndim and tensors[name].shape[1:] == own.shape[1:]:
                hint = f"; the file has {tensors[name].shape[0]} outputs (num_classes) there, the model {own.shape[0]}"
            raise CheckpointError(
                f"{what}: {name} has shape {tuple(tensors[name].shape)}, expected {tuple(own.shape)}{hint}"
            )
    try:
        missing, unexpected = model.load_state_dict(dict(tensors), strict=False)
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{what}: {' '.join(str(error).split())}") from error
    if missing or unexpected:
        raise CheckpointError(
            f"{what}: the file was made for another architecture; "
            f"tensors it lacks: {_listed(missing)}; tensors the model does not have: {_listed(unexpected)}"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"


def _take_dtypes(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give each parameter and buffer the type it has in the file; in place, so that tied parameters stay tied."""
    for name, own in model.state_dict(keep_vars=True).items():
        if name in tensors and tensors[name].dtype != own.dtype:
            own.data = own.data.to(tensors[name].dtype)


def _check_rebuilds(model: nn.Module, architecture: str, kwargs: Mapping[str, Any]) -> None:
    """A file that cannot be loaded is noticed when it is written: shapes, and the constants that no state_dict
    carries."""
    try:
        again = _build_quietly(architecture, **json.loads(json.dumps(dict(kwargs))))
    except TypeError as error:
        raise InputError(f"save_model: kwargs {dict(kwargs)} are not JSON values: {error}") from error
    here, there = model.state_dict(), again.state_dict()
    wrong = sorted(name for name in there if name not in here or here[name].shape != there[name].shape)
    if wrong:
        raise InputError(
            f"save_model: the model is not what build({architecture!r}, **{dict(kwargs)}) makes; "
            f"it differs in {_listed(wrong)}"
        )
    own = dict(model.named_buffers())
    for name, buffer in again.named_buffers():
        if name not in there and name in own and not torch.equal(own[name].cpu().to(buffer.dtype), buffer):
            raise InputError(
                f"save_model: {name} of the model is {own[name].flatten().tolist()}, but kwargs {dict(kwargs)} build "
                f"{buffer.flatten().tolist()}; put the model's value into kwargs"
            )
