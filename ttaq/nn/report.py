"""What became of each layer of a converted model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase

from ttaq.nn.batch_norm import AdaptiveBatchNorm2d
from ttaq.nn.integer import IntegerLayer
from ttaq.nn.quantizer import Quantizer
from ttaq.nn.trace import PRODUCTS, LayerCall

__all__ = ["LayerReport", "Report", "describe"]

# What works like a layer without being a module.
_FLOAT_CALLS: set[Callable[..., Any] | str] = {
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose2d, functional.linear, functional.batch_norm,
    functional.group_norm, functional.layer_norm, functional.scaled_dot_product_attention, *PRODUCTS,
}  # fmt: skip


@dataclass(frozen=True)
class LayerReport:
    """One layer: its name in the model, its type, the bits of its weight and of its input (None is float), and why."""

    name: str
    type: str
    weight_bits: int | None
    activation_bits: int | None
    note: str = ""


class Report(tuple[LayerReport, ...]):
    """The layers in the order of the graph; `str()` is a table."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [("layer", "type", "weight", "input", "note")]
        for layer in self:
            bits = ["float" if b is None else f"{b} bit" for b in (layer.weight_bits, layer.activation_bits)]
            rows.append((layer.name, layer.type, bits[0], bits[1], layer.note))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def describe(model: nn.Module, graph: fx.Graph, calls: list[LayerCall], quantizers: nn.Module) -> Report:
    """The report of a graph whose layers and products are replaced; `quantizers`: the parent of those that `calls`
    name."""
    rows: dict[object, LayerReport] = {}
    by_layer: dict[str, list[LayerCall]] = {}
    products = {call.node: call.layer for call in calls if call.operand is not None}
    for call in calls:
        by_layer.setdefault(call.layer, []).append(call)
    for node in graph.nodes:
        name = str(node.target)
        if node.op in ("call_function", "call_method") and node.target in _FLOAT_CALLS:
            kind = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", name)
            called = products.get(node, node.name)
            rows[node] = LayerReport(called, kind, None, None, "stays float: a call, not a layer")
        elif node.op == "call_module" and name not in rows:
            module = model.get_submodule(name)
            kind = type(module).__name__
            if name in by_layer:
                grids = [quantizers.get_submodule(c.quantizer) for c in by_layer[name] if c.quantizer is not None]
                bits = [grid.bits for grid in grids if isinstance(grid, Quantizer)]
                weight_bits = module.weight_quantizer.bits if isinstance(module, IntegerLayer) else None
                rows[name] = LayerReport(name, kind, weight_bits, max(bits, default=None), _places(by_layer[name]))
            elif isinstance(module, AdaptiveBatchNorm2d):
                rows[name] = LayerReport(name, kind, None, None, "adaptive")
            elif isinstance(module, _NormBase) or next(module.parameters(), None) is not None:
                rows[name] = LayerReport(name, kind, None, None, "stays float: type is not covered")
    used = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    for name, module in model.named_modules():
        own = [f"{name}.{key}" if name else key for key, _ in module.named_parameters(recurse=False)]
        # Used are layers that are called, what is inside of them, and values that the graph reads itself.
        parents = {value[:end] for value in own for end in range(len(value)) if value[end] == "."}
        if own and used.isdisjoint(parents.union(own)):
            rows[name] = LayerReport(name, type(module).__name__, None, None, "stays float: forward does not use it")
    return Report(rows.values())


def _places(calls: list[LayerCall]) -> str:
    positions = {call.position for call in calls}
    return ", ".join(position for position in ("first", "last") if position in positions)
