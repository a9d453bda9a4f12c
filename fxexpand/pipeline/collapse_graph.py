"""The linear regions of a captured graph, composed in the graph: by nodes, of the weights that it is called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.proxy import GraphAppendingTracer, Proxy

from fxexpand.algebra.memory_format import in_format, memory_format_of
from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.modes import exact_products
from fxexpand.graph.rewrite import Edit, EmitStep, rewrite
from fxexpand.pipeline.lifted import LiftedWeights, noted
from fxexpand.regions.live_region import LiveRegion
from fxexpand.regions.training import LivePlan, plan_regions


def collapse_graph(gm: fx.GraphModule) -> fx.GraphModule | None:
    """``gm`` with each linear region as one layer, where that makes a step cheaper; None where there is none.

    Before:  y = conv2d(conv2d(x, w₁), w₂)
    After:   w = w₂ ∘ w₁; y = conv2d(x, w)

    ``gm`` is a graph of functions of torch, with the weights among its inputs and a note of each value, as Dynamo
    hands to a backend. The inputs stay what they were, in their order. Nothing of a weight is looked at but its shape,
    strides, dtype and device: the nodes compose it at each call, differentiably, with autocast off. Extents that vary
    stay so. What switches autocast or gradients ends a region.
    """
    lifted = LiftedWeights.of(gm)
    plans = [plan for plan in plan_regions(lifted.view, lifted.shapes, {}) if isinstance(plan, LivePlan)]
    cast = _is_cast(lifted.view)
    edits = [edit for plan in plans if plan.refusal is None and (edit := _edit(lifted, plan, cast=cast)) is not None]
    if not edits:
        return None
    rewrite(edits)
    return lifted.lowered()


def _edit(lifted: LiftedWeights, plan: LivePlan, *, cast: bool) -> Edit | None:
    """The nodes that stand for the region; None where that cannot be said without running it."""
    region, nodes = plan.region, plan.nodes
    device = _device(lifted, region)
    if device is None or not (_is_undisturbed(lifted, plan) and _gives_what_a_layer_gives(lifted, plan)):
        return None
    held = [getattr(lifted.view, path) for path in region.record.paths]
    composing = _traced(region, held, device)
    if composing is None or not _keeps_the_memory_format(lifted, plan, held, device):
        return None

    def emit(graph: fx.Graph, value: fx.Node) -> list[fx.Node]:
        made: list[fx.Node] = []
        if cast:
            made.append(graph.call_function(_enter_autocast, (device.type, None, False, None)))
        weights = [graph.get_attr(path) for path in region.record.paths]
        inner, (weight, bias) = _inlined(graph, composing, weights)
        made += inner
        if cast:
            made.append(graph.call_function(_exit_autocast, (made[0],)))
        tracer = GraphAppendingTracer(graph)
        numbers = (None if node is None else Proxy(node, tracer) for node in (weight, bias))
        applied: Any = region.like.apply_with(Proxy(value, tracer), *numbers)  # type: ignore[arg-type]
        return [*made, applied.node]

    return Edit(plan.gm, nodes, (EmitStep(emit),), source=plan.merge.stretch.source, constants=plan.constants)


def _is_undisturbed(lifted: LiftedWeights, plan: LivePlan) -> bool:
    """Whether the layers of a region may as well run where the first of them does.

    What is written in between to an input of the graph is perhaps written to another one, weights among them: whether
    inputs share memory may differ from call to call.
    """
    order, (first, last) = plan.reading.effects.order, (plan.nodes[0], plan.nodes[-1])
    between = (node for node in lifted.view.graph.nodes if order[first] < order[node] < order[last])
    return plan.reading.effects.outer_change_between(first, last) is None and not any(map(_switches, between))


def _gives_what_a_layer_gives(lifted: LiftedWeights, plan: LivePlan) -> bool:
    """Whether one layer gives a value of the same dtype, from an input with the same axes.

    Under autocast, layers give bfloat16, and what is added to it beside them may be float32.
    """
    dtypes, shape = lifted.shapes.dtypes, lifted.shapes.get(plan.merge.stretch.source)
    if plan.region.rank is not None and (shape is None or len(shape) != plan.region.rank):
        return False
    layers = {dtypes.get(node) for node in plan.nodes if plan.reading.is_layer(node)}
    return layers == {dtypes.get(plan.nodes[-1])}


def _keeps_the_memory_format(lifted: LiftedWeights, plan: LivePlan, held: list[Tensor], device: torch.device) -> bool:
    """Whether the output of one layer is laid out as the last one's is: who reads it may take a view of it."""
    layouts = [lifted.layout_of(node) for node in (plan.merge.stretch.source, plan.nodes[-1])]
    like, wanted = plan.region.like, plan.region.memory_format(held)
    kind: Any = {"dtype": held[0].dtype, "device": device}  # both decide which format an operation gives
    with exact_products(device.type), torch._subclasses.FakeTensorMode(), torch.no_grad():
        given = [torch.empty_strided(*layout, **kind) for layout in layouts if layout is not None]
        if len(given) < len(layouts):
            return False
        weight = in_format(torch.empty(like.kernel.weight.shape, **kind), wanted)
        return memory_format_of(like.apply_with(given[0], weight, None)) is memory_format_of(given[1])


def _device(lifted: LiftedWeights, region: LiveRegion) -> torch.device | None:
    """Where the weights of the region are; None where they are at several places, or are no inputs."""
    if not all(path in lifted.names for path in region.record.paths):
        return None
    devices = {lifted.device_of(path) for path in region.record.paths}
    return devices.pop() if len(devices) == 1 else None


def _traced(region: LiveRegion, held: list[Tensor], device: torch.device) -> fx.GraphModule | None:
    """The composition of ``region``, as a graph of plain operations on ``held``.

    None where its layers form no one layer, or where it needs numbers that are no weights of theirs.
    """

    def compose(*weights: Tensor) -> Any:
        numbers = region.composed(weights)
        if isinstance(numbers, Refusal):
            return None, None
        return in_format(numbers[0], region.memory_format(weights)), numbers[1]

    # Numbers that are no weights are tensors of ours: the graph would hold them, and is then not used.
    fake = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with exact_products(device.type), fake, torch.no_grad():
        fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device) for t in held]
        found: fx.GraphModule = make_fx(compose, pre_dispatch=True)(*fakes)
    output = next(node for node in found.graph.nodes if node.op == "output")
    fixed = any(node.op in ("get_attr", "call_module") for node in found.graph.nodes)
    return None if fixed or output.args[0][0] is None else found


def _inlined(
    graph: fx.Graph, composing: fx.GraphModule, weights: list[fx.Node]
) -> tuple[list[fx.Node], tuple[fx.Node, fx.Node | None]]:
    """The nodes of ``composing`` put into ``graph``, to read ``weights``; and those that give weight and bias."""
    places = iter(weights)
    seen: dict[fx.Node, fx.Node] = {}
    made: list[fx.Node] = []
    for node in composing.graph.nodes:
        if node.op == "placeholder":
            seen[node] = next(places)
        elif node.op != "output":
            seen[node] = graph.node_copy(node, seen.__getitem__)
            made.append(seen[node])
    result = next(node for node in composing.graph.nodes if node.op == "output").args[0]
    weight, bias = (None if node is None else seen[node] for node in result)
    assert weight is not None, "traced as one layer"
    return made, (weight, bias)


def _switches(node: fx.Node) -> bool:
    """Whether ``node`` may switch a mode, such as autocast or gradients: a call for its effect alone."""
    if node.op != "call_function" or isinstance(noted(node), (Tensor, torch.SymInt, int, float, tuple, list)):
        return False
    return all(_switches(source) for source in node.all_input_nodes)


def _is_cast(gm: fx.GraphModule) -> bool:
    """Whether autocast may be on where the graph runs, so that composing has to switch it off."""
    return torch._C._is_any_autocast_enabled() or any(node.target is _enter_autocast for node in gm.graph.nodes)
