"""The one driver that edits graphs: insertion points, names, meta, dead code, lint."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import fx, nn

from fxexpand.graph.record import Record
from fxexpand.graph.structure import Series, Sum

# What FX passes record of a node's value; it does not hold for the values inside an expansion.
_VALUE_META = frozenset({"val", "tensor_meta", "example_value", "type"})


@dataclass(frozen=True)
class ModuleStep:
    """Call the module at ``path`` (in the graph module) on the value before, and on the attributes at these paths."""

    path: str
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True)
class StructureStep:
    """Call the layers of ``structure``, which is at ``path``, on the value before: one after another, and side by side
    with their outputs added.
    """

    path: str
    structure: nn.Module


@dataclass(frozen=True)
class FunctionStep:
    """Call ``function(value before, *attributes, **settings)``; an attribute is a path, or None for no tensor."""

    function: Callable[..., Any]
    attributes: tuple[str | None, ...]
    settings: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class RecordStep:
    """Put the nodes of a record back, to read the value before; ``paths`` are where the things it holds are now."""

    record: Record
    paths: tuple[str, ...]


@dataclass(frozen=True)
class EmitStep:
    """Put nodes into the graph, at its insertion point, by ``emit(graph, value before)``; the last gives the value."""

    emit: Callable[[fx.Graph, fx.Node], list[fx.Node]]


EditStep: TypeAlias = "ModuleStep | StructureStep | FunctionStep | RecordStep | EmitStep"


@dataclass(frozen=True)
class Edit:
    """Replace ``nodes``, in the order of the graph, by ``steps`` on the value of ``source``.

    The last of the nodes gives the only value that others read. Without a ``source`` the nodes are layers applied one
    after another, and it is what the first of them reads. The last step has ``meta`` beside what the last node had.
    ``constants`` are nodes, computed from attributes alone, that go where nothing uses them any more; reads of
    attributes always do.
    """

    graph_module: fx.GraphModule
    nodes: tuple[fx.Node, ...]
    steps: tuple[EditStep, ...]
    source: fx.Node | None = None
    constants: frozenset[fx.Node] = frozenset()
    meta: Mapping[str, object] = field(default_factory=dict)


def rewrite(edits: Iterable[Edit]) -> None:
    """Carry out ``edits``, and leave every graph they touch linted and compiled.

    The modules and parameters that the steps name must be in place. Reads of attributes that nothing uses any more go;
    all other nodes stay, also those without users: they may be there for their side effects.
    """
    touched: dict[int, fx.GraphModule] = {}
    replaced: dict[fx.Node, fx.Node] = {}
    for edit in edits:
        _carry_out(edit, replaced)
        touched[id(edit.graph_module)] = edit.graph_module
    for gm in touched.values():
        gm.graph.lint()
        gm.recompile()


def _carry_out(edit: Edit, replaced: dict[fx.Node, fx.Node]) -> None:
    graph, first, last = edit.graph_module.graph, edit.nodes[0], edit.nodes[-1]
    # Now, not when the edit was planned: an edit before this one may have changed it.
    value = source_of(first) if edit.source is None else replaced.get(edit.source, edit.source)
    for step in edit.steps:
        with graph.inserting_before(first):  # where the value is read now: something may change it later, in place
            made = _emit(graph, value, step)
        for node in made:
            node.meta = {name: fact for name, fact in last.meta.items() if name not in _VALUE_META}
        value = made[-1]
    value.meta = {**last.meta, **edit.meta}
    last.replace_all_uses_with(value)
    replaced[last] = value
    for node in reversed(edit.nodes):
        constants = [source for source in node.all_input_nodes if source not in edit.nodes and source is not value]
        graph.erase_node(node)
        _erase_unused(graph, constants, edit.constants)


def _erase_unused(graph: fx.Graph, waiting: list[fx.Node], constants: frozenset[fx.Node]) -> None:
    """Erase reads of attributes, and what is computed of them alone, where nothing uses them."""
    gone: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if (node.op == "get_attr" or node in constants) and not node.users and node not in gone:
            waiting += node.all_input_nodes
            graph.erase_node(node)
            gone.add(node)


def source_of(node: fx.Node) -> fx.Node:
    """The node whose value a layer, called as a module or as a function, is applied to."""
    value = node.args[0] if node.args else node.kwargs["input"]
    if not isinstance(value, fx.Node):
        raise TypeError(f"{node.format_node()}: expected a layer applied to a node, found {value!r}")
    return value


def _emit(graph: fx.Graph, value: fx.Node, step: EditStep) -> list[fx.Node]:
    """The nodes of ``step``, the last of which gives its value."""
    if isinstance(step, RecordStep):
        return step.record.emit(graph, value, step.paths)
    if isinstance(step, StructureStep):
        return list(_emit_structure(graph, value, step.structure, step.path))
    if isinstance(step, EmitStep):
        return step.emit(graph, value)
    if isinstance(step, ModuleStep):
        return [graph.call_module(step.path, (value, *map(graph.get_attr, step.attributes)))]
    tensors = [None if path is None else graph.get_attr(path) for path in step.attributes]
    return [graph.call_function(step.function, (value, *tensors), dict(step.settings))]


def _emit_structure(graph: fx.Graph, value: fx.Node, structure: nn.Module, path: str) -> Iterator[fx.Node]:
    parts = [(f"{path}.{name}".lstrip("."), part) for name, part in structure._modules.items() if part is not None]
    if isinstance(structure, Series):
        for inner, part in parts:
            for node in _emit_structure(graph, value, part, inner):
                value = node
                yield node
    elif isinstance(structure, Sum):
        total: fx.Node | None = None
        for inner, part in parts:
            made = list(_emit_structure(graph, value, part, inner))
            yield from made
            if total is not None:
                made.append(graph.call_function(operator.add, (total, made[-1])))
                yield made[-1]
            total = made[-1]
    else:
        yield graph.call_module(path, (value,))
