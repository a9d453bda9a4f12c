"""Linear regions: between a value that everything in them is computed from, and the one value that leaves them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

from fxexpand.algebra.affine import (
    Affine,
    identity,
    in_concatenation,
    in_series,
    in_sum,
    scaled_and_rounded,
    scales,
    times,
)
from fxexpand.algebra.compose import Blocks
from fxexpand.algebra.order import Order
from fxexpand.algebra.refusal import Refusal
from fxexpand.regions.maps import axis_refusal, shaped
from fxexpand.regions.parts import Join, Unary
from fxexpand.regions.reading import Reading

# What the values without an input before them come from.
_START = "start"


@dataclass(frozen=True, eq=False)
class Stretch:
    """The nodes between ``source`` and ``last``, in the order of the graph: ``last`` is one of them, ``source`` is not.

    A unary node, or a join with all its branches; nothing outside reads a value inside.
    """

    source: fx.Node
    last: fx.Node
    nodes: tuple[fx.Node, ...]


class Regions:
    """The linear regions of a graph, found by the dominators of its nodes."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self._dominator = _dominators(reading)

    def step(self, node: fx.Node) -> Stretch | Refusal | None:
        """The shortest stretch that ends with ``node``: why there is none, or None where the node is not linear."""
        part = self.reading.part(node)
        if part is None:
            return None
        if isinstance(part, Unary):
            return Stretch(part.source, node, (node,))
        entry = self._dominator.get(node)
        if entry is None:
            return Refusal("its branches come from different inputs")
        members = self._members(entry, node)
        return members if isinstance(members, Refusal) else Stretch(entry, node, members)

    def spine(self, last: fx.Node) -> list[Stretch]:
        """The stretches that end with ``last``, first to last, each with the one after it as the only user."""
        found: list[Stretch] = []
        node = last
        while True:
            step = self.step(node)
            if not isinstance(step, Stretch):
                break
            if found and not set(node.users) <= set(found[-1].nodes):
                break
            found.append(step)
            node = step.source
        return found[::-1]

    def _members(self, source: fx.Node, last: fx.Node) -> tuple[fx.Node, ...] | Refusal:
        """The nodes between ``source`` and ``last``, or why they are no region."""
        members: set[fx.Node] = set()
        waiting = [last]
        while waiting:
            node = waiting.pop()
            if node is source or node in members:
                continue
            part = self.reading.part(node)
            if part is None:
                return Refusal(f"one of its branches is not linear: {describe(self.reading.gm, node)}")
            members.add(node)
            waiting += part.sources
        for node in members - {last}:
            outside = [user.name for user in node.users if user not in members]
            if outside:
                return Refusal(f"{node.name}, in one of its branches, is also used by {', '.join(sorted(outside))}")
        return tuple(sorted(members, key=self.reading.effects.order.__getitem__))


def describe(gm: fx.GraphModule, node: fx.Node) -> str:
    """``layer1.0.relu (ReLU)``, or the name of a call."""
    if node.op == "call_module":
        return f"{node.target} ({type(gm.get_submodule(str(node.target))).__name__})"
    return node.name if node.op != "placeholder" else f"the input {node.target}"


def map_between(reading: Reading, stretch: Stretch, device: torch.device | None = None) -> Affine | Refusal | None:
    """The one map that ``stretch`` applies, in float64 on ``device``; without one, a sketch of it without its numbers.

    None where it leaves its input as it is.
    """
    maps: dict[fx.Node, Affine | Refusal | None] = {stretch.source: None}
    where = torch.device("meta") if device is None else device
    for node in stretch.nodes:
        part = reading.part(node)
        if isinstance(part, Unary):
            own = reading.sketch_of(node) if device is None else _exact(reading.map_of(node), device)
            maps[node] = in_turn(maps[part.source], own)
        elif isinstance(part, Join):
            maps[node] = _joined(reading, stretch, node, part, maps, where)
        found = maps[node]
        if isinstance(found, Refusal):
            return found.at(node.name)
    return maps[stretch.last]


def map_of_parts(
    reading: Reading, parts: Sequence[Stretch], order: Order, *, sketch: bool = False
) -> Affine | Refusal | None:
    """The map of ``parts`` in turn, composed in ``order``, in float64; or a sketch of it without its numbers."""
    device = None if sketch else _device(reading, parts)

    def composed(order: Order) -> Affine | Refusal | None:
        if isinstance(order, int):
            return map_between(reading, parts[order], device)
        return in_turn(composed(order[0]), composed(order[1]))

    return composed(order)


def scaled_layer(reading: Reading, stretch: Stretch, dtype: torch.dtype, blocks: Blocks) -> Affine | None:
    """The map of ``stretch`` in ``dtype``, where it is one layer and then batch norm or the like; else None.

    Computed in ``blocks``.
    """
    maps: list[Affine] = []
    for node in stretch.nodes:
        found = reading.map_of(node) if isinstance(reading.part(node), Unary) else Refusal("a join")
        if isinstance(found, Refusal):
            return None
        if found is not None:
            maps.append(found)
    if len(maps) < 2 or not all(map(scales, maps[1:])):
        return None
    device = maps[0].kernel.weight.device
    scale = maps[1].to(dtype=torch.float64, device=device)
    for following in maps[2:]:
        whole = in_series(scale, following.to(dtype=torch.float64, device=device))
        if isinstance(whole, Refusal):
            return None
        scale = whole
    return scaled_and_rounded(maps[0], scale, dtype, blocks)


def in_turn(first: Affine | Refusal | None, second: Affine | Refusal | None) -> Affine | Refusal | None:
    """``second`` after ``first``, where None leaves its input as it is."""
    if isinstance(first, Refusal) or second is None:
        return first
    if isinstance(second, Refusal) or first is None:
        return second
    return in_series(first, second)


def _joined(
    reading: Reading,
    stretch: Stretch,
    node: fx.Node,
    join: Join,
    maps: dict[fx.Node, Affine | Refusal | None],
    device: torch.device,
) -> Affine | Refusal:
    branches: list[Affine] = []
    for source in join.sources:
        branch = maps[source]
        if branch is None:
            known = shaped(reading.signal(stretch.source))
            branch = known if isinstance(known, Refusal) else identity(*known).to(device=device)
        if isinstance(branch, Refusal):
            return branch
        branches.append(branch)
    factors = join.factors or (1.0,) * len(branches)
    if join.factors is None:
        signal = reading.signal(node)
        known = shaped(signal.of_channels(1))
        refusal = known if isinstance(known, Refusal) else axis_refusal(signal, join.axis)
        if refusal is not None:
            return refusal
    combine = in_concatenation if join.factors is None else in_sum
    whole = times(branches[0], factors[0])
    for branch, factor in zip(branches[1:], factors[1:], strict=True):
        together = combine(whole, times(branch, factor))
        if isinstance(together, Refusal):
            return together
        whole = together
    return whole


def _exact(found: Affine | Refusal | None, device: torch.device) -> Affine | Refusal | None:
    return found.to(dtype=torch.float64, device=device) if isinstance(found, Affine) else found


def _device(reading: Reading, stretches: Sequence[Stretch]) -> torch.device:
    """Where the tensors of the layers are; scales, pools and selections are made on the CPU."""
    parts = [reading.part(node) for stretch in stretches for node in stretch.nodes]
    tensors = [tensor for part in parts if isinstance(part, Unary) for tensor in part.tensors]
    return tensors[0].device if tensors else torch.device("cpu")


def _dominators(reading: Reading) -> dict[fx.Node, fx.Node]:
    """node -> the last node before it that everything it is computed from passes through."""
    graph: nx.DiGraph[fx.Node | str] = nx.DiGraph()
    graph.add_node(_START)
    graph.add_edges_from(_edges(reading))
    found = nx.immediate_dominators(graph, _START)
    return {node: before for node, before in found.items() if isinstance(node, fx.Node) and isinstance(before, fx.Node)}


def _edges(reading: Reading) -> Iterator[tuple[fx.Node | str, fx.Node]]:
    for node in reading.gm.graph.nodes:
        if node not in reading.constants:
            sources = [source for source in node.all_input_nodes if source not in reading.constants]
            for source in sources or [_START]:
                yield source, node
