"""The finished units of a reconstruction, in a folder: what an interrupted run goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttaq.errors import CheckpointError
from ttaq.io import load_state, save_state
from ttaq.nn import QuantizedModel
from ttaq.ptq.units import Unit

__all__ = ["UnitStore", "clear_units"]


class UnitStore:
    """A file for each finished unit: every tensor of it that training may change.

    run: what the units depend on (model, scheme, images, settings, seed), as JSON values. A file of another run in the
    folder raises `CheckpointError`; a damaged one too.
    """

    def __init__(self, folder: str | Path, run: dict[str, Any]) -> None:
        self.folder, self.run = Path(folder), run

    def _path(self, number: int) -> Path:
        return self.folder / f"unit_{number:03}.safetensors"

    def save(self, number: int, unit: Unit, model: QuantizedModel) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach() for name, tensor in _tensors(unit, model).items()}
        save_state(self._path(number), {"run": self.run, "unit": unit.name, "tensors": tensors})

    def load(self, number: int, unit: Unit, model: QuantizedModel) -> bool:
        """Put the unit as it was saved into the model; False if it was not."""
        path = self._path(number)
        if not path.exists():
            return False
        state = load_state(path)
        own = _tensors(unit, model)
        if state["run"] != self.run or state["unit"] != unit.name or state["tensors"].keys() != own.keys():
            raise CheckpointError(
                f"quantize: {path} is of another run (other model, images, scheme, settings or seed); "
                f"delete the folder, or give another one"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state["tensors"][name])
        return True


def clear_units(folder: str | Path) -> None:
    """Delete the units kept in a folder, once the model itself is saved; nothing happens where there are none."""
    place = Path(folder)
    for path in place.glob("unit_*.safetensors"):
        path.unlink()
    if place.is_dir() and not any(place.iterdir()):
        place.rmdir()


def _tensors(unit: Unit, model: QuantizedModel) -> dict[str, Tensor]:
    """The parameters of what the unit calls, and the grids of its activations."""
    found: dict[str, Tensor] = {}
    for node in unit.nodes:
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            for name, tensor in module.named_parameters(prefix=str(node.target)):
                found[name] = tensor
            scale = getattr(module, "scale", None)
            if isinstance(scale, Tensor):
                found[f"{node.target}.scale"] = scale
    return found
