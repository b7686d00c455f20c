"""A teacher: a model with other values for some of its parameters, which follow those of the student slowly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Teacher", "forward_with", "values_in"]


class Teacher(nn.Module):
    """Own values for named parameters and buffers of a model: `logits = teacher(model, x)`, without gradients.

    The teacher shares everything else with the model: its code, and what is not among `tensors`. It is no copy, so it
    costs the memory of its values alone, and a model that is quantized or was traced works as it does itself. Of a
    tensor that has several names one is enough.

    State: a buffer per value, whose name has '/' where the tensor's has '.'.

    Args:
        tensors: by name in the model; the teacher starts with copies of their values.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {name: name.replace(".", "/") for name in tensors}
        for name, tensor in tensors.items():
            self.register_buffer(self._names[name], tensor.detach().clone())

    def values(self) -> dict[str, Tensor]:
        """The values by name in the model: live, to be changed in place."""
        return {name: self.get_buffer(own) for name, own in self._names.items()}

    def forward(self, model: nn.Module, x: Tensor) -> Tensor:
        """`model(x)` with the values of the teacher."""
        return forward_with(model, self.values(), x)

    @torch.no_grad()
    def follow_(self, parameters: Mapping[str, Tensor], momentum: float) -> None:
        """In place, for the names in `parameters`: `value <- momentum value + (1 - momentum) parameter`."""
        mine = [self.get_buffer(self._names[name]) for name in parameters]
        torch._foreach_lerp_(mine, [parameter.detach() for parameter in parameters.values()], 1 - momentum)


@torch.no_grad()
def forward_with(model: nn.Module, values: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """`model(x)`, without gradients, with `values_in` it; the model stays as it is."""
    with values_in(model, values):
        logits: Tensor = model(x)
    return logits


@contextmanager
def values_in(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block `model` has these values for parameters and buffers, by name; for several forwards.

    Every layer that reads a tensor of `model` gets the value, under whatever names the model has it.
    """
    own: dict[Tensor, Tensor] = {}
    for name, value in values.items():
        path, _, key = name.rpartition(".")
        own[getattr(model.get_submodule(path), key)] = value
    places: list[tuple[dict[str, Any], str, Tensor]] = [
        (tensors, key, tensor)
        for module in model.modules()
        for tensors in (module._parameters, module._buffers)
        for key, tensor in tensors.items()
        if tensor is not None and tensor in own
    ]
    try:
        for tensors, key, tensor in places:
            tensors[key] = own[tensor]
        yield
    finally:
        for tensors, key, tensor in places:
            tensors[key] = tensor
