"""Which linear regions of a model run as one layer while it is trained, and what a step costs either way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import fx, nn

from fxexpand.algebra.affine import Affine
from fxexpand.algebra.composition import Composition
from fxexpand.algebra.kernel import Kernel
from fxexpand.algebra.order import Order, cheapest_order
from fxexpand.algebra.refusal import Refusal
from fxexpand.algebra.step_cost import StepCost, applied_step, composed_step
from fxexpand.graph.expanded import Expanded
from fxexpand.graph.record import Record
from fxexpand.graph.uses import running
from fxexpand.regions.live import LiveStep, live_map, live_steps, weight_beside
from fxexpand.regions.live_region import LiveRegion
from fxexpand.regions.parts import Join, Unary
from fxexpand.regions.plan import Merge, Planner
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


def plan_regions(work: nn.Module, shapes: Shapes, lifts: Lifts) -> Iterator[LivePlan]:
    """The linear regions of all graphs that run when ``work`` does, but for those inside expansions.

    They are those that ``fuse`` would merge, were what they compute with constant.
    """
    expanded = [module for module in work.modules() if isinstance(module, Expanded)]
    apart = {id(inner) for module in expanded for inner in module.modules()}
    for gm in running(work)[0]:
        reading = Reading(gm, shapes, lifts)
        for node, part in list(reading.parts.items()):
            if isinstance(part, Unary):
                refusal = _left_alone(reading, node, apart)
                if refusal is not None:
                    reading.parts[node] = refusal
        order = reading.effects.order
        merges = Planner(reading, always=False).plan().merges
        for merge in sorted(merges, key=lambda found: order[found.stretch.last]):
            plan = _plan(reading, merge)
            if plan is not None:
                yield plan


def _left_alone(reading: Reading, node: fx.Node, apart: set[int]) -> Refusal | None:
    if node.op == "call_module" and id(reading.gm.get_submodule(str(node.target))) in apart:
        return Refusal("it belongs to an expansion, which collapses by itself")
    found = live_map(reading, node, (reading.gm, ""))
    return found if isinstance(found, Refusal) else None


def _plan(reading: Reading, merge: Merge) -> LivePlan | None:
    beside = weight_beside(reading, merge.stretch.nodes)
    if beside is None:
        return None
    parts: list[tuple[LiveStep, ...]] = []
    sketches: list[Affine] = []
    for stretch in merge.parts:
        steps, sketch = live_steps(reading, stretch, beside), map_between(reading, stretch)
        if isinstance(steps, Refusal) or isinstance(sketch, Refusal):
            return None
        if sketch is not None:
            parts.append(steps)
            sketches.append(sketch)
    chain = [sketch.kernel for sketch in sketches]
    order = cheapest_order(chain)
    whole = map_of_parts(reading, merge.parts, merge.order, sketch=True)
    if isinstance(order, Refusal) or not isinstance(whole, Affine) or (whole.dims == 0 and whole.kernel.groups > 1):
        return None
    nodes = _with_constants(reading, merge.stretch.nodes)
    region = LiveRegion(
        tuple(parts),
        order,
        Composition.of(order, chain),
        whole,
        Record.of(reading.gm, nodes, merge.stretch.source),
        _switches(reading, nodes),
    )
    constants = frozenset(nodes) - frozenset(merge.stretch.nodes)
    return LivePlan(reading, merge, region, constants, _costs(reading, merge, order, chain, whole))


def _switches(reading: Reading, nodes: list[fx.Node]) -> tuple[nn.Module, ...]:
    """The modules that do something else in training mode."""
    called = {str(node.target): None for node in nodes if node.op == "call_module"}
    modules = [reading.gm.get_submodule(target) for target in called]
    return tuple(m for m in modules if isinstance(m, (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)))


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
            # Its branches are laid out alike and added, forward and backward.
            branches += StepCost(0, 0, 2 * len(part.sources) * whole.kernel.weight.numel(), 3 * len(part.sources))
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
