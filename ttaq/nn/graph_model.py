"""A model as a torch.fx graph that keeps the module tree of the model it came from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from ttaq.nn.integer import IntegerLayer
from ttaq.nn.quantizer import Quantizer
from ttaq.nn.report import Report
from ttaq.scheme import Scheme

__all__ = ["ACTIVATIONS", "QuantizedModel", "activation_quantizers", "quantized_layers"]

ACTIVATIONS = "activation_quantizers"  # the child that holds the quantizers of the tensors between layers
_TREE = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")


class QuantizedModel(fx.GraphModule):
    """What `ttaq.convert` returns: a `torch.fx.GraphModule` with the parameter names of the model it was made from.

    scheme: the bits that were asked for. report: what each layer got; `print(model.report)` shows a table.
    The state_dict of a calibrated model makes an uncalibrated one calibrated; that of the float model does the reverse.
    """

    scheme: Scheme
    report: Report

    def __init__(self, root: nn.Module, graph: fx.Graph, scheme: Scheme, report: Report, class_name: str) -> None:
        super().__init__(root, graph, class_name)
        # The constructor above keeps only what the graph calls, and makes every buffer a persistent one. The tree stays
        # whole here, because the state_dict of the float model must go on fitting.
        for name in _TREE:
            setattr(self, name, copy.copy(getattr(root, name)))
        self.scheme, self.report = scheme, report

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        # Other weights without grids are those of a float model; norm layers alone, for example, leave the grids valid.
        layers = (name for name, module in self.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear)))
        if any(f"{prefix}{name}.weight" in state_dict for name in layers):
            for name, quantizer in activation_quantizers(self).items():
                if f"{prefix}{ACTIVATIONS}.{name}.scale" not in state_dict:
                    quantizer.set_grid(None, None)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedModel:
        root = nn.Module()
        for name in _TREE:
            setattr(root, name, copy.deepcopy(getattr(self, name), memo))
        root.training = self.training
        new = QuantizedModel(root, copy.deepcopy(self.graph), self.scheme, self.report, type(self).__name__)
        memo[id(self)] = new
        return new


def quantized_layers(model: nn.Module) -> dict[str, IntegerLayer]:
    """The layers with a quantized weight, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, IntegerLayer)}


def activation_quantizers(model: QuantizedModel) -> dict[str, Quantizer]:
    """The quantizers of the tensors between layers, by name."""
    children = model.get_submodule(ACTIVATIONS).named_children()
    return {name: module for name, module in children if isinstance(module, Quantizer)}
