"""A teacher: a model with other values for some of its parameters, which follow those of the student slowly."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["Teacher", "forward_with"]


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
    """`model(x)`, without gradients, with these values for parameters and buffers, by name; the model stays as it is.

    Every layer that reads a tensor of `model` gets the value, under whatever names the model has it.
    """
    own: dict[Tensor, Tensor] = {}
    for name, value in values.items():
        path, _, key = name.rpartition(".")
        own[getattr(model.get_submodule(path), key)] = value
    places = {}
    for name, module in model.named_modules():
        for key, tensor in itertools.chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None and tensor in own:
                places[f"{name}.{key}" if name else key] = own[tensor]
    # Each layer once: tie_weights would set a layer that has two names twice, and put the first value back as if it
    # had been the layer's own.
    logits: Tensor = functional_call(model, places, (x,), tie_weights=False)
    return logits
