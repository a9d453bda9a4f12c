"""What a graph changes in place."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxexpand.graph.layers import has_hooks, is_layer
from fxexpand.graph.tree import submodule

IN_PLACE_OPERATORS = {
    getattr(operator, name)
    for name in ("iadd", "iand", "ifloordiv", "imatmul", "imod", "imul", "ior", "ipow", "isub", "itruediv", "ixor")
}
# What gives a tensor of its own, never one that shares memory with an input.
_FRESH = {
    *(getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "neg", "matmul")),
    *(getattr(torch, name) for name in ("add", "sub", "mul", "div", "neg", "matmul", "mm", "addmm", "cat", "concat")),
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    *(F.batch_norm, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
}
_FRESH_METHODS = {"add", "sub", "mul", "div", "neg", "matmul", "mm"}
# Functions that may change what they get after the input: where they are told to, under which name, and the default.
_UPDATES: dict[str, tuple[int, str, object]] = {
    **dict.fromkeys(("batch_norm", "native_batch_norm"), (5, "training", False)),
    "instance_norm": (5, "use_input_stats", True),
    **dict.fromkeys(("embedding", "embedding_bag"), (3, "max_norm", None)),
}
# Where functions come from that change nothing but what their names say.
_KNOWN_HOMES = frozenset({"torch", "_operator", "operator", "builtins", "math"})
_FRESH_MODULES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


class Effects:
    """Where values of ``gm`` are changed in place, also through another value that shares their memory.

    ``order`` are the positions of the nodes, ``modules`` are those that nodes call, found once.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.order = {node: position for position, node in enumerate(gm.graph.nodes)}
        self.modules = {node: submodule(gm, str(node.target)) for node in self.order if node.op == "call_module"}
        self._group: dict[fx.Node, fx.Node] = {}
        self._changes: dict[fx.Node, list[fx.Node]] = {}
        for node in gm.graph.nodes:
            for source in self._shared_with(node):
                self._group[self._root(source)] = self._root(node)
        for node in gm.graph.nodes:
            for target in self._changed_by(node):
                self._changes.setdefault(self._root(target), []).append(node)
        self._inputs = {self._root(node) for node in self.order if node.op == "placeholder"}
        attributes = {self._root(node) for node in self.order if node.op == "get_attr"}
        self._input_changes = self._changes_of(self._inputs)
        self._outer_changes = self._changes_of(self._inputs | attributes)

    def is_fresh(self, node: fx.Node) -> bool:
        """Whether the value of ``node`` surely shares no memory with the values it is computed from."""
        if node.op == "call_module":
            module = self.modules[node]
            return (is_layer(module) or isinstance(module, _FRESH_MODULES)) and not has_hooks(module)
        if "out" in node.kwargs:
            return False
        return node.target in (_FRESH_METHODS if node.op == "call_method" else _FRESH)

    def changed(self) -> frozenset[fx.Node]:
        """The nodes the values of which something changes in place."""
        return frozenset(node for node in self.order if self._root(node) in self._changes)

    def changes_between(self, node: fx.Node, first: fx.Node, last: fx.Node) -> fx.Node | None:
        """A node from ``first`` to ``last`` that changes the value of ``node``, or None.

        Inputs of the graph may share memory with each other: who changes one may change them all.
        """
        root = self._root(node)
        return self._between(self._input_changes if root in self._inputs else self._changes.get(root, []), first, last)

    def outer_change_between(self, first: fx.Node, last: fx.Node) -> fx.Node | None:
        """A node from ``first`` to ``last`` that changes what was there before the graph ran, or None."""
        return self._between(self._outer_changes, first, last)

    def owns(self, node: fx.Node) -> bool:
        """Whether the one who uses ``node``, its only user, may change its value in place without anyone seeing it."""
        while len(node.users) == 1:
            if self.is_fresh(node):
                return True
            sources = self._shared_with(node)
            if len(sources) != 1:
                return False
            node = sources[0]
        return False

    def _changes_of(self, roots: set[fx.Node]) -> list[fx.Node]:
        return [change for root in roots for change in self._changes.get(root, [])]

    def _between(self, changes: Iterable[fx.Node], first: fx.Node, last: fx.Node) -> fx.Node | None:
        found = [change for change in changes if self.order[first] <= self.order[change] < self.order[last]]
        return min(found, key=self.order.__getitem__, default=None)

    def _shared_with(self, node: fx.Node) -> list[fx.Node]:
        """The values that the one of ``node`` may share memory with."""
        if self.is_fresh(node):
            return []
        return node.all_input_nodes[:1] if writes(node) else node.all_input_nodes

    def _root(self, node: fx.Node) -> fx.Node:
        while node in self._group and self._group[node] is not node:
            following = self._group[node]
            self._group[node] = self._group.get(following, following)
            node = following
        return node

    def _changed_by(self, node: fx.Node) -> list[fx.Node]:
        """The values that ``node`` may change in place."""
        if node.op not in ("call_function", "call_method", "call_module"):
            return []
        if node.op == "call_module":
            module = self.modules[node]
            if is_foreign(module):  # code that nobody has looked into
                return node.all_input_nodes
            return _first(node) if getattr(module, "inplace", False) else []
        if is_foreign_function(node.target):
            return node.all_input_nodes
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        flags = (*node.args[1:], node.kwargs.get("inplace"))
        asked = not self.is_fresh(node) and any(flag is True for flag in flags)
        written = writes(node) or name in ("setitem", "__setitem__") or asked
        return [*(_first(node) if written else []), *nodes_in(node.kwargs.get("out")), *_updated(node, name)]


def is_foreign(module: nn.Module) -> bool:
    """Whether calling ``module`` runs code that is not torch's own, a hook perhaps."""
    return has_hooks(module) or not (type(module).__module__.startswith("torch.") or is_layer(module))


def is_foreign_function(target: Any) -> bool:
    """Whether ``target`` is a function of the user's, or an operator that says that it changes an argument."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.OpOverloadPacket):
        names: list[str] = target.overloads()
        return any(is_foreign_function(getattr(target, name)) for name in names)
    if isinstance(target, (str, type)):  # a method of a tensor, or what makes a named tuple
        return False
    home = getattr(target, "__module__", None) or "torch"  # what is written in C has none
    return str(home).partition(".")[0] not in _KNOWN_HOMES


def _first(node: fx.Node) -> list[fx.Node]:
    """What ``node`` has for its first argument, by position or by name: a value, or several in a list."""
    return nodes_in(node.args[0]) if node.args else nodes_in(tuple(node.kwargs.values()))


def _updated(node: fx.Node, name: str) -> list[fx.Node]:
    """The statistics that a function keeps up to date, or the weight that it scales before it looks rows up."""
    if name not in _UPDATES:
        return []
    position, keyword, default = _UPDATES[name]
    asked = node.args[position] if len(node.args) > position else node.kwargs.get(keyword, default)
    if asked is False or asked is None:
        return []
    return [source for source in node.all_input_nodes if source not in nodes_in(node.args[:1])]


def nodes_in(value: Any) -> list[fx.Node]:
    """The nodes in an argument."""
    found: list[fx.Node] = []

    def note(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.node.map_arg(value, note)
    return found


def writes(node: fx.Node) -> bool:
    """Whether ``node`` is an operation in place by its name, and gives what it has changed: ``x += y``."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.target in IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
