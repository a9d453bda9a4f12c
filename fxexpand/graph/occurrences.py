"""Where graphs apply the layers of an expansion, and the edits that put one node there."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TypeAlias

import torch
from torch import fx, nn

from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.expanded import Expanded
from fxexpand.graph.rewrite import Edit, EditStep, source_of
from fxexpand.graph.structure import Series, Sum, leaves

# The step that stands for an expansion, given the path of the expansion in a graph module.
Step: TypeAlias = "Callable[[str], EditStep]"
_ADDITIONS = (operator.add, operator.iadd, torch.add)


def edits_of(gm: fx.GraphModule, expanded: Expanded, step: Step) -> Iterator[Edit | Refusal]:
    """An edit for each place where the graph applies the layers of ``expanded``, layer by layer or as a whole."""
    layers = dict(leaves(expanded))
    parameters = {id(parameter) for parameter in expanded.parameters()}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and id(attrgetter(str(node.target))(gm)) in parameters:
            yield Refusal("the graph reads a parameter of a layer that will be gone", node.name)
            return
    called: dict[fx.Node, nn.Module] = {}
    known = {id(layer) for layer in layers.values()}
    for node in gm.graph.nodes:
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if module is expanded:
            yield Edit(gm, (node,), (step(str(node.target)),))
        elif module is not None and id(module) in known:
            called[node] = module
    entry, first = next(iter(layers.items()))
    starts = [node for node, module in called.items() if module is first]
    if len(called) != len(starts) * len(layers):
        yield Refusal(f"the graph calls its {len(layers)} layers {len(called)} times, not all equally often")
        return
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    walk = _Walk(called)
    for start in starts:
        source = source_of(start)
        end = walk.match(expanded, source, source)
        if isinstance(end, Refusal):
            yield end
            return
        nodes = sorted(walk.taken, key=order.__getitem__)
        walk.taken.clear()
        outside = _used_outside(nodes, end)
        if outside is not None:
            yield outside
            return
        path = str(start.target).removesuffix(entry).removesuffix(".")
        yield Edit(gm, tuple(nodes), (step(path),), source=source)


def _used_outside(nodes: list[fx.Node], end: fx.Node) -> Refusal | None:
    for node in nodes:
        if node is not end and not set(node.users) <= set(nodes):
            users = len(node.users)
            return Refusal(f"its output is used by {users} nodes, expected the layers of the expansion only", node.name)
    return None


@dataclass
class _Walk:
    """Follows a structure through a graph. ``taken`` are the nodes of the place that is being matched."""

    called: Mapping[fx.Node, nn.Module]
    taken: set[fx.Node] = field(default_factory=set)
    done: set[fx.Node] = field(default_factory=set)

    def match(self, module: nn.Module, value: fx.Node, source: fx.Node) -> fx.Node | Refusal:
        """The node that gives what ``module`` makes of ``value``; ``source`` is what the whole reads."""
        if isinstance(module, Series):
            for part in module._modules.values():
                found = self.match(part, value, source)
                if isinstance(found, Refusal):
                    return found
                value = found
            return value
        if isinstance(module, Sum):
            return self._total(module, value, source)
        node = next((user for user in value.users if self._calls(user, module, value)), None)
        if node is None:
            users = list(value.users)
            if len(users) == 1 and value is not source:
                return Refusal(f"it stands between layers of the expansion, after {value.name}", users[0].name)
            return Refusal(f"its output is used by {len(users)} nodes, expected the next layer only", value.name)
        return self._take(node)

    def _total(self, module: Sum, value: fx.Node, source: fx.Node) -> fx.Node | Refusal:
        total: fx.Node | None = None
        for name, branch in module._modules.items():
            found = self.match(branch, value, source)
            if isinstance(found, Refusal):
                return found
            if total is None:
                total = found
                continue
            added = next((user for user in total.users if _adds(user, total, found)), None)
            if added is None:
                return Refusal(f"the output of branch {name} is not added to that of the others", found.name)
            total = self._take(added)
        return Refusal("it has no branches", value.name) if total is None else total

    def _calls(self, node: fx.Node, module: nn.Module, value: fx.Node) -> bool:
        return node not in self.done and self.called.get(node) is module and source_of(node) is value

    def _take(self, node: fx.Node) -> fx.Node:
        self.taken.add(node)
        self.done.add(node)
        return node


def _adds(node: fx.Node, a: fx.Node, b: fx.Node) -> bool:
    plain = node.op == "call_function" and node.target in _ADDITIONS and not node.kwargs
    return plain and node.args in ((a, b), (b, a))
