"""Where graphs apply the layers of an expansion, and the edits that put one node there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import TypeAlias

from torch import fx, nn

from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.expanded import Expanded
from fxexpand.graph.rewrite import Edit, FunctionStep, ModuleStep

# The step that stands for an expansion, given the path of the expansion in a graph module.
Step: TypeAlias = "Callable[[str], ModuleStep | FunctionStep]"


def edits_of(gm: fx.GraphModule, expanded: Expanded, step: Step) -> Iterator[Edit | Refusal]:
    """An edit for each place where the graph applies the layers of ``expanded``, one after another or as a whole."""
    names, layers = zip(*expanded.in_turn(), strict=True)
    parameters = {id(parameter) for parameter in expanded.parameters()}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and id(attrgetter(str(node.target))(gm)) in parameters:
            yield Refusal("the graph reads a parameter of a layer that will be gone", node.name)
            return
    for node in gm.graph.nodes:
        if node.op == "call_module" and gm.get_submodule(str(node.target)) is expanded:
            yield Edit(gm, (node,), (step(str(node.target)),))
    calls = {
        node: position
        for node in gm.graph.nodes
        if node.op == "call_module" and (position := _position(gm.get_submodule(str(node.target)), layers)) is not None
    }
    starts = [node for node, position in calls.items() if position == 0]
    if len(calls) != len(starts) * len(layers):
        yield Refusal(f"the graph calls its {len(layers)} layers {len(calls)} times, not all equally often")
        return
    for start in starts:
        chain = [start]
        while len(chain) < len(layers):
            users = list(chain[-1].users)
            if len(users) != 1:
                yield Refusal(f"its output is used by {len(users)} nodes, expected the next layer only", chain[-1].name)
                return
            if calls.get(users[0]) != len(chain):
                yield Refusal(f"it stands between layers of the expansion, after {chain[-1].name}", users[0].name)
                return
            chain.append(users[0])
        yield Edit(gm, tuple(chain), (step(str(start.target).removesuffix(f".{names[0]}")),))


def _position(module: nn.Module, layers: Sequence[nn.Module | None]) -> int | None:
    return next((i for i, layer in enumerate(layers) if layer is module), None)
