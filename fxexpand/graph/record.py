"""Nodes taken out of a graph, as data: to run them without it, and to put them back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate


@dataclass(frozen=True)
class _Value:
    """The value at a position: 0 is what the nodes read, 1 the first one's, …"""

    position: int


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A node. ``owner`` is the module that a node calls, or that holds the attribute ``name`` that it reads."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    node_name: str
    owner: nn.Module | None = None


@dataclass(frozen=True, eq=False)
class Record:
    """``nodes`` of a graph module that read ``source`` alone, and attributes; the last one gives their value."""

    nodes: tuple[_Recorded, ...]

    @staticmethod
    def of(gm: fx.GraphModule, nodes: Iterable[fx.Node], source: fx.Node) -> Record:
        """The record of ``nodes``, which come in the order of the graph."""
        positions = {source: 0}
        found: list[_Recorded] = []
        for node in nodes:
            args, kwargs = map_aggregate((node.args, node.kwargs), lambda a: _positioned(a, positions))
            owner = None
            if node.op == "call_module":
                owner = gm.get_submodule(str(node.target))
            elif node.op == "get_attr":
                owner = gm.get_submodule(str(node.target).rpartition(".")[0])
            found.append(_Recorded(node.op, node.target, args, dict(kwargs), node.name, owner))
            positions[node] = len(found)
        return Record(tuple(found))

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules that the nodes call."""
        return tuple(node.owner for node in self.nodes if node.op == "call_module" and node.owner is not None)

    def run(self, x: Tensor) -> Any:
        """What the nodes compute from ``x``."""
        values: list[Any] = [x]
        for node in self.nodes:
            args, kwargs = map_aggregate((node.args, node.kwargs), lambda a: _looked_up(a, values))
            if node.op == "call_module":
                assert node.owner is not None
                values.append(node.owner(*args, **kwargs))
            elif node.op == "get_attr":
                values.append(getattr(node.owner, node.target.rpartition(".")[2]))
            elif node.op == "call_method":
                values.append(getattr(args[0], node.target)(*args[1:], **kwargs))
            else:
                values.append(node.target(*args, **kwargs))
        return values[-1]

    def emit(self, graph: fx.Graph, source: fx.Node) -> fx.Node:
        """Put the nodes into ``graph``, at its insertion point, to read ``source``."""
        values: list[Any] = [source]
        for node in self.nodes:
            args, kwargs = map_aggregate((node.args, node.kwargs), lambda a: _looked_up(a, values))
            values.append(graph.create_node(node.op, node.target, args, kwargs, node.node_name))
        last: fx.Node = values[-1]
        return last


def _positioned(argument: Any, positions: dict[fx.Node, int]) -> Any:
    return _Value(positions[argument]) if isinstance(argument, fx.Node) else argument


def _looked_up(argument: Any, values: list[Any]) -> Any:
    return values[argument.position] if isinstance(argument, _Value) else argument
