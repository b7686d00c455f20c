"""The torch.fx graph of a model, and the layers in it that can be quantized."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from ttaq.errors import InputError
from ttaq.scheme import Position

__all__ = ["PRODUCTS", "LayerCall", "is_covered", "layer_calls", "product_calls", "trace"]

PRODUCTS: set[Callable[..., Any] | str] = {torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm"}


class _Tracer(fx.Tracer):
    """Traces through blocks and keeps layers whole, layers that extend one of torch's included."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        layer = isinstance(m, (_ConvNd, nn.Linear, _NormBase, nn.LayerNorm, nn.GroupNorm, nn.MultiheadAttention))
        return layer or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, who: str) -> fx.Graph:
    """The graph of `model(x)` in eval mode, with the defaults of all further arguments.

    Raises `InputError` (in the name of `who`) for a forward that torch.fx cannot follow.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    modes = {module: module.training for module in model.modules()}
    try:
        graph = _Tracer().trace(model.eval(), defaults or None)
    except Exception as error:
        raise InputError(
            f"{who}: torch.fx cannot trace {type(model).__name__}: {' '.join(str(error).split())[:200]} "
            f"({type(error).__name__}); expected a forward that does not branch or loop on values or shapes of its "
            f"tensors: move that code out of forward, or into a function marked with torch.fx.wrap"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    # Tracing leaves the arguments that it fixed in the signature, each with a check that it has its default.
    names = {f"{name}_1" for name in defaults}
    fixed = {node: None for node in graph.nodes if node.op == "placeholder" and node.target in names}
    for node in graph.nodes:
        if any(source in fixed for source in node.all_input_nodes):
            fixed[node] = None
    for node in reversed(fixed):
        graph.erase_node(node)
    return graph


@dataclass
class LayerCall:
    """One use, in a graph, of a layer that can be quantized, or one operand of a product of activations.

    quantizer: the name of the one that its input got. operand: of a product, its place in the arguments.
    """

    node: fx.Node
    layer: str
    position: Position
    quantizer: str | None = None
    operand: int | None = None

    @property
    def source(self) -> fx.Node:
        """The tensor that the layer reads."""
        source = self.node.args[self.operand or 0] if self.node.args else self.node.kwargs["input"]
        if not isinstance(source, fx.Node):
            raise InputError(f"convert: layer {self.layer} reads {source!r}, expected a tensor computed by the model")
        return source


def is_covered(module: nn.Module) -> bool:
    """Whether a quantized layer can replace the module: a Conv2d or Linear that computes what torch's does, from its
    own weight and without hooks."""
    if is_parametrized(module) or module._forward_hooks or module._forward_pre_hooks:
        return False
    if isinstance(module, nn.Conv2d):
        kind = type(module)
        return kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def layer_calls(model: nn.Module, graph: fx.Graph) -> list[LayerCall]:
    """Where the graph uses layers that can be quantized. First are those that no other precedes, last those that no
    other follows."""
    covered = [n for n in graph.nodes if n.op == "call_module" and is_covered(model.get_submodule(str(n.target)))]
    downstream, upstream = set(covered), set(covered)
    has_before: set[fx.Node] = set()
    for node in graph.nodes:
        if any(source in downstream for source in node.all_input_nodes):
            has_before.add(node)
            downstream.add(node)
    has_after: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if any(user in upstream for user in node.users):
            has_after.add(node)
            upstream.add(node)
    calls = []
    for node in covered:
        position: Position = "first" if node not in has_before else "inner" if node in has_after else "last"
        calls.append(LayerCall(node, str(node.target), position))
    return calls


def product_calls(model: nn.Module, graph: fx.Graph) -> list[LayerCall]:
    """The operands, two by two, of the matrix products of tensors that the graph computes, as in attention.

    A product has the name of the module whose forward calls it, then `matmul`, and in the same module then `matmul_1`,
    ...: `blocks.0.attn.matmul`. The calls get both tensors as positional arguments.
    """
    calls = []
    made: set[str] = set()
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method") or node.target not in PRODUCTS:
            continue
        operands = (*node.args, *(node.kwargs[key] for key in ("input", "other", "mat2") if key in node.kwargs))
        if (
            len(operands) != 2
            or "out" in node.kwargs
            or not all(isinstance(o, fx.Node) and _is_computed(o) for o in operands)
        ):
            continue
        stack = node.meta.get("nn_module_stack") or {}
        path = next(reversed([place for place, _ in stack.values()]), "")
        name = _free_name(model, path, made)
        made.add(name)
        node.args, node.kwargs = operands, {}
        calls += [LayerCall(node, name, "inner", operand=operand) for operand in (0, 1)]
    return calls


def _is_computed(node: fx.Node) -> bool:
    """Whether a tensor depends on the input of the model."""
    before, seen = [node], set()
    while before:
        node = before.pop()
        if node.op == "placeholder":
            return True
        before += [source for source in node.all_input_nodes if source not in seen]
        seen.add(node)
    return False


def _free_name(model: nn.Module, path: str, taken: set[str]) -> str:
    parent, count = model.get_submodule(path), 0
    while True:
        own = f"matmul_{count}" if count else "matmul"
        name = f"{path}.{own}" if path else own
        if name not in taken and not hasattr(parent, own):
            return name
        count += 1
