"""An exported program as a graph that the passes read: parameters as attributes, ATen calls as functions of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind

from fxexpand.errors import FxExpandError
from fxexpand.exported.aten import Call, hides_changes, is_read_as_item, read_call, read_constant, value_of
from fxexpand.regions.constants import memory_of
from fxexpand.regions.reading import NOMINAL
from fxexpand.regions.shapes import Shapes

_STATE = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_GRADIENTS = (OutputKind.LOSS_OUTPUT, OutputKind.GRADIENT_TO_PARAMETER, OutputKind.GRADIENT_TO_USER_INPUT)


@dataclass(frozen=True, eq=False)
class Opened:
    """A program, and the graph that stands for it.

    Every node of ``work`` is one of the program's (of which a few are read with the one after them): ``originals`` has
    them, and ``names`` has them by its name. ``shapes`` are those of its values, with an example's length for an axis
    that differs from call to call.
    """

    program: ExportedProgram
    work: fx.GraphModule
    originals: dict[fx.Node, fx.Node]
    names: dict[str, fx.Node]
    shapes: Shapes


def open_program(program: ExportedProgram, task: str) -> Opened:
    """The graph that stands for ``program``, which stays as it is.

    Parameters, buffers and tensor constants that nothing changes are attributes; all other inputs are inputs.

    Raises ``FxExpandError`` for a program that computes gradients, and for one without numbers.
    """
    if any(spec.kind in _GRADIENTS for spec in program.graph_signature.output_specs):
        raise FxExpandError(f"{task}: expected a program for inference, found one that computes gradients.")
    constants = _constants(program, task)
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    fixed: set[fx.Node] = set()
    nodes = list(program.graph.nodes)
    for node in nodes:
        if (node.op == "placeholder" and node.name not in constants) or node.op == "get_attr":
            made[node] = graph.placeholder(node.name)
    for node in nodes:
        if node.op == "placeholder" and node.name in constants:
            made[node] = graph.create_node("get_attr", _attribute(node), name=node.name)
            fixed.add(node)
        elif node.op == "call_function" and not is_read_as_item(node):
            if node.all_input_nodes and fixed.issuperset(node.all_input_nodes):
                call = read_constant(node)
                fixed |= {node} if call is not None else set()
            else:
                call = read_call(node)
            made[node] = _create(graph, node, call or _unread(node), made)
        elif node.op == "output":
            graph.output(tuple(made[read] for read in (*node.all_input_nodes, *_named_in_calls(program, nodes))))
    originals = {work: node for node, work in made.items()}
    work = fx.GraphModule({_attribute(node): constants[node.name] for node in nodes if node.name in constants}, graph)
    return Opened(program, work.eval(), originals, {work.name: node for work, node in originals.items()}, _shapes(made))


def state_of(program: ExportedProgram, spec: InputSpec) -> object:
    """The parameter, buffer or constant that an input stands for; None for an input of the user's."""
    if spec.target is None:
        return None
    return program.state_dict.get(spec.target, program.constants.get(spec.target))


def _constants(program: ExportedProgram, task: str) -> dict[str, Tensor]:
    """The tensors that no call changes, by the name of the node that stands for them."""
    signature = program.graph_signature
    held = {spec.arg.name: state_of(program, spec) for spec in signature.input_specs if spec.kind in _STATE}
    if any(isinstance(value, FakeTensor) for value in held.values()):
        raise FxExpandError(f"{task}: expected a program with weights, found fake ones. Export a model that has them.")
    changed = {spec.target for spec in signature.output_specs if spec.kind is not OutputKind.USER_OUTPUT}
    memory = {
        part for spec in signature.input_specs if spec.target in changed for part in memory_of(state_of(program, spec))
    }
    return {
        name: value
        for name, value in held.items()
        if isinstance(value, Tensor) and type(value) in (Tensor, nn.Parameter) and memory.isdisjoint(memory_of(value))
    }


def _attribute(node: fx.Node) -> str:
    return f"held_{node.name}"


def _unknown(*values: object) -> None:
    """What stands for a call that nobody has looked into: it may change all that it gets. Never called."""


def _unread(node: fx.Node) -> Call:
    return Call("call_function", _unknown if hides_changes(node) else node.target, tuple(node.all_input_nodes))


def _create(graph: fx.Graph, node: fx.Node, call: Call, made: dict[fx.Node, fx.Node]) -> fx.Node:
    args, kwargs = fx.node.map_arg((call.args, call.kwargs), made.__getitem__)
    return graph.create_node(call.op, call.target, args, kwargs, name=node.name)


def _named_in_calls(program: ExportedProgram, nodes: list[fx.Node]) -> list[fx.Node]:
    """The values that the calls of submodules, whose signatures the program preserves, take and give."""
    names = {
        argument.name
        for entry in program.module_call_graph
        if entry.signature is not None
        for argument in (*entry.signature.inputs, *entry.signature.outputs)
    }
    return [node for node in nodes if node.name in names]


def _shapes(made: Mapping[fx.Node, fx.Node]) -> Shapes:
    """Those of the values that ``made`` has for nodes of a program."""
    shapes = Shapes()
    for node, work in made.items():
        value = value_of(node)
        if isinstance(value, Tensor):
            shapes.note(work, tuple(map(_length, value.shape)), value.dtype)
    return shapes


def _length(length: Any) -> int:
    """A length, or that of the example where it differs from call to call; asking for it adds no guard."""
    if isinstance(length, torch.SymInt):
        node: Any = length.node
        return int(node.hint) if node.has_hint() else NOMINAL
    return int(length)
