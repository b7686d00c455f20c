"""From a float model to one whose layers and tensors can be given quantization grids."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from ttaq.errors import InputError
from ttaq.nn.adapt_norms import adapt_norms
from ttaq.nn.conv import QuantConv2d
from ttaq.nn.graph_model import ACTIVATIONS, QuantizedModel
from ttaq.nn.integer import IntegerLayer
from ttaq.nn.linear import QuantLinear
from ttaq.nn.matmul import QuantMatmul
from ttaq.nn.quantizer import Quantizer
from ttaq.nn.report import describe
from ttaq.nn.trace import LayerCall, layer_calls, product_calls, trace
from ttaq.nn.twin import TwinKind, TwinQuantizer
from ttaq.scheme import Scheme

__all__ = ["convert"]

# What returns values of its first input, or zeros: a grid of the input is one of the output.
_GRID_KEEPING_MODULES = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten, nn.MaxPool2d)
_GRID_KEEPING_CALLS: set[Callable[..., Any] | str] = {
    torch.flatten, torch.reshape, functional.dropout, functional.max_pool2d, torch.max_pool2d,
    "flatten", "view", "reshape", "contiguous", "permute", "transpose", "squeeze", "unsqueeze",
}  # fmt: skip
_TWINS: dict[type[nn.Module] | Callable[..., Any] | str, TwinKind] = {
    nn.Softmax: "softmax", functional.softmax: "softmax", torch.softmax: "softmax", "softmax": "softmax",
    nn.GELU: "gelu", functional.gelu: "gelu",
}  # fmt: skip


def convert(model: nn.Module, scheme: Scheme | str) -> QuantizedModel:
    """A copy of `model` as a torch.fx graph, ready to be calibrated; until then it computes the same, bit for bit.

    Conv2d and Linear become `QuantConv2d` and `QuantLinear`, BatchNorm2d becomes `AdaptiveBatchNorm2d`; names and
    parameters stay, so that a state_dict of the float model loads strictly. A tensor that a layer with activation bits
    reads gets one quantizer, which everything else that reads the tensor shares: the identity shortcut of a residual
    block reads the quantized tensor, the stream of a pre-activation net stays float. Where its readers ask for
    different bits, the most count. The quantizers are children of `activation_quantizers`, named after what makes the
    tensor. What a softmax or a GELU makes gets a `TwinQuantizer`.

    A matrix product of two tensors becomes a `QuantMatmul`, a child `matmul` (`matmul_1`, ...) of the module that
    computes it, and each of its operands is quantized like the input of a layer.

    The graph is that of `model(x)` in eval mode: functional dropout is gone. Other layers stay float; `.report` lists
    them.

    Raises `InputError` for a model that torch.fx cannot trace, that has nothing to quantize or is quantized already,
    and for an override that matches no layer.
    """
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    if not isinstance(model, nn.Module) or not isinstance(scheme, Scheme):
        raise InputError(
            f"convert: got a {type(model).__name__} and a {type(scheme).__name__}, "
            f"expected a torch.nn.Module and a Scheme or its name"
        )
    if any(isinstance(module, (QuantizedModel, IntegerLayer, Quantizer)) for module in model.modules()):
        raise InputError("convert: the model is quantized already, expected the float model that it came from")
    for name in (ACTIVATIONS, "scheme", "report"):
        if hasattr(model, name):
            raise InputError(f"convert: the model has an attribute {name!r}, which the result needs; rename it")
    model = adapt_norms(copy.deepcopy(model))
    graph = trace(model, "convert")
    calls = layer_calls(model, graph)
    layers = list(dict.fromkeys(call.layer for call in calls))
    if not layers:
        raise InputError(
            f"convert: {type(model).__name__} calls no Conv2d or Linear that can be quantized, expected at least one"
        )
    products = product_calls(model, graph)
    named = [*layers, *dict.fromkeys(call.layer for call in products if scheme.quantize_matmul)]
    if unmatched := scheme.unmatched(named):
        raise InputError(
            f"convert: override {unmatched[0]!r} matches no layer, expected a pattern for some of "
            f"{', '.join(named[:8])}{', ...' if len(named) > 8 else ''}"
        )
    place = {node: index for index, node in enumerate(graph.nodes)}
    readings = sorted([*calls, *products], key=lambda call: place[call.node])
    _quantize_tensors(model, graph, readings, scheme)
    _quantize_weights(model, calls, scheme)
    graph.lint()
    report = describe(model, graph, readings, model.get_submodule(ACTIVATIONS))
    return QuantizedModel(model, graph, scheme, report, type(model).__name__)


def _root(node: fx.Node, model: nn.Module) -> fx.Node:
    """The tensor that `node` has its values from."""
    while node.op in ("call_module", "call_function", "call_method") and node.args:
        if node.op == "call_module":
            keeps = isinstance(model.get_submodule(str(node.target)), _GRID_KEEPING_MODULES)
        else:
            keeps = node.target in _GRID_KEEPING_CALLS
        source = node.args[0]
        if not keeps or not isinstance(source, fx.Node):
            break
        node = source
    return node


def _quantize_tensors(model: nn.Module, graph: fx.Graph, calls: list[LayerCall], scheme: Scheme) -> None:
    """Put quantizers into the model and the graph, and hand their scales to the layers with a quantized weight."""
    readers: dict[fx.Node, list[LayerCall]] = {}
    scales: dict[fx.Node, list[fx.Node]] = {}
    for call in calls:
        if _input_bits(call, scheme) is not None:
            readers.setdefault(_root(call.source, model), []).append(call)
    model.add_module(ACTIVATIONS, nn.ModuleDict())
    device = next(model.parameters()).device
    for root, own in readers.items():
        # A tensor that all of them read may be smaller than its root, after a pooling for example.
        read = {call.source for call in own}
        tensor = read.pop() if len(read) == 1 else root
        bits = max(_input_bits(call, scheme) or 0 for call in own)
        kind = _twin(root, model, scheme)
        quantizer = (
            Quantizer(bits, scheme.activation_symmetric, device=device, p=_error_power(root, model))
            if kind is None
            else TwinQuantizer(bits, kind, device=device)
        )
        name = f"after_{tensor.name}"
        model.get_submodule(ACTIVATIONS).add_module(name, quantizer)
        # Arguments come first in a graph.
        place = [node for node in graph.nodes if node.op == "placeholder"][-1] if tensor.op == "placeholder" else tensor
        with graph.inserting_after(place):
            rounded = graph.call_module(f"{ACTIVATIONS}.{name}", (tensor,))
        with graph.inserting_after(rounded):
            scale = graph.get_attr(f"{ACTIVATIONS}.{name}.scale")
        for user in list(tensor.users):
            if user is not rounded:
                user.replace_input_with(tensor, rounded)
        for call in own:
            call.quantizer = name
            if call.operand is not None:
                scales.setdefault(call.node, [scale, scale])[call.operand] = scale
            elif scheme.layer(call.layer, call.position).weight_bits is not None:
                call.node.args, call.node.kwargs = (call.source, scale), {}
    by_operand = {(call.node, call.operand): call for call in calls}
    for node, pair in scales.items():
        left, right = (by_operand[node, operand] for operand in (0, 1))
        path, _, own_name = left.layer.rpartition(".")
        limits = _largest_code(model, left), _largest_code(model, right)
        model.get_submodule(path).add_module(own_name, QuantMatmul(limits))
        # The same node, so that what follows it keeps its name.
        node.op, node.target, node.args = "call_module", left.layer, (*node.args, *pair)


def _input_bits(call: LayerCall, scheme: Scheme) -> int | None:
    if call.operand is not None:
        return scheme.product(call.layer)
    return scheme.layer(call.layer, call.position).activation_bits


def _error_power(node: fx.Node, model: nn.Module) -> float:
    """3 behind a LayerNorm, whose few channels of large values a grid for the many small ones would clip, else 2.4."""
    after_norm = node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), nn.LayerNorm)
    return 3.0 if after_norm or node.target is functional.layer_norm else 2.4


def _largest_code(model: nn.Module, call: LayerCall) -> int:
    """The largest integer that the call reads."""
    grid = model.get_submodule(f"{ACTIVATIONS}.{call.quantizer}")
    if not isinstance(grid, Quantizer):
        raise TypeError(f"_largest_code: {call.quantizer} is a {type(grid).__name__}")
    return grid.largest_code


def _twin(node: fx.Node, model: nn.Module, scheme: Scheme) -> TwinKind | None:
    """Which twin grid the tensor gets, if the scheme wants one."""
    target = type(model.get_submodule(str(node.target))) if node.op == "call_module" else node.target
    kind = _TWINS.get(target)
    wanted = {"softmax": scheme.twin_softmax, "gelu": scheme.twin_gelu}
    return kind if kind is not None and wanted[kind] else None


def _quantize_weights(model: nn.Module, calls: list[LayerCall], scheme: Scheme) -> None:
    """Replace each layer whose weight gets bits, under all its names."""
    for name in dict.fromkeys(call.layer for call in calls):
        own = [call for call in calls if call.layer == name]
        # One that is used in several places counts as first, else as last, if it is so in any of them.
        position = min((call.position for call in own), key=("first", "last", "inner").index)
        bits = scheme.layer(name, position).weight_bits
        if bits is None:
            continue
        layer = model.get_submodule(name)
        axis = 0 if scheme.weight_per_channel else None
        quantizer = Quantizer(bits, scheme.weight_symmetric, axis, next(layer.parameters()).device)
        new: IntegerLayer
        if isinstance(layer, nn.Conv2d):
            new = QuantConv2d.from_float(layer, quantizer)
        elif isinstance(layer, nn.Linear):
            new = QuantLinear.from_float(layer, quantizer)
        else:
            raise TypeError(f"_quantize_weights: {name} is a {type(layer).__name__}")
        limits = [_largest_code(model, call) for call in own if call.quantizer]
        new.input_limit = max(limits, default=new.input_limit)
        for parent in list(model.modules()):
            for key, child in parent._modules.items():
                if child is layer:
                    parent._modules[key] = new
