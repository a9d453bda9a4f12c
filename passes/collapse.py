"""collapse: expansions run as one layer each; uncollapse: layer by layer again."""

from __future__ import annotations

from torch import fx, nn

from fxexpand.algebra.refusal import Refusal
from fxexpand.errors import ExpansionError
from fxexpand.graph.chains import edits_of
from fxexpand.graph.collapsed import Collapsed
from fxexpand.graph.expanded import Expanded
from fxexpand.graph.layers import has_hooks
from fxexpand.graph.rewrite import Edit, ModuleStep, rewrite
from fxexpand.graph.trace import check_model
from fxexpand.graph.traced import copy_model


def collapse(model: nn.Module) -> nn.Module:
    """``model``, over the same parameters, with each expansion computed as the one layer that it makes up.

    Before:  y = conv.reduce(conv.kernel(conv.expand(x)))
    After:   y = conv(x), whose weight is composed of those of expand, kernel and reduce at each call

    Identity: W₃ * (W₂ * (W₁ * x)) = (W₃ ∘ W₂ ∘ W₁) * x. The ``state_dict`` keys, gradients and hyperparameters are the
    same, so an optimiser or a checkpoint of ``model`` fits the result, and the other way round. Training then costs
    nearly what the compact network costs: no wide activations are computed or kept.

    Composes in the dtype of the parameters with autocast off, and applies the result in autocast's. ``contract`` and
    ``fuse`` take the result as they take ``model``. An expansion stays as it is where something is between its layers,
    or where they have hooks.

    Raises ``ExpansionError`` when nothing in the model was expanded, or nothing that was can be collapsed.
    """
    check_model(model, "collapse")
    work = copy_model(model, share=True)
    found = [module for module in work.modules() if isinstance(module, Expanded)]
    if not found:
        raise ExpansionError(
            "collapse: expected a model that fxexpand.expand has made, found no expanded layer in it. Expand it first."
        )
    inner = {id(child) for module in found for child in module.modules() if child is not module}
    reasons: list[str] = []
    for path, module in work.named_modules():
        if isinstance(module, Expanded) and not isinstance(module, Collapsed) and id(module) not in inner:
            refusal = _collapse(work, module)
            if refusal is not None:
                reasons.append(f"{path}: {refusal}")
    if not any(isinstance(module, Collapsed) for module in found):
        raise ExpansionError(f"{'; '.join(reasons)}. Collapse before changing what is between the layers.")
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


def _collapse(work: nn.Module, expanded: Expanded) -> Refusal | None:
    """Make ``expanded`` run as one layer in all graphs of ``work``: why that is not possible, or None where it is."""
    if has_hooks(expanded):
        return Refusal("it has forward or backward hooks")
    refusal = Collapsed.refusal(expanded)
    if refusal is not None:
        return refusal
    edits: list[Edit] = []
    for gm in _graphs(work):
        for found in edits_of(gm, expanded, ModuleStep):
            if isinstance(found, Refusal):
                return found
            edits.append(found)
    Collapsed.adopt(expanded)
    rewrite(edits)
    return None


def _opened(gm: fx.GraphModule, node: fx.Node, expanded: Expanded) -> Edit:
    """The edit that calls the layers of ``expanded`` where ``node`` calls it."""
    return Edit(gm, (node,), tuple(ModuleStep(f"{node.target}.{path}") for path, _ in expanded.in_turn()))


def _graphs(work: nn.Module) -> list[fx.GraphModule]:
    return [module for module in work.modules() if isinstance(module, fx.GraphModule)]


def _calls(gm: fx.GraphModule, module: nn.Module) -> list[fx.Node]:
    nodes = [node for node in gm.graph.nodes if node.op == "call_module"]
    return [node for node in nodes if gm.get_submodule(str(node.target)) is module]
