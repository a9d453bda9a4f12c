"""The layers that were merged in the graph of a program: what they stand for, and where their parameters go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from fxexpand.exported.aten import is_read_as_item, value_of, weight_of
from fxexpand.exported.naming import Names, join, owner_of
from fxexpand.exported.opened import Opened
from fxexpand.regions.install import MERGED


@dataclass(frozen=True, eq=False)
class MergedLayer:
    """A layer in the place of calls of the old program, of which ``main`` has the largest weight and ``last`` is last.

    ``weight`` is the input of the old graph that this weight is computed from, ``path`` is where the new parameters are
    in the program.
    """

    layer: nn.Module
    main: fx.Node
    last: fx.Node
    weight: fx.Node
    path: str

    def parameters(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """The name of each parameter in the layer, its name in the program, and itself."""
        for name, parameter in self.layer.named_parameters(recurse=False):
            yield name, join(self.path, name), parameter


def merged_layers(opened: Opened, kept: set[str]) -> dict[fx.Node, MergedLayer]:
    """The merged layers of ``opened.work`` by the nodes that call them; ``kept`` are the names that stay."""
    names = Names(kept)
    found: dict[fx.Node, MergedLayer] = {}
    for node in opened.work.graph.nodes:
        if node.op == "call_module":
            originals = [opened.names[name] for name in node.meta[MERGED]]
            main = max(originals, key=_size_of_weight)
            weight = _origin(main)
            path = names.owner(_targets(opened)[weight.name], main.name)
            layer = opened.work.get_submodule(str(node.target))
            found[node] = MergedLayer(layer, main, originals[-1], weight, path)
    return found


def layer_of_calls(opened: Opened, nodes: Sequence[fx.Node]) -> tuple[str, tuple[str, ...]]:
    """The path of the layer that has the largest weight among ``nodes`` of ``opened.work``, and the names of the calls
    of the program that they stand for.
    """
    calls = [call_of(opened, node) for node in nodes]
    weight = _origin(max(calls, key=_size_of_weight))
    return owner_of(_targets(opened)[weight.name]), tuple(call.name for call in calls)


def call_of(opened: Opened, node: fx.Node) -> fx.Node:
    """The call of the program that a node of ``opened.work`` stands for."""
    original = opened.originals[node]
    return next(filter(is_read_as_item, original.all_input_nodes), original)


def _targets(opened: Opened) -> dict[str, str]:
    """The names in the program of what the inputs of its graph stand for."""
    return {spec.arg.name: str(spec.target) for spec in opened.program.graph_signature.input_specs}


def _size_of_weight(node: fx.Node) -> int:
    value = value_of(weight_of(node))
    return value.numel() if isinstance(value, Tensor) else -1


def _origin(main: fx.Node) -> fx.Node:
    """The largest of the inputs of the graph that the weight of ``main`` is computed from."""
    weight = weight_of(main)
    waiting, found = [weight] if weight is not None else [], list[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder":
            found.append(node)
        waiting += node.all_input_nodes
    return max(found, key=lambda node: int(value_of(node).numel()))
