"""The units of a model that are reconstructed one after another: residual blocks, transformer blocks, single layers.

Found in the graph alone. A *cut* is a place where one tensor carries all that the rest of the model reads. Between two
cuts lies a single operation, or everything of a branch and its join. A unit starts with a layer or a branch, and takes
what follows (norm, activation, quantizer) up to the next one; a norm that follows a join opens the next unit, as in
pre-activation networks. A depthwise convolution goes with the layer after it, and branches inside one item of a
Sequential or ModuleList (attention and MLP of a transformer block) go together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase

from ttaq.errors import InputError
from ttaq.nn import QuantizedModel, activation_quantizers, quantized_layers

__all__ = ["Unit", "find_units", "layer_by_layer"]

# Their value is no tensor, or a tuple of tensors: nothing that could be handed from unit to unit.
_NO_TENSOR = {getattr, torch.unbind, torch.chunk, torch.split, "unbind", "chunk", "split", "size", "dim"}


@dataclass
class Unit:
    """A part of a graph with one tensor in and one tensor out.

    source, output: the nodes of the tensor that it reads and of the one that it makes. nodes: what it computes,
    `output` last, without the parameters it reads. layers, quantizers: names of those with a grid among them.
    name: that of its layers as far as they agree.
    """

    source: fx.Node
    nodes: list[fx.Node]
    layers: list[str] = field(default_factory=list)
    quantizers: list[str] = field(default_factory=list)

    @property
    def output(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def name(self) -> str:
        return _common(self.layers) or (self.layers[0] if self.layers else self.nodes[0].name)


def find_units(model: QuantizedModel, names: Sequence[str] | None = None) -> list[Unit]:
    """The units of a model, which together compute all of it.

    names: modules of the model, such as `["layer1", "layer2.0"]`: all layers inside one of them become one unit.

    Raises `InputError` for a name that has no quantized layer inside, and where layers of a name do not follow one
    another.
    """
    layers, quantizers = quantized_layers(model), activation_quantizers(model)
    pieces = [_piece(*cut, layers=set(layers), quantizers=set(quantizers)) for cut in _cuts(model.graph)]
    units: list[Unit] = []
    opening: list[Unit] = []
    for piece in pieces:
        after_join = bool(units) and _is_join(units[-1].output)
        if piece.layers:
            units.append(_joined([*opening, piece]))
            opening = []
        elif not units or opening or (after_join and _is_norm(piece, model)):
            opening.append(piece)
        else:
            units[-1] = _joined([units[-1], piece])
    if opening and units:
        units[-1] = _joined([units[-1], *opening])
    elif opening:
        raise InputError("find_units: the model has no quantized layer, expected at least one")
    if names is not None:
        return _by_name(units, names)
    return _merged(units, model)


def layer_by_layer(model: QuantizedModel, unit: Unit) -> list[Unit]:
    """A unit for each layer of `unit`: everything from the input of `unit` to the layer and what follows it alone, with
    only this layer, and the quantizers that follow it, to be trained."""
    layers, own = set(quantized_layers(model)), set(unit.nodes)
    parts = []
    for node in unit.nodes:
        if node.op != "call_module" or node.target not in unit.layers:
            continue
        chain = [node]
        while len(users := [user for user in chain[-1].users if user in own]) == 1:
            inputs = [source for source in users[0].all_input_nodes if source.op != "get_attr"]
            if len(inputs) > 1 or (users[0].op == "call_module" and users[0].target in layers):
                break
            chain += users
        needed = {chain[-1]}
        for before in reversed(unit.nodes):
            if before in needed:
                needed.update(before.all_input_nodes)
        nodes = [before for before in unit.nodes if before in needed]
        parts.append(_piece(unit.source, nodes, {str(node.target)}, set()))
        parts[-1].quantizers = _piece(unit.source, chain, set(), set(unit.quantizers)).quantizers
    return parts


def _cuts(graph: fx.Graph) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """(source, nodes) of everything between two cuts, in order."""
    nodes = [node for node in graph.nodes if node.op not in ("get_attr", "output")]
    last_use = {node: index for index, node in enumerate(nodes)}
    for index, node in enumerate(nodes):
        for source in node.all_input_nodes:
            if source in last_use:
                last_use[source] = max(last_use[source], index)
    results = [node for output in graph.nodes if output.op == "output" for node in output.all_input_nodes]
    for node in results:
        last_use[node] = len(nodes)
    source, begin = nodes[0], 1
    alive: set[fx.Node] = {nodes[0]}
    for index, node in enumerate(nodes[1:], start=1):
        alive = {value for value in alive if last_use[value] > index}
        if last_use[node] > index:
            alive.add(node)
        if alive == {node} and node.target not in _NO_TENSOR:
            yield source, nodes[begin : index + 1]
            source, begin = node, index + 1


def _piece(source: fx.Node, nodes: list[fx.Node], layers: set[str], quantizers: set[str]) -> Unit:
    called = [str(node.target) for node in nodes if node.op == "call_module"]
    grids = [name.rsplit(".", 1)[-1] for name in called]
    return Unit(
        source, nodes, [name for name in called if name in layers], [name for name in grids if name in quantizers]
    )


def _joined(pieces: list[Unit]) -> Unit:
    return Unit(
        pieces[0].source,
        [node for piece in pieces for node in piece.nodes],
        list(dict.fromkeys(name for piece in pieces for name in piece.layers)),
        [name for piece in pieces for name in piece.quantizers],
    )


def _is_join(node: fx.Node) -> bool:
    return node.op != "call_module" and len(node.all_input_nodes) > 1


def _is_norm(piece: Unit, model: nn.Module) -> bool:
    node = piece.nodes[0]
    return node.op == "call_module" and isinstance(
        model.get_submodule(str(node.target)), (_NormBase, nn.LayerNorm, nn.GroupNorm)
    )


def _common(names: list[str]) -> str:
    """`a.b` of `a.b.c` and `a.b.d.e`."""
    parts = [name.split(".") for name in names]
    shared: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def _item(name: str, model: nn.Module) -> str:
    """The innermost item of a Sequential or ModuleList that holds `name`, which may be the item itself."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if isinstance(model.get_submodule(".".join(parts[: end - 1])), (nn.Sequential, nn.ModuleList)):
            return ".".join(parts[:end])
    return ""


def _merged(units: list[Unit], model: QuantizedModel) -> list[Unit]:
    result: list[Unit] = []
    for unit in units:
        if result and (_is_depthwise(result[-1], model) or _same_item(result[-1], unit, model)):
            result[-1] = _joined([result[-1], unit])
        else:
            result.append(unit)
    return result


def _same_item(before: Unit, unit: Unit, model: nn.Module) -> bool:
    """Whether both are parts of one block: branches with a residual connection of their own."""
    if not all(len(part.layers) > 1 for part in (before, unit)):
        return False
    item = _item(before.name, model)
    return item == _item(unit.name, model) and item not in ("", before.name, unit.name)


def _is_depthwise(unit: Unit, model: nn.Module) -> bool:
    layer = model.get_submodule(unit.layers[-1]) if len(unit.layers) == 1 else None
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1


def _by_name(units: list[Unit], names: Sequence[str]) -> list[Unit]:
    """Units whose layers lie in the same module of `names` joined."""

    def owner(unit: Unit) -> str | None:
        owners = {next((n for n in names if f"{layer}.".startswith(f"{n}.")), None) for layer in unit.layers}
        if len(owners) > 1:
            raise InputError(
                f"find_units: the layers {', '.join(unit.layers)} depend on each other through a branch, but belong to "
                f"{' and '.join(map(repr, owners))}; name a module that holds all of them"
            )
        return next(iter(owners))

    result: list[Unit] = []
    owners: list[str | None] = []
    for unit in units:
        name = owner(unit)
        if result and name is not None and owners[-1] == name:
            result[-1] = _joined([result[-1], unit])
        elif name is not None and name in owners:
            raise InputError(f"find_units: the layers of {name!r} do not follow one another; name smaller modules")
        else:
            result.append(unit)
            owners.append(name)
    if missing := [name for name in names if name not in owners]:
        raise InputError(
            f"find_units: {missing[0]!r} holds no quantized layer, expected the name of a module that does"
        )
    return result
