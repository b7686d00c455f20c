"""A unit as a module: as it is, and in training."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from ttaq.nn import QuantConv2d, QuantizedModel, Quantizer, QuantLinear, QuantMatmul, TwinQuantizer
from ttaq.nn.graph_model import ACTIVATIONS
from ttaq.nn.integer import IntegerLayer
from ttaq.ptq.units import Unit
from ttaq_kernels import SoftRounding, fake_quantize, reconstruction_loss

__all__ = ["Student", "unit_module"]


def unit_module(model: QuantizedModel, unit: Unit) -> fx.GraphModule:
    """`unit` of `model` as a module from tensor to tensor that shares its layers with the model."""
    return fx.GraphModule(model, _graph(unit, (unit.output,)))


def _graph(unit: Unit, outputs: tuple[fx.Node, ...], alone: Mapping[str, int] | None = None) -> fx.Graph:
    """What makes `outputs`. alone: how many tensors each of these modules reads; it gets them without their scales."""
    alone = alone or {}
    needed = set(outputs)
    for node in reversed(unit.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {unit.source: graph.placeholder("x")}

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies:  # a parameter
            copies[node] = graph.node_copy(node)
        return copies[node]

    for node in unit.nodes:
        if node in needed and node.target in alone:
            tensors = [copy(arg) for arg in node.args[: alone[str(node.target)]] if isinstance(arg, fx.Node)]
            copies[node] = graph.call_module(str(node.target), tuple(tensors))
        elif node in needed:
            copies[node] = graph.node_copy(node, copy)
    results = tuple(copies[node] for node in outputs)
    graph.output(results[0] if len(results) == 1 else results)
    return graph


class _TrainedLayer(nn.Module):
    """A layer whose weight is what its rounding variables say."""

    def __init__(self, layer: QuantConv2d | QuantLinear, rounding: SoftRounding) -> None:
        super().__init__()
        self.layer, self.rounding = layer, rounding
        self.w_hat = rounding.w_hat.requires_grad_()

    def forward(self, x: Tensor, *_: object) -> Tensor:
        if isinstance(self.layer, nn.Conv2d):
            y: Tensor = self.layer._conv_forward(x, self.layer.moved(self.w_hat), self.layer.bias)
            return y
        return functional.linear(x, self.w_hat, self.layer.bias)


class _TrainedQuantizer(nn.Module):
    """A quantizer whose scale learns, and which lets elements pass as they are."""

    def __init__(self, quantizer: Quantizer, keep_quantized: float, seed: Tensor) -> None:
        super().__init__()
        self.grid, self.keep_quantized, self.seed = quantizer, keep_quantized, seed
        scale, zero_point = quantizer.scale, quantizer.zero_point
        if scale is None or zero_point is None:
            raise RuntimeError("_TrainedQuantizer: the quantizer has no grid, calibrate it first")
        self.scale = nn.Parameter(scale.detach().clone())
        self.zero_point = zero_point

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.grid, TwinQuantizer) and self.grid.ratio is not None:
            return self.grid.round(x, self.scale, self.zero_point, self.grid.ratio, self.keep_quantized, self.seed)
        return fake_quantize(
            x, self.scale, self.zero_point, self.grid.qmin, self.grid.qmax,
            keep_quantized=self.keep_quantized, seed=self.seed,
        )  # fmt: skip


class _Ending(NamedTuple):
    """How the output of a unit comes about: `quantizer(relu(h + residual))`, each part where it is there."""

    h: fx.Node
    residual: fx.Node | None
    relu: bool
    quantizer: str | None


class Student:
    """A unit in training: soft-rounded weights, learned scales, drop. What it learns goes back with `finish`.

    seeds: int64 [1 + quantizers] on the device of the model, drawn anew for each step by the caller; the first is that
    of the unit's input. roundings, scales, affine: what learns.
    """

    def __init__(self, model: QuantizedModel, unit: Unit, keep_quantized: float) -> None:
        self.unit, self.keep_quantized = unit, keep_quantized
        device = next(model.parameters()).device
        self.seeds = torch.zeros(1 + len(unit.quantizers), dtype=torch.int64, device=device)
        self.layers = {name: _trained(model.get_submodule(name)) for name in unit.layers}
        self.quantizers = {
            name: _TrainedQuantizer(_quantizer(model, name), keep_quantized, self.seeds[index])
            for index, name in enumerate(unit.quantizers, start=1)
        }
        self.ending = _ending(model, unit)
        outputs = (self.ending.h,) if self.ending.residual is None else (self.ending.h, self.ending.residual)
        modules = {
            str(node.target): model.get_submodule(str(node.target)) for node in unit.nodes if node.op == "call_module"
        }
        products = [name for name, module in modules.items() if isinstance(module, QuantMatmul)]
        graph = _graph(unit, outputs, {**dict.fromkeys(self.layers, 1), **dict.fromkeys(products, 2)})
        self.module = fx.GraphModule(model, graph)
        called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
        for name, layer in self.layers.items():
            self.module.add_submodule(name, layer)
        for name, quantizer in self.quantizers.items():
            if f"{ACTIVATIONS}.{name}" in called:
                self.module.add_submodule(f"{ACTIVATIONS}.{name}", quantizer)
        norms = [m for m in self.module.modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm))]
        self.affine = list(dict.fromkeys(p for norm in norms for p in norm.parameters(recurse=False)))

    @property
    def roundings(self) -> list[SoftRounding]:
        return [layer.rounding for layer in self.layers.values()]

    @property
    def w_hats(self) -> list[Tensor]:
        return [layer.w_hat for layer in self.layers.values()]

    @property
    def scales(self) -> list[nn.Parameter]:
        return [quantizer.scale for quantizer in self.quantizers.values()]

    def _before_the_end(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        result = self.module(x)
        return result if self.ending.residual is not None else (result, None)

    def loss(self, x: Tensor, target: Tensor) -> Tensor:
        """Mean over images and positions of sum over channels of (output - target)^2."""
        h, residual = self._before_the_end(x)
        if h.ndim == 3:  # tokens [N, T, C]: channels are to come second
            h, target = h.transpose(1, 2), target.transpose(1, 2)
            residual = None if residual is None else residual.transpose(1, 2)
        grid: dict[str, object] = {}
        if self.ending.quantizer is not None:
            last = self.quantizers[self.ending.quantizer]
            grid = {
                "scale": last.scale, "zero_point": last.zero_point, "qmin": last.grid.qmin, "qmax": last.grid.qmax,
                "keep_quantized": self.keep_quantized, "seed": last.seed,
            }  # fmt: skip
        return reconstruction_loss(h, target, residual=residual, relu=self.ending.relu, **grid)  # type: ignore[arg-type]

    def output(self, x: Tensor) -> Tensor:
        """The output of the unit, drop included."""
        h, residual = self._before_the_end(x)
        h = h if residual is None else h + residual
        h = functional.relu(h) if self.ending.relu else h
        return h if self.ending.quantizer is None else self.quantizers[self.ending.quantizer](h)

    def finish(self) -> None:
        """Put the rounded weights and the learned scales into the model."""
        with torch.no_grad():
            for layer in self.layers.values():
                layer.layer.weight.copy_(layer.rounding.rounded())
            for quantizer in self.quantizers.values():
                quantizer.grid.set_grid(quantizer.scale, quantizer.zero_point)


def _quantizer(model: QuantizedModel, name: str) -> Quantizer:
    module = model.get_submodule(f"{ACTIVATIONS}.{name}")
    if not isinstance(module, Quantizer):
        raise TypeError(f"Student: {name} is a {type(module).__name__}, expected a Quantizer")
    return module


def _trained(layer: nn.Module) -> _TrainedLayer:
    if not isinstance(layer, IntegerLayer) or not isinstance(layer, (QuantConv2d, QuantLinear)):
        raise TypeError(f"Student: a layer is a {type(layer).__name__}, expected QuantConv2d or QuantLinear")
    quantizer = layer.weight_quantizer
    if quantizer.scale is None or quantizer.zero_point is None:
        raise RuntimeError("Student: a layer has no grid, calibrate it first")
    rows = len(layer.weight)
    scale, zero_point = (grid.expand(rows).contiguous() for grid in (quantizer.scale, quantizer.zero_point))
    return _TrainedLayer(layer, SoftRounding.of(layer.weight, scale, zero_point, quantizer.qmin, quantizer.qmax))


def _ending(model: QuantizedModel, unit: Unit) -> _Ending:
    node, quantizer, relu, residual = unit.output, None, False, None
    own = set(unit.nodes)

    def before(node: fx.Node) -> fx.Node | None:
        """What `node` reads, if nothing else in the unit reads it."""
        source = node.args[0] if node.args else None
        alone = isinstance(source, fx.Node) and source in own and len([u for u in source.users if u in own]) == 1
        return source if alone else None  # type: ignore[return-value]

    if node.op == "call_module" and type(model.get_submodule(str(node.target))) is Quantizer:
        source = before(node)
        if source is not None:
            quantizer, node = str(node.target).rsplit(".", 1)[-1], source
    source = before(node)
    if node.op == "call_module" and type(model.get_submodule(str(node.target))) is nn.ReLU and source is not None:
        relu, node = True, source
    if node.op == "call_function" and node.target in (operator.add, torch.add) and len(node.args) == 2:
        summands = [arg for arg in node.args if isinstance(arg, fx.Node) and arg.op != "get_attr"]
        if len(summands) == 2 and own.intersection(summands):
            node, residual = summands if summands[0] in own else summands[::-1]
    return _Ending(node, residual, relu, quantizer)
