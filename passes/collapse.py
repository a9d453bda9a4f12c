"""collapse: linear regions run as one layer each while they are trained; uncollapse: layer by layer again."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import fx, nn

from fxexpand.algebra.refusal import Refusal
from fxexpand.algebra.step_cost import StepCost
from fxexpand.errors import ExpansionError
from fxexpand.graph.assembly import TRAINING, Assembly
from fxexpand.graph.collapsed import Collapsed
from fxexpand.graph.expanded import Expanded, outermost
from fxexpand.graph.layers import has_hooks
from fxexpand.graph.occurrences import edits_of
from fxexpand.graph.rewrite import Edit, ModuleStep, RecordStep, StructureStep, rewrite, source_of
from fxexpand.graph.trace import Limits, check_model, open_up
from fxexpand.graph.traced import copy_model
from fxexpand.regions.live_region import LiveRegion
from fxexpand.regions.reading import Lifts, check_lifts
from fxexpand.regions.shapes import Shapes, shapes_of
from fxexpand.regions.training import LeftAlone, LivePlan, StepCosts, plan_regions

_CHANGED = " Collapse before changing what is between the layers."


def collapse(model: nn.Module, *example_inputs: object, lifts: Lifts | None = None) -> nn.Module:
    """``model``, over the same parameters, with each linear region computed as the one layer that it makes up.

    Before:  y = conv.reduce(conv.kernel(conv.expand(x)))
    After:   y = conv(x), whose weight is composed of those of expand, kernel and reduce at each call

    Identity: W₃ * (W₂ * (W₁ * x)) = (W₃ ∘ W₂ ∘ W₁) * x. The ``state_dict`` keys, gradients and hyperparameters are the
    same, so an optimiser or a checkpoint of ``model`` fits the result, and the other way round. Training then costs
    nearly what the compact network costs: no wide activations are computed or kept.

    Every expansion is a region. So is what ``fuse`` would merge: chains and branches of layers written by hand, with
    batch norm and dropout as long as they are in eval mode. Layers stay under their paths, and take part with the
    parameters that they have at a call. When something is not as it was then (one of those is in training mode, a layer
    has hooks, is parametrized, or has been replaced), the region runs layer by layer at that call. Up to 24 layers in a
    row are one region. As in ``fuse``, ``BatchNorm1d`` after a ``Conv1d`` is taken to see batches.

    Composing costs the same whatever the batch, the explicit layers' cost grows with it. With ``example_inputs``, the
    arguments of ``model(...)`` as in training, each region takes the form that makes a step cheaper, by a model of
    multiply-accumulates and memory (see ``StepCost``); without them all expansions collapse, and the regions in which
    one layer needs no more multiply-accumulates. ``explain`` shows the costs.

    Composes in the dtype of the parameters with autocast off, and applies the result in autocast's, also where one of
    the branches of a region was computed in full precision; a composed weight has to fit the range of the parameters'
    dtype, which is narrow for float16, and has the memory format of the layers' weights. ``contract`` and ``fuse`` take
    the result as they take ``model``. An expansion stays as it is where something is between its layers, or where they
    have hooks. ``lifts={SomeModule: module -> Kernel}`` says what a module of the user's does, with the parameters that
    it has, differentiably.

    Raises ``ExpansionError`` when, without inputs, there is nothing in the model to collapse, and ``FxExpandError``
    when the model does not run on the inputs, or for ``lifts`` of another kind.
    """
    check_model(model, "collapse")
    check_lifts(lifts, "collapse")
    work = opened(model, lifts)
    expansions, regions = plan_training(work, shapes_of(work, example_inputs, "collapse"), lifts)
    planned = [entry.plan for entry in expansions if isinstance(entry.plan, _Plan)]
    reasons = [f"{entry.path}: {entry.plan}" for entry in expansions if isinstance(entry.plan, Refusal)]
    if not (example_inputs or planned or any(isinstance(region, LivePlan) for region in regions)):
        if reasons:
            changed = "" if all(TRAINING in reason for reason in reasons) else _CHANGED
            raise ExpansionError(f"{'; '.join(reasons)}.{changed}")
        raise ExpansionError(
            "collapse: expected a model with linear layers in a row, found no expanded layer and no region in it that "
            "one layer could compute. Expand it first; explain(model.train()) tells what is in the way."
        )
    for plan in planned:
        Collapsed.adopt(plan.expanded, plan.assembly)
    edits = [edit for plan in planned for edit in plan.edits]
    cheaper = [region for region in regions if isinstance(region, LivePlan) and region.refusal is None]
    rewrite([*edits, *map(_placed, cheaper)])
    return work


def uncollapse(model: nn.Module) -> nn.Module:
    """``model``, over the same parameters, with its collapsed regions computed layer by layer: undoes ``collapse``.

    Before:  y = conv(x)
    After:   y = conv.reduce(conv.kernel(conv.expand(x)))

    A model without collapsed regions comes back as a copy. Raises ``ExpansionError`` for what is no module.
    """
    check_model(model, "uncollapse")
    work = copy_model(model, share=True)
    release_all(work)
    return work


def opened(model: nn.Module, lifts: Lifts | None) -> nn.Module:
    """``model``, over the same parameters, with graphs, and with what has collapsed as explicit layers again."""
    work = open_up(copy_model(model, share=True), Limits(tuple(lifts or ())))
    release_all(work)
    return work


def release_all(work: nn.Module) -> None:
    """Make the collapsed regions of ``work`` explicit layers, in its graphs too; those with hooks are called as before.

    A hook that somebody has put on a collapsed expansion goes on running: graphs call the expansion as a whole.
    """
    release_regions(work)
    collapsed = [module for module in work.modules() if isinstance(module, Collapsed)]
    bare = [module for module in collapsed if not has_hooks(module)]
    edits = [_opened(gm, node, module) for module in bare for gm in _graphs(work) for node in _calls(gm, module)]
    for module in collapsed:
        module.release()
    rewrite(edits)


def release_regions(work: nn.Module) -> None:
    """The same for the regions that are no expansions; with hooks they stay."""
    called = [(gm, node, found) for gm in _graphs(work) for node, found in regions_of(gm) if not has_hooks(found)]
    rewrite(
        Edit(gm, (node,), (RecordStep(found.record, _held(node)),), source=_input(node)) for gm, node, found in called
    )
    for gm, node, _ in called:
        owner, _, name = str(node.target).rpartition(".")
        holder = gm.get_submodule(owner)
        vars(holder).pop(name, None)
        holder._modules.pop(name, None)


def regions_of(gm: fx.GraphModule) -> list[tuple[fx.Node, LiveRegion]]:
    """The regions that the graph calls, and the nodes that do."""
    calls = [(node, gm.get_submodule(str(node.target))) for node in gm.graph.nodes if node.op == "call_module"]
    return [(node, module) for node, module in calls if isinstance(module, LiveRegion)]


def _input(node: fx.Node) -> fx.Node:
    value = node.args[0]
    assert isinstance(value, fx.Node), "a region reads a value of the graph"
    return value


def _held(node: fx.Node) -> tuple[str, ...]:
    """The paths of what a region is composed of, as the node that calls it tells them."""
    return tuple(str(read.target) for read in node.args[1:] if isinstance(read, fx.Node))


@dataclass(frozen=True)
class _Plan:
    expanded: Expanded
    assembly: Assembly
    edits: tuple[Edit, ...]


@dataclass(frozen=True)
class PlannedExpansion:
    """The expansion at ``path``: how it collapses or why it does not; the costs, where example inputs tell them."""

    path: str
    plan: _Plan | Refusal
    costs: StepCosts | None


def plan_training(
    work: nn.Module, shapes: Shapes, lifts: Lifts | None
) -> tuple[list[PlannedExpansion], list[LivePlan | LeftAlone]]:
    """What can run as one layer in ``work``: its expansions, and the other regions of its graphs."""
    expansions = [_plan(path, work, module, shapes) for path, module in outermost(work)]
    return expansions, list(plan_regions(work, shapes, lifts or {}))


def _plan(path: str, work: nn.Module, expanded: Expanded, shapes: Shapes) -> PlannedExpansion:
    """How ``expanded`` is called as one layer in all graphs of ``work``, or why it stays as it is."""
    if has_hooks(expanded):
        return PlannedExpansion(path, Refusal("it has forward or backward hooks"), None)
    assembly = expanded.assembly()
    if isinstance(assembly, Refusal):
        return PlannedExpansion(path, assembly, None)
    edits: list[Edit] = []
    for gm in _graphs(work):
        for found in edits_of(gm, expanded, ModuleStep):
            if isinstance(found, Refusal):
                return PlannedExpansion(path, found, None)
            edits.append(found)
    sources = [source_of(edit.nodes[0]) for edit in edits]
    costs = _costs(assembly, [shapes[source] for source in sources if source in shapes])
    refusal = None if costs is None else costs.dearer
    return PlannedExpansion(path, refusal or _Plan(expanded, assembly, tuple(edits)), costs)


def _costs(assembly: Assembly, inputs: list[tuple[int, ...]]) -> StepCosts | None:
    """What a step costs for inputs of these shapes; None without any."""
    total = StepCosts(StepCost(), StepCost())
    d = assembly.like.dims
    for shape in inputs:
        batch = prod(shape[:-1]) if d == 0 else prod(shape[: -d - 1])
        total += StepCosts(*Collapsed.step_costs(assembly, shape[len(shape) - d :] if d else (), batch))
    return total if inputs else None


def _placed(plan: LivePlan) -> Edit:
    """Give the region a name in the graph module; the edit that calls it with what it is composed of."""
    gm, stretch = plan.reading.gm, plan.merge.stretch
    name = f"collapsed_{stretch.last.name}"
    while hasattr(gm, name):
        name += "_"
    if isinstance(gm, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        vars(gm)[name] = plan.region  # a child would be one of its layers
    else:
        gm.add_module(name, plan.region)
    step = ModuleStep(name, plan.region.record.paths)
    return Edit(gm, stretch.nodes, (step,), source=stretch.source, constants=plan.constants)


def _opened(gm: fx.GraphModule, node: fx.Node, expanded: Expanded) -> Edit:
    """The edit that calls the layers of ``expanded`` where ``node`` calls it."""
    return Edit(gm, (node,), (StructureStep(str(node.target), expanded),))


def _graphs(work: nn.Module) -> list[fx.GraphModule]:
    return [module for module in work.modules() if isinstance(module, fx.GraphModule)]


def _calls(gm: fx.GraphModule, module: nn.Module) -> list[fx.Node]:
    nodes = [node for node in gm.graph.nodes if node.op == "call_module"]
    return [node for node in nodes if gm.get_submodule(str(node.target)) is module]
