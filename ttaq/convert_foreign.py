"""Weights of other projects come in here, once: a PyTorch or plain safetensors file becomes a model file of ttaq.

The only place that reads PyTorch's own format, and only its tensors: code inside the file is refused, never executed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttaq.errors import CheckpointError
from ttaq.io import read_header, save_model
from ttaq.io.container import read_tensors
from ttaq.io.models import build_with
from ttaq.models import classifier_name, infer_kwargs

__all__ = ["convert_foreign"]

# Under which names training scripts keep the weights, plain weights before averaged ones.
_ENTRIES = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights", "params"),
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
)
# What wrappers (DataParallel, torch.compile, a normalising wrapper) put in front of every name.
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "encoder.")
# What the last layer is called here and elsewhere.
_CLASSIFIERS = ("fc", "classifier", "head", "output", "linear")
# The counter of an averaged model; the normalisation that RobustBench keeps beside the weights.
_NO_WEIGHTS = ("n_averaged", "mu", "sigma")


def convert_foreign(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    architecture: str,
    *,
    entry: str | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Turn a .pth, .pt, .th, .tar (zip or legacy format) or plain safetensors file into a model file; returns its
    header.

    The weights may lie under a name such as state_dict, model, net or ema beside other things (epoch, optimizer), which
    are left behind, and may carry the prefixes of wrappers. They are loaded strictly into the architecture, cast to
    fp32.

    architecture, kwargs: as in `ttaq.models.build`; num_classes and width come from the weights unless they are given.
    entry: where in the file the weights lie, if there are several sets; without it a plain set is taken before an
    averaged one. The header's `extra.source` keeps the name and SHA-256 of the source and the entry.

    Raises CheckpointError for a file that is missing, unreadable, asks to execute code, holds no weights, or whose
    weights are not those of the architecture (missing and unknown names are listed); InputError for unknown names and
    options.
    """
    tensors, place = _read(Path(source), entry)
    tensors = _own_names(tensors, classifier_name(architecture))
    options = {**infer_kwargs(architecture, tensors), **kwargs}
    model = build_with(architecture, tensors, f"convert_foreign: {source} as {architecture}", **options)
    provenance = {"file": Path(source).name, "sha256": _sha256(Path(source)), "entry": place}
    save_model(destination, model, architecture=architecture, kwargs=options, extra={"source": provenance})
    return read_header(destination)


def _read(source: Path, entry: str | None) -> tuple[dict[str, Tensor], str]:
    """The weights, and under which name they lay in the file ("" for the top)."""
    if not source.is_file():
        raise CheckpointError(f"convert_foreign: there is no file {source}")
    with open(source, "rb") as file:
        start = file.read(9)
    # A safetensors file begins with the length of its header (8 bytes), then the header's JSON.
    content = read_tensors("convert_foreign", source) if start[8:] == b"{" else _read_torch(source)
    found = _find_weights(content, (entry,) if entry is not None else _ENTRIES, "")
    if found is None:
        inside = ", ".join(map(str, content)) if isinstance(content, dict) else f"a {type(content).__name__}"
        where = f"under {entry!r}" if entry is not None else "where they usually lie"
        raise CheckpointError(
            f"convert_foreign: {source} has no weights {where}; its top level is {inside[:300] or 'empty'}; "
            f"name the right one with entry="
        )
    return found


def _find_weights(content: object, names: tuple[str, ...], place: str) -> tuple[dict[str, Tensor], str] | None:
    if not isinstance(content, dict) or not content:
        return None
    # At the top a name that was asked for goes before the weights of the level itself.
    if (place or names is _ENTRIES) and all(isinstance(item, Tensor) for item in content.values()):
        return {str(name): tensor for name, tensor in content.items()}, place
    for name in names:
        found = _find_weights(content.get(name), _ENTRIES, f"{place}.{name}".removeprefix("."))
        if found is not None:
            return found
    return None


def _read_torch(source: Path) -> object:
    try:
        # A namespace of options is often kept beside the weights; making one executes nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged or hostile file makes the reader raise is not a closed list
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted:
            raise CheckpointError(
                f"convert_foreign: {source} asks to run {wanted[1]}, which was refused: only tensors are read. "
                f"Where you trust the file, load it and save the weights alone: torch.save(model.state_dict(), path)"
            ) from error
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"convert_foreign: {source} is truncated, damaged or not a PyTorch or safetensors file ({reason})"
        ) from error


def _own_names(tensors: Mapping[str, Tensor], classifier: str | None) -> dict[str, Tensor]:
    """Without the prefixes that all names share, without what is no weight, and with the architecture's name for its
    last layer."""
    named = {name: tensor for name, tensor in tensors.items() if name not in _NO_WEIGHTS}
    while shared := [prefix for prefix in _PREFIXES if named and all(name.startswith(prefix) for name in named)]:
        named = {name.removeprefix(shared[0]): tensor for name, tensor in named.items()}
    if classifier is not None and f"{classifier}.weight" not in named:
        for name in _CLASSIFIERS:
            for kind in ("weight", "bias"):
                if f"{name}.{kind}" in named:
                    named.setdefault(f"{classifier}.{kind}", named.pop(f"{name}.{kind}"))
    return named


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
