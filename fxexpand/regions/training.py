"""Which linear regions of a model run as one layer while it is trained, and what a step costs either way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from operator import attrgetter
from typing import cast

from torch import fx, nn

from fxexpand.algebra.affine import Affine
from fxexpand.algebra.kernel import Kernel
from fxexpand.algebra.order import Order, cheapest_order
from fxexpand.algebra.refusal import Refusal
from fxexpand.algebra.step_cost import StepCost, added_step, applied_step, composed_step
from fxexpand.graph.composer import Composer
from fxexpand.graph.expanded import Expanded
from fxexpand.graph.record import Record
from fxexpand.regions.live import CODE, LiveStep, live_map, live_steps, weight_beside
from fxexpand.regions.live_region import LiveRegion, Recipe
from fxexpand.regions.parts import Join, Unary
from fxexpand.regions.plan import Merge, Planner
from fxexpand.regions.reach import Reach
from fxexpand.regions.reading import Lifts, Reading
from fxexpand.regions.region import map_between, map_of_parts
from fxexpand.regions.shapes import Shapes


@dataclass(frozen=True)
class StepCosts:
    """What a training step costs, layer by layer and as one layer; in time that a multiply-accumulate takes."""

    explicit: StepCost
    collapsed: StepCost

    def __add__(self, other: StepCosts) -> StepCosts:
        return StepCosts(self.explicit + other.explicit, self.collapsed + other.collapsed)

    @property
    def dearer(self) -> Refusal | None:
        """Why the layers stay as they are, where composing costs more than it saves."""
        if self.collapsed.total <= self.explicit.total:
            return None
        ratio = self.collapsed.total / self.explicit.total
        return Refusal(f"a step would take {ratio:.2f} times as long as layer by layer")


@dataclass(frozen=True, eq=False)
class LivePlan:
    """A region of a graph, the module that can stand for it, and the costs, where example inputs tell them."""

    reading: Reading
    merge: Merge
    region: LiveRegion
    constants: frozenset[fx.Node]
    costs: StepCosts | None

    @property
    def gm(self) -> fx.GraphModule:
        return self.reading.gm

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return self.merge.stretch.nodes

    @property
    def refusal(self) -> Refusal | None:
        """Why it stays as it is, where composing costs more than it saves."""
        return None if self.costs is None else self.costs.dearer


@dataclass(frozen=True, eq=False)
class LeftAlone:
    """Nodes that ``fuse`` might merge, and ``collapse`` cannot."""

    gm: fx.GraphModule
    nodes: tuple[fx.Node, ...]
    reason: Refusal


def plan_regions(work: nn.Module, shapes: Shapes, lifts: Lifts) -> Iterator[LivePlan | LeftAlone]:
    """The linear regions of all graphs that run when ``work`` does, but for those inside expansions.

    They are those that ``fuse`` would merge, were what they compute with constant; and the nodes that ``fuse`` might
    merge, and ``collapse`` cannot.
    """
    expanded = [module for module in work.modules() if isinstance(module, Expanded)]
    apart = {id(inner) for module in expanded for inner in module.modules()}
    reach = Reach(work, tuple(lifts or ()))
    for gm in reach.graphs:
        reading = Reading(gm, shapes, lifts, reach=reach)
        for node, part in list(reading.parts.items()):
            refusal = _left_alone(reading, node, part, apart) if isinstance(part, Unary) else None
            if refusal is not None:
                reading.parts[node] = refusal
                if refusal is CODE:
                    yield LeftAlone(gm, (node,), refusal)
        order = reading.effects.order
        merges = Planner(reading, always=False).plan().merges
        for merge in sorted(merges, key=lambda found: order[found.stretch.last]):
            plan = _plan(reading, merge)
            yield LeftAlone(gm, merge.stretch.nodes, plan) if isinstance(plan, Refusal) else plan


def _left_alone(reading: Reading, node: fx.Node, part: Unary, apart: set[int]) -> Refusal | None:
    if node.op == "call_module" and id(reading.gm.get_submodule(str(node.target))) in apart:
        return Refusal("it belongs to an expansion, which collapses by itself")
    record = Record.of(_with_constants(reading, (node,)), part.source)
    found = live_map(reading, node, record, None)
    return CODE if found is CODE else None


def _plan(reading: Reading, merge: Merge) -> LivePlan | Refusal:
    source = merge.stretch.source
    nodes = _with_constants(reading, merge.stretch.nodes)
    record = Record.of(nodes, source)
    beside = weight_beside(reading, merge.stretch.nodes, record)
    parts: list[tuple[LiveStep, ...]] = []
    chain: list[Kernel] = []
    for stretch in merge.parts:
        steps, sketch = live_steps(reading, stretch, record, beside), map_between(reading, stretch)
        if isinstance(steps, Refusal) or isinstance(sketch, Refusal):
            return steps if isinstance(steps, Refusal) else cast(Refusal, sketch)
        if sketch is not None:
            parts.append(steps)
            chain.append(sketch.kernel)
    order, whole = cheapest_order(chain), map_of_parts(reading, merge.parts, merge.order, sketch=True)
    if isinstance(order, Refusal):
        return order
    if not isinstance(whole, Affine):
        return whole or Refusal("it leaves its input as it is")
    if whole.dims == 0 and whole.kernel.groups > 1:
        return Refusal("a linear layer with groups would be made dense at each call")
    recipe = Recipe(tuple(parts), order, Composer.of(order, chain), whole, _rank(reading, merge))
    region = LiveRegion(recipe, record, [attrgetter(path)(reading.gm) for path in record.paths])
    return LivePlan(
        reading,
        merge,
        region,
        frozenset(nodes) - frozenset(merge.stretch.nodes),
        _costs(reading, merge, order, chain, whole),
    )


def _rank(reading: Reading, merge: Merge) -> int | None:
    """How many axes the input has to have: batch norm and axes that are counted from the first one ask for that."""
    known = reading.signal(merge.stretch.source)
    if known.rank is not None:
        return known.rank
    called = [reading.gm.get_submodule(str(n.target)) for n in merge.stretch.nodes if n.op == "call_module"]
    norms = any(isinstance(module, nn.modules.batchnorm._NormBase) for module in called)
    return known.dims + 2 if norms and known.dims is not None else None


def _with_constants(reading: Reading, nodes: tuple[fx.Node, ...]) -> list[fx.Node]:
    """``nodes``, and what they read that does not depend on the inputs of the graph, in the order of the graph."""
    found = dict.fromkeys(nodes)
    waiting = list(nodes)
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source in reading.constants and source not in found:
                found[source] = None
                waiting.append(source)
    return sorted(found, key=reading.effects.order.__getitem__)


def _costs(reading: Reading, merge: Merge, order: Order, chain: list[Kernel], whole: Affine) -> StepCosts | None:
    """What a step costs for the example inputs; None without them."""
    source = merge.stretch.source
    shape = reading.shapes.get(source)
    if shape is None:
        return None
    batch = prod(shape[: len(shape) - 1 - whole.dims])
    explicit, branches = StepCost(), StepCost()
    for node in merge.stretch.nodes:
        explicit += _step_of(reading, node, batch)
        part = reading.part(node)
        if isinstance(part, Join):
            branches += added_step(len(part.sources), whole.kernel.weight.numel())
    applied = applied_step(whole, reading.size(source, whole.dims), batch)
    return StepCosts(explicit, branches + composed_step(order, chain) + applied)


def _step_of(reading: Reading, node: fx.Node, batch: int) -> StepCost:
    """The cost of one node as it stands."""
    part = reading.part(node)
    if isinstance(part, Join):
        return StepCost(0, prod(reading.shapes.get(node, ())), 0, 1)
    found = reading.sketch_of(node) if part is not None else None
    if part is None or not isinstance(found, Affine):
        return StepCost()
    return applied_step(found, reading.size(part.source, found.dims), batch)
