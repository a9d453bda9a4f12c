"""Nodes taken out of a graph, as data: to run them without it, and to put them back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_aggregate


@dataclass(frozen=True)
class _Value:
    """The value at a position: 0 is what the nodes read, 1 the first one's, …"""

    position: int


@dataclass(frozen=True)
class _Recorded:
    """A node. ``held`` is the position of the module that it calls, or of the attribute that it reads."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str
    held: int | None


@dataclass(frozen=True)
class Record:
    """``nodes`` of a graph that read one value and attributes of the graph module; the last one gives their value.

    What they call and read is not in here: ``paths`` says where it was. It is handed in as ``held``, in the same order.
    """

    nodes: tuple[_Recorded, ...]
    paths: tuple[str, ...]

    @staticmethod
    def of(nodes: Iterable[fx.Node], source: fx.Node) -> Record:
        """The record of ``nodes``, in the order of the graph, that read ``source``."""
        positions = {source: 0}
        found: list[_Recorded] = []
        paths: dict[str, int] = {}
        for node in nodes:
            args, kwargs = map_aggregate((node.args, node.kwargs), lambda a: _positioned(a, positions))
            held = None
            if node.op in ("call_module", "get_attr"):
                held = paths.setdefault(str(node.target), len(paths))
            found.append(_Recorded(node.op, node.target, args, dict(kwargs), node.name, held))
            positions[node] = len(found)
        return Record(tuple(found), tuple(paths))

    def run(self, x: Tensor, held: Sequence[Any]) -> Any:
        """What the nodes compute from ``x``."""
        values: list[Any] = [x]
        for node in self.nodes:
            args, kwargs = map_aggregate((node.args, node.kwargs), lambda a: _looked_up(a, values))
            if node.held is not None:
                values.append(held[node.held](*args, **kwargs) if node.op == "call_module" else held[node.held])
            elif node.op == "call_method":
                values.append(getattr(args[0], node.target)(*args[1:], **kwargs))
            else:
                values.append(node.target(*args, **kwargs))
        return values[-1]

    def emit(self, graph: fx.Graph, source: fx.Node, paths: Sequence[str]) -> list[fx.Node]:
        """Put the nodes into ``graph``, at its insertion point, to read ``source``; ``paths`` say where things are."""
        values: list[Any] = [source]
        for node in self.nodes:
            args, kwargs = map_aggregate((node.args, node.kwargs), lambda a: _looked_up(a, values))
            target = node.target if node.held is None else paths[node.held]
            values.append(graph.create_node(node.op, target, args, kwargs, node.name))
        return values[1:]


def _positioned(argument: Any, positions: dict[fx.Node, int]) -> Any:
    return _Value(positions[argument]) if isinstance(argument, fx.Node) else argument


def _looked_up(argument: Any, values: list[Any]) -> Any:
    return values[argument.position] if isinstance(argument, _Value) else argument
