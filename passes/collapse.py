"""collapse: expansions run as one layer each; uncollapse: layer by layer again."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import fx, nn

from fxexpand.algebra.order import Order
from fxexpand.algebra.refusal import Refusal
from fxexpand.algebra.step_cost import StepCost
from fxexpand.errors import ExpansionError
from fxexpand.graph.chains import edits_of
from fxexpand.graph.collapsed import Collapsed
from fxexpand.graph.expanded import Expanded
from fxexpand.graph.layers import has_hooks
from fxexpand.graph.rewrite import Edit, ModuleStep, rewrite, source_of
from fxexpand.graph.trace import check_model
from fxexpand.graph.traced import copy_model
from fxexpand.regions.shapes import Shapes, shapes_of


def collapse(model: nn.Module, *example_inputs: object) -> nn.Module:
    """``model``, over the same parameters, with each expansion computed as the one layer that it makes up.

    Before:  y = conv.reduce(conv.kernel(conv.expand(x)))
    After:   y = conv(x), whose weight is composed of those of expand, kernel and reduce at each call

    Identity: W₃ * (W₂ * (W₁ * x)) = (W₃ ∘ W₂ ∘ W₁) * x. The ``state_dict`` keys, gradients and hyperparameters are the
    same, so an optimiser or a checkpoint of ``model`` fits the result, and the other way round. Training then costs
    nearly what the compact network costs: no wide activations are computed or kept.

    Composing costs the same whatever the batch, the explicit layers' cost grows with it. With ``example_inputs``, the
    arguments of ``model(...)`` as in training, each expansion takes the form that makes a step cheaper, by a model of
    multiply-accumulates and memory (see ``StepCost``); without them all collapse.

    Composes in the dtype of the parameters with autocast off, and applies the result in autocast's. ``contract`` and
    ``fuse`` take the result as they take ``model``. An expansion stays as it is where something is between its layers,
    or where they have hooks.

    Raises ``ExpansionError`` when nothing in the model was expanded, or nothing that was can be collapsed, and
    ``FxExpandError`` when the model does not run on the inputs.
    """
    check_model(model, "collapse")
    work = copy_model(model, share=True)
    found = [module for module in work.modules() if isinstance(module, Expanded)]
    if not found:
        raise ExpansionError(
            "collapse: expected a model that fxexpand.expand has made, found no expanded layer in it. Expand it first."
        )
    shapes = shapes_of(work, example_inputs, "collapse")
    inner = {id(child) for module in found for child in module.modules() if child is not module}
    reasons: list[str] = []
    planned: list[_Plan] = []
    for path, module in work.named_modules():
        if isinstance(module, Expanded) and not isinstance(module, Collapsed) and id(module) not in inner:
            plan = _plan(work, module, shapes)
            if isinstance(plan, Refusal):
                reasons.append(f"{path}: {plan}")
            else:
                planned.append(plan)
    if reasons and not (example_inputs or planned):
        raise ExpansionError(f"{'; '.join(reasons)}. Collapse before changing what is between the layers.")
    for plan in planned:
        Collapsed.adopt(plan.expanded, plan.order)
    rewrite(edit for plan in planned for edit in plan.edits)
    return work


def uncollapse(model: nn.Module) -> nn.Module:
    """``model``, over the same parameters, with its collapsed expansions computed layer by layer: undoes ``collapse``.

    Before:  y = conv(x)
    After:   y = conv.reduce(conv.kernel(conv.expand(x)))

    A model without collapsed expansions comes back as a copy. Raises ``ExpansionError`` for what is no module.
    """
    check_model(model, "uncollapse")
    work = copy_model(model, share=True)
    release_all(work)
    return work


def release_all(work: nn.Module) -> None:
    """Make the collapsed expansions of ``work`` explicit layers, in its graphs too."""
    edits: list[Edit] = []
    for module in work.modules():
        if isinstance(module, Collapsed):
            for gm in _graphs(work):
                edits += [_opened(gm, node, module) for node in _calls(gm, module)]
    for module in list(work.modules()):
        if isinstance(module, Collapsed):
            module.release()
    rewrite(edits)


@dataclass(frozen=True)
class _Plan:
    expanded: Expanded
    order: Order
    edits: tuple[Edit, ...]


def _plan(work: nn.Module, expanded: Expanded, shapes: Shapes) -> _Plan | Refusal:
    """How ``expanded`` is called as one layer in all graphs of ``work``, or why it stays as it is."""
    if has_hooks(expanded):
        return Refusal("it has forward or backward hooks")
    order = Collapsed.order_of(expanded)
    if isinstance(order, Refusal):
        return order
    edits: list[Edit] = []
    for gm in _graphs(work):
        for found in edits_of(gm, expanded, ModuleStep):
            if isinstance(found, Refusal):
                return found
            edits.append(found)
    sources = [source_of(edit.nodes[0]) for edit in edits]
    refusal = _dearer(expanded, order, [shapes[source] for source in sources if source in shapes])
    return refusal or _Plan(expanded, order, tuple(edits))


def _dearer(expanded: Expanded, order: Order, inputs: list[tuple[int, ...]]) -> Refusal | None:
    """Whether composing costs more than it saves, for inputs of these shapes; without any it is taken to save."""
    explicit, collapsed = StepCost(), StepCost()
    d = expanded.origin.geometry.dims
    for shape in inputs:
        batch = prod(shape[:-1]) if d == 0 else prod(shape[: -d - 1])
        costs = Collapsed.step_costs(expanded, order, shape[len(shape) - d :] if d else (), batch)
        explicit, collapsed = explicit + costs[0], collapsed + costs[1]
    if collapsed.total <= explicit.total:
        return None
    return Refusal(f"a step would take {collapsed.total / explicit.total:.1f} times as long as layer by layer")


def _opened(gm: fx.GraphModule, node: fx.Node, expanded: Expanded) -> Edit:
    """The edit that calls the layers of ``expanded`` where ``node`` calls it."""
    return Edit(gm, (node,), tuple(ModuleStep(f"{node.target}.{path}") for path, _ in expanded.in_turn()))


def _graphs(work: nn.Module) -> list[fx.GraphModule]:
    return [module for module in work.modules() if isinstance(module, fx.GraphModule)]


def _calls(gm: fx.GraphModule, module: nn.Module) -> list[fx.Node]:
    nodes = [node for node in gm.graph.nodes if node.op == "call_module"]
    return [node for node in nodes if gm.get_submodule(str(node.target)) is module]
