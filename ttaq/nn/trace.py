"""The torch.fx graph of a model, and the layers in it that can be quantized."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from ttaq.errors import InputError
from ttaq.scheme import Position

__all__ = ["LayerCall", "is_covered", "layer_calls", "trace"]


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
    """One use, in a graph, of a layer that can be quantized. quantizer: the name of the one its input got."""

    node: fx.Node
    layer: str
    position: Position
    quantizer: str | None = None

    @property
    def source(self) -> fx.Node:
        """The tensor that the layer reads."""
        source = self.node.args[0] if self.node.args else self.node.kwargs["input"]
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
