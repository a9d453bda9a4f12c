"""The cheapest way to compute a region: which of its stretches become one layer each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor, fx

from fxexpand.algebra.affine import Affine, pads_itself, without_groups
from fxexpand.algebra.order import Order, shifted
from fxexpand.algebra.refusal import Refusal
from fxexpand.regions.dtypes import promotion
from fxexpand.regions.parts import Unary
from fxexpand.regions.reading import Reading
from fxexpand.regions.region import Regions, Stretch, describe, in_turn, map_between

# How many stretches in a row are looked at for one layer. Longer ones merge in several rounds.
WINDOW = 24

# Weighs one count against another, so that the other decides between equals only.
_FIRST = 1 << 96


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates for one sample, and nodes that run; padding by itself is half of one."""

    macs: int = 0
    nodes: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.macs + other.macs, self.nodes + other.nodes)


@dataclass(frozen=True, eq=False)
class Merge:
    """A stretch that becomes one layer; ``cost`` is that of the layer, ``before`` of the nodes as they stand.

    ``parts`` are the stretches it is made of, composed in ``order``: not every order need be exact.
    """

    stretch: Stretch
    cost: Cost
    before: Cost
    parts: tuple[Stretch, ...]
    order: Order


@dataclass
class Plan:
    """What to merge, and why everything else that is linear is left alone."""

    merges: list[Merge] = field(default_factory=list)
    refused: dict[fx.Node, str] = field(default_factory=dict)
    cost: Cost = Cost()
    again: bool = False


@dataclass(frozen=True, eq=False)
class _Element:
    """One stretch of a spine: its map, where it is one, and the plan for its branches where it is not merged."""

    stretch: Stretch
    map: Affine | Refusal | None
    inner: Plan


class Planner:
    """Plans all regions of a graph. With ``always``, whatever can be one layer becomes one, whatever it costs."""

    def __init__(self, reading: Reading, *, always: bool) -> None:
        self.reading = reading
        self.regions = Regions(reading)
        self.always = always
        self._costs: dict[fx.Node, Cost] = {}

    def plan(self, nodes: Iterable[fx.Node] | None = None) -> Plan:
        """The plan for ``nodes`` (all of the graph), the last of which come last in the graph."""
        whole = Plan()
        given = list(self.reading.gm.graph.nodes if nodes is None else nodes)
        inside, covered = set(given), set[fx.Node]()
        for last in reversed(given):
            found = self.reading.parts.get(last)
            if last in covered or found is None:
                continue
            if isinstance(found, Refusal):
                whole.refused[last] = found.reason
                continue
            spine = [stretch for stretch in self.regions.spine(last) if inside.issuperset(stretch.nodes)]
            if not spine:
                step = self.regions.step(last)
                assert isinstance(step, Refusal)
                whole.refused[last] = step.reason
                whole.cost += Cost(nodes=1)
                continue
            for stretch in spine:
                covered.update(stretch.nodes)
            self._add(whole, self._plan_spine(spine))
        return whole

    @staticmethod
    def _add(whole: Plan, part: Plan) -> None:
        whole.merges += part.merges
        whole.refused |= part.refused
        whole.cost += part.cost
        whole.again |= part.again

    def _plan_spine(self, spine: list[Stretch]) -> Plan:
        elements = [self._element(stretch) for stretch in spine]
        count = len(elements)
        maps: dict[tuple[int, int], Affine | Refusal | None] = {}
        orders: dict[tuple[int, int], Order] = {}
        edges: dict[tuple[int, int], Cost] = {}
        reasons: dict[tuple[int, int], str] = {}
        weights, following = [0] * (count + 1), [count] * count  # of the cheapest path from each position to the end
        for start in reversed(range(count)):
            for end in range(start + 1, min(count, start + WINDOW) + 1):
                maps[start, end] = self._span(elements, maps, orders, start, end)
                if end == start + 1 and len(elements[start].stretch.nodes) == 1:
                    continue  # one node: there is nothing to merge
                cost = self._cost_of_one(elements, maps[start, end], start, end)
                if not isinstance(cost, Refusal):
                    edges[start, end] = cost
                elif not isinstance(elements[start].map, Refusal):
                    reasons[start, end] = cost.reason
            stands = self._as_it_stands(elements[start])
            if (start, start + 1) not in edges or self._weight(stands) <= self._weight(edges[start, start + 1]):
                edges.pop((start, start + 1), None)
            steps = {start + 1: weights[start + 1] + self._weight(edges.get((start, start + 1), stands))}
            for end in range(start + 2, min(count, start + WINDOW) + 1):
                if (start, end) in edges:
                    # Of equals, what stands is left alone.
                    steps[end] = weights[end] + self._weight(edges[start, end]) + 1
            following[start] = min(steps, key=steps.__getitem__)
            weights[start] = steps[following[start]]
        path = [0]
        while path[-1] < count:
            path.append(following[path[-1]])
        return self._chosen(elements, path, edges, orders, reasons)

    def _element(self, stretch: Stretch) -> _Element:
        found = map_between(self.reading, stretch)
        inner = self.plan(stretch.nodes[:-1]) if len(stretch.nodes) > 1 else Plan()
        return _Element(stretch, found, inner)

    @staticmethod
    def _span(
        elements: list[_Element],
        maps: dict[tuple[int, int], Affine | Refusal | None],
        orders: dict[tuple[int, int], Order],
        start: int,
        end: int,
    ) -> Affine | Refusal | None:
        """The one map of several elements: exact if it is so from the left, or from the right."""
        if end == start + 1:
            orders[start, end] = 0
            return elements[start].map
        orders[start, end] = (orders[start, end - 1], end - 1 - start)
        found = in_turn(maps[start, end - 1], elements[end - 1].map)
        if isinstance(found, Refusal) and end > start + 2:
            other = in_turn(elements[start].map, maps[start + 1, end])
            if not isinstance(other, Refusal):
                orders[start, end] = (0, shifted(orders[start + 1, end]))
                return other
        return found

    def _cost_of_one(
        self, elements: list[_Element], found: Affine | Refusal | None, start: int, end: int
    ) -> Cost | Refusal:
        """What the elements cost as one layer, or why they cannot be one."""
        if found is None:
            return Refusal("nothing in it has a weight")
        if isinstance(found, Refusal):
            return found
        source, last = elements[start].stretch.source, elements[end - 1].stretch.last
        before, after = self.reading.part(source), self.reading.part(last)
        if before is not None and not before.whole:
            return Refusal(f"it reads a part of {source.name}")
        if after is not None and not after.whole:
            return Refusal("its value is a tuple")
        tensors = [t for element in elements[start:end] for t in self._tensors(element)]
        for kind in ({t.dtype for t in tensors}, {t.device for t in tensors}):
            if len(kind) > 1:
                return Refusal(f"their tensors differ: {', '.join(sorted(map(str, kind)))}")
        nodes = [node for element in elements[start:end] for node in element.stretch.nodes]
        change = self._change_before_last_read(source, nodes)
        if change is not None:
            return Refusal(f"{change.name} changes {source.name} in place before all of it is read")
        promoted = promotion(self.reading, source, nodes, tensors[0].dtype) if tensors else None
        if promoted is not None:
            return promoted
        if not any(map(self.reading.is_layer, nodes)):
            return Refusal("no convolution or linear layer stands beside it to take it in")
        return Cost(self._macs(found, source), 1 if pads_itself(found) else 1.5)

    def _change_before_last_read(self, source: fx.Node, nodes: list[fx.Node]) -> fx.Node | None:
        """What changes ``source`` between the first of ``nodes`` and the last that reads its memory."""
        effects, shared, last = self.reading.effects, {source}, nodes[0]
        if effects.changes_between(source, nodes[0], nodes[-1]) is None:
            return None
        for node in nodes:
            if not shared.isdisjoint(node.all_input_nodes):
                last = node
                if not effects.is_fresh(node):
                    shared.add(node)
        return effects.changes_between(source, nodes[0], last)

    def _tensors(self, element: _Element) -> list[Tensor]:
        parts = [self.reading.part(node) for node in element.stretch.nodes]
        return [tensor for part in parts if isinstance(part, Unary) for tensor in part.tensors]

    def _as_it_stands(self, element: _Element) -> Cost:
        """What an element costs when it is not merged: one node, or a join and its branches."""
        return element.inner.cost + self._own_cost(element.stretch.last)

    def _own_cost(self, node: fx.Node) -> Cost:
        if node not in self._costs:
            self._costs[node] = self._cost_of_node(node)
        return self._costs[node]

    def _cost_of_node(self, node: fx.Node) -> Cost:
        part = self.reading.parts[node]
        found = self.reading.sketch_of(node) if isinstance(part, Unary) and part.computes else None
        if not isinstance(found, Affine) or not isinstance(part, Unary):
            return Cost(nodes=0.5 if isinstance(part, Unary) and part.pads else 1)
        return Cost(self._macs(found, part.source), 1)

    def _macs(self, affine: Affine, source: fx.Node) -> int:
        return without_groups(affine).macs(self.reading.size(source, affine.dims))

    def _weight(self, cost: Cost) -> int:
        nodes = int(2 * cost.nodes)
        first, second = (nodes, cost.macs) if self.always else (cost.macs, nodes)
        return (first * _FIRST + second) * WINDOW

    def _chosen(
        self,
        elements: list[_Element],
        path: list[int],
        edges: dict[tuple[int, int], Cost],
        orders: dict[tuple[int, int], Order],
        reasons: dict[tuple[int, int], str],
    ) -> Plan:
        """The plan that ``path`` stands for, with the reasons for what it leaves alone."""
        plan = Plan(again=len(path) > 2 and len(path) <= len(elements))
        for start, end in pairwise(path):
            cost = edges.get((start, end))
            if cost is not None:
                merged = elements[start:end]
                nodes = tuple(node for element in merged for node in element.stretch.nodes)
                before = sum((self._own_cost(node) for node in nodes), Cost())
                stretch = Stretch(merged[0].stretch.source, merged[-1].stretch.last, nodes)
                parts = tuple(element.stretch for element in merged)
                plan.merges.append(Merge(stretch, cost, before, parts, orders[start, end]))
                plan.cost += cost
                continue
            element = elements[start]
            self._add(plan, element.inner)
            plan.cost += self._own_cost(element.stretch.last)
            if self.reading.signal(element.stretch.last).dims is not None:  # else it may be no signal: a size, say
                plan.refused[element.stretch.last] = self._why(elements, start, reasons)
        return plan

    def _why(self, elements: list[_Element], at: int, reasons: dict[tuple[int, int], str]) -> str:
        """Why the element at a position is not merged with those beside it."""
        element = elements[at]
        if isinstance(element.map, Refusal):
            own = element.map.where == element.stretch.last.name
            return element.map.reason if own else str(element.map)
        if len(element.stretch.nodes) > 1:
            return reasons.get((at, at + 1)) or self._dearer([element])
        beside = [cut for cut in (at, at + 1) if 0 < cut < len(elements)]
        for cut in beside:
            if (cut - 1, cut + 1) in reasons:
                return f"with {self._name(elements[cut if cut > at else cut - 1])}: {reasons[cut - 1, cut + 1]}"
        return self._dearer(elements[beside[0] - 1 : beside[0] + 1]) if beside else self._stands_alone(element)

    def _dearer(self, elements: list[_Element]) -> str:
        found: Affine | Refusal | None = None
        for element in elements:
            found = in_turn(found, element.map)
        names = " -> ".join(self._name(element) for element in elements)
        before = sum((self._as_it_stands(element) for element in elements), Cost())
        if not isinstance(found, Affine) or before.macs == 0:
            return f"{names}: no convolution or linear layer stands beside it to take it in"
        ratio = self._macs(found, elements[0].stretch.source) / before.macs
        if ratio <= 1:
            return f"{names}: it is cheaper to merge one of them with what stands on its other side"
        return f'{names}: one kernel would cost {ratio:.1f} times the MACs; when="always" merges it'

    def _stands_alone(self, element: _Element) -> str:
        gm, stretch = self.reading.gm, element.stretch
        before, users = describe(gm, stretch.source), [describe(gm, user) for user in stretch.last.users]
        for node in (stretch.source, *stretch.last.users):
            reason = self.reading.parts.get(node)
            if isinstance(reason, Refusal):
                return f"{describe(gm, node)}, beside it, is left alone: {reason.reason}"
        if self.reading.part(stretch.source) is not None and len(stretch.source.users) > 1:
            others = ", ".join(user.name for user in stretch.source.users if user not in stretch.nodes)
            return f"its input, from {before}, is also used by {others}"
        if len(users) > 1 and any(self.reading.part(user) is not None for user in stretch.last.users):
            return f"its output is used by {len(users)} nodes: {', '.join(users)}"
        return f"nothing linear beside it to merge with: it stands between {before} and {', '.join(users) or 'nothing'}"

    def _name(self, element: _Element) -> str:
        node = element.stretch.last
        return str(node.target) if node.op == "call_module" else node.name
