"""The model argument of the commands: a ttaq file, or NAME:PATH for plain weights of a known architecture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ttaq.eval import ModelInfo
from ttaq.io import load_model, load_weights, model_hash
from ttaq.models import NAMES, infer_kwargs
from ttaq.models.external import is_external

__all__ = ["MODEL_HELP", "Loaded", "load"]

MODEL_HELP = (
    f"a ttaq model file, or NAME:PATH for plain safetensors weights, NAME one of {', '.join(NAMES)}, timm:NAME or "
    f"torchvision:NAME"
)


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, how to build its float architecture again, and what rows say about it."""

    model: nn.Module
    architecture: str | None
    kwargs: dict[str, Any]
    info: ModelInfo


def load(text: str) -> Loaded:
    """Read what `text` names; raises CheckpointError or InputError."""
    name, colon, path = text.partition(":")
    if is_external(text):
        model_name, colon, path = path.partition(":")
        name = f"{name}:{model_name}"
    if colon and not Path(text).exists():
        model = load_weights(name, path)
        info = ModelInfo(name, "float", None, None, model_hash(model))
        return Loaded(model, name, infer_kwargs(name, model.state_dict()), info)
    model, header = load_model(text)
    method, extra = header["method"], header["extra"]
    flags = ",".join(f"{key}={value}" for key, value in sorted(extra.get("quantization", {}).items()))
    info = ModelInfo(
        model=header["architecture"] or type(model).__name__,
        scheme=str(getattr(model, "scheme", "float")),
        quantization=f"{method}({flags})" if method and flags else method,
        calibration_seed=extra.get("calibration_seed"),
        model_hash=header["hash"],
    )
    return Loaded(model, header["architecture"], header["kwargs"], info)
