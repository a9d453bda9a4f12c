"""The graph that stands for a program, rewritten, as a program again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputSpec,
    TensorArgument,
)

from fxexpand.exported.aten import is_read_as_item
from fxexpand.exported.copying import own_values
from fxexpand.exported.layers import Emitter, mode_of
from fxexpand.exported.merged import MergedLayer, merged_layers
from fxexpand.exported.opened import Opened
from fxexpand.regions.constants import memory_of


def close_program(opened: Opened) -> ExportedProgram:
    """The program that ``opened.work`` stands for now, over tensors of its own.

    A merged layer is an ATen call with parameters of the program: inputs of the graph where those of the layer that it
    replaces stood, called as they were. Parameters, buffers and constants that nothing uses any more go, and with them
    those beside them that nothing ever used. Values have the shapes that they had: ranges and guards stay.
    """
    old = opened.program
    kept, gone = _kept_and_gone(opened)
    held = {name: value for name, value in (*old.state_dict.items(), *old.constants.items()) if name not in gone}
    layers = merged_layers(opened, {*held, *old.graph_module._modules})
    rebuilt = _Rebuilt(opened, kept, layers)
    renamed = {node.name: made.name for node, made in rebuilt.made.items()}
    outputs = [_renamed(spec, renamed) for spec in old.graph_signature.output_specs]
    root = fx.GraphModule(old.graph_module, rebuilt.graph)
    root.meta.update(old.graph_module.meta)
    own = own_values(held)
    program = ExportedProgram(
        root=root,
        graph=rebuilt.graph,
        graph_signature=ExportGraphSignature(rebuilt.specs, outputs),
        state_dict=_state(old, own, layers),
        range_constraints=copy.copy(old.range_constraints),
        module_call_graph=_module_calls(old.module_call_graph, renamed),
        example_inputs=old.example_inputs,
        constants={name: own[name] for name in old.constants if name in own},
        verifiers=old.verifiers,
    )
    if hasattr(old, "_guards_code"):  # the shapes of a program that was loaded know its guards no more
        program._guards_code = list(old._guards_code)
    return program


def _kept_and_gone(opened: Opened) -> tuple[set[str], set[str]]:
    """The names of the inputs of the old graph that stay, and those of the state that goes.

    What nothing used before goes with what stood beside it, the count of batches of a batch norm, say; and with what it
    is another name of.
    """
    here = {opened.originals[node].name for node in opened.work.graph.nodes if node in opened.originals}
    program = opened.program
    targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.target is not None}
    used = {targets[node.name] for node in program.graph.nodes if node.users and node.name in targets}
    gone = {target for name, target in targets.items() if name not in here}
    state = {**program.state_dict, **program.constants}
    unused = state.keys() - used
    places = {_place(state.get(target)) for target in gone} - {()}
    gone |= {target for target in unused if _place(state[target]) in places}
    owners = {target.rpartition(".")[0] for target in gone if "." in target}
    gone |= {target for target in unused if target.rpartition(".")[0] in owners}
    return {name for name in here if targets.get(name) not in gone}, gone


def _place(value: object) -> tuple[object, ...]:
    """What is equal for two names of one tensor, also for views of the same numbers; nothing for what is no tensor."""
    if not isinstance(value, Tensor) or not memory_of(value):
        return ()
    return (*memory_of(value), value.storage_offset(), value.shape, value.stride())


class _Rebuilt:
    """The new graph: ``made`` has its nodes by those of the old one, ``specs`` are those of its inputs."""

    def __init__(self, opened: Opened, kept: set[str], layers: Mapping[fx.Node, MergedLayer]) -> None:
        self.opened = opened
        self.graph = fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}
        self.specs: list[InputSpec] = []
        merged = {entry.main.name for entry in layers.values()}
        inputs = {node.name for node in opened.program.graph.nodes if node.op == "placeholder"}
        taken = {node.name for node in opened.program.graph.nodes} - merged - (inputs - kept)
        self._emitter = Emitter(self.graph, mode_of(opened.program.graph), taken)
        self._layers = layers
        self._parameters: dict[MergedLayer, dict[str, fx.Node]] = {}
        for spec, found in self._inputs():
            if isinstance(found, MergedLayer):
                self._parameters[found] = {
                    name: self._parameter(target, parameter) for name, target, parameter in found.parameters()
                }
            elif found.name in kept:
                self._copy(found)
                self.specs.append(spec)
        self._emit_calls()
        self.graph.lint()

    def _inputs(self) -> list[tuple[InputSpec, fx.Node | MergedLayer]]:
        """The inputs of the old graph, each after the layers that take the place of the one whose weight it was.

        Layers in place of those whose weight was no parameter come after the parameters.
        """
        nodes = [node for node in self.opened.program.graph.nodes if node.op == "placeholder"]
        specs = dict(zip(nodes, self.opened.program.graph_signature.input_specs, strict=True))
        order = {node: position for position, node in enumerate(nodes)}
        first = [at for node, at in order.items() if specs[node].kind in (InputKind.PARAMETER, InputKind.TOKEN)]
        found: list[tuple[int, int, fx.Node | MergedLayer]] = [(at, 1, node) for node, at in order.items()]
        for layer in self._layers.values():
            beside = specs[layer.weight].kind is InputKind.PARAMETER
            found.append((order[layer.weight], 0, layer) if beside else (max(first, default=-1), 2, layer))
        found.sort(key=lambda entry: entry[:2])
        return [(specs[entry.weight if isinstance(entry, MergedLayer) else entry], entry) for _, _, entry in found]

    def _parameter(self, target: str, parameter: nn.Parameter) -> fx.Node:
        node = self._emitter.placeholder(f"p_{target.replace('.', '_').lower()}", parameter)  # as torch.export calls it
        self.specs.append(InputSpec(InputKind.PARAMETER, TensorArgument(node.name), target))
        return node

    def _emit_calls(self) -> None:
        values: dict[fx.Node, fx.Node] = {}  # of the work graph -> of this one
        for node in self.opened.work.graph.nodes:
            original = self.opened.originals.get(node)
            if node in self._layers:
                entry = self._layers[node]
                values[node] = self._emitter.layer(
                    entry.layer, values[node.args[0]], self._parameters[entry], entry.main, entry.last
                )
                self.made[entry.last] = values[node]
            elif original is not None:
                if original.op != "placeholder":
                    for source in original.all_input_nodes:
                        if is_read_as_item(source):
                            self._copy(source)
                    self._copy(original)
                if original in self.made:  # an input that nothing used may be gone
                    values[node] = self.made[original]
            elif node.op == "call_function":  # the padding that a layer does not do itself
                main = next(entry.main for user, entry in self._layers.items() if user in node.users)
                values[node] = self._emitter.pad(values[node.args[0]], list(node.kwargs["pad"]), main)
        output = next(node for node in self.opened.program.graph.nodes if node.op == "output")
        self._copy(output)

    def _copy(self, node: fx.Node) -> None:
        """The same node under its very name, which FX would change where Python has something of that name."""
        self.made[node] = self.graph.node_copy(node, self.made.__getitem__)
        self.made[node].name = node.name


def _renamed(spec: OutputSpec, renamed: Mapping[str, str]) -> OutputSpec:
    if isinstance(spec.arg, ConstantArgument) or spec.arg.name not in renamed:
        return spec
    return replace(spec, arg=replace(spec.arg, name=renamed[spec.arg.name]))


def _module_calls(entries: list[ModuleCallEntry], renamed: Mapping[str, str]) -> list[ModuleCallEntry]:
    """The calls of submodules, whose signatures name values of the graph."""
    found = copy.deepcopy(entries)
    for entry in found:
        if entry.signature is not None:
            for argument in (*entry.signature.inputs, *entry.signature.outputs):
                argument.name = renamed.get(argument.name, argument.name)
    return found


def _state(old: ExportedProgram, own: Mapping[str, Any], layers: Mapping[fx.Node, MergedLayer]) -> dict[str, Any]:
    """The ``state_dict`` in its order, with the parameters of layers where the weight was that they replace."""
    targets = {spec.arg.name: spec.target for spec in old.graph_signature.input_specs}
    waiting = list(dict.fromkeys(layers.values()))
    found: dict[str, Any] = {}
    for name in (*old.state_dict, None):
        for layer in [entry for entry in waiting if name in (None, targets[entry.weight.name])]:
            waiting.remove(layer)
            found.update((target, parameter) for _, target, parameter in layer.parameters())
        if name in own:
            found[name] = own[name]
    return found
