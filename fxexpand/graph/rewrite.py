"""The one driver that edits graphs: insertion points, names, meta, dead code, lint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

# What FX passes record of a node's value; it does not hold for the values inside an expansion.
_VALUE_META = frozenset({"val", "tensor_meta", "example_value", "type"})


@dataclass(frozen=True)
class ModuleStep:
    """Call the module at ``path`` (in the graph module) on the value before."""

    path: str


@dataclass(frozen=True)
class FunctionStep:
    """Call ``function(value before, *attributes, **settings)``; an attribute is a path, or None for no tensor."""

    function: Callable[..., Any]
    attributes: tuple[str | None, ...]
    settings: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Edit:
    """Replace ``nodes``, layers applied one after another, by ``steps``, which read what the first of them reads."""

    graph_module: fx.GraphModule
    nodes: tuple[fx.Node, ...]
    steps: tuple[ModuleStep | FunctionStep, ...]


def rewrite(edits: Iterable[Edit]) -> None:
    """Carry out ``edits``, and leave every graph they touch linted and compiled.

    The modules and parameters that the steps name must be in place. Reads of attributes that nothing uses any more go;
    all other nodes stay, also those without users: they may be there for their side effects.
    """
    touched: dict[int, fx.GraphModule] = {}
    for edit in edits:
        _carry_out(edit)
        touched[id(edit.graph_module)] = edit.graph_module
    for gm in touched.values():
        gm.graph.lint()
        gm.recompile()


def _carry_out(edit: Edit) -> None:
    graph, last = edit.graph_module.graph, edit.nodes[-1]
    value = source_of(edit.nodes[0])  # now, not when the edit was planned: an edit before this one may have changed it
    for step in edit.steps:
        with graph.inserting_before(last):
            value = _emit(graph, value, step)
        value.meta = {name: fact for name, fact in last.meta.items() if name not in _VALUE_META}
    value.meta = dict(last.meta)
    last.replace_all_uses_with(value)
    for node in reversed(edit.nodes):
        inputs = list(node.all_input_nodes)
        graph.erase_node(node)
        for read in inputs:
            if read.op == "get_attr" and not read.users:
                graph.erase_node(read)


def source_of(node: fx.Node) -> fx.Node:
    """The node whose value a layer, called as a module or as a function, is applied to."""
    value = node.args[0] if node.args else node.kwargs["input"]
    if not isinstance(value, fx.Node):
        raise TypeError(f"{node.format_node()}: expected a layer applied to a node, found {value!r}")
    return value


def _emit(graph: fx.Graph, value: fx.Node, step: ModuleStep | FunctionStep) -> fx.Node:
    if isinstance(step, ModuleStep):
        return graph.call_module(step.path, (value,))
    tensors = [None if path is None else graph.get_attr(path) for path in step.attributes]
    return graph.call_function(step.function, (value, *tensors), dict(step.settings))
