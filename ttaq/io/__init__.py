"""Model and state files: safetensors with a JSON header, written atomically, checked by hash, never executed."""

from ttaq.io.container import FORMAT_VERSION, read_header
from ttaq.io.models import LoadedModel, load_model, load_weights, model_hash, save_model
from ttaq.io.states import load_state, save_state

__all__ = [
    "FORMAT_VERSION",
    "LoadedModel",
    "load_model",
    "load_state",
    "load_weights",
    "model_hash",
    "read_header",
    "save_model",
    "save_state",
]
