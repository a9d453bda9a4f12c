"""counterpart: an expanded model with activations between its new layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import fx, nn

from fxexpand.algebra.refusal import Refusal
from fxexpand.errors import ExpansionError
from fxexpand.graph.activation import Activation, check_activation, make_activation
from fxexpand.graph.counterpart import Counterpart, Place, places
from fxexpand.graph.expanded import Expanded, outermost, strays
from fxexpand.graph.occurrences import edits_of
from fxexpand.graph.rewrite import Edit, StructureStep, rewrite
from fxexpand.graph.structure import Series, Sum
from fxexpand.graph.trace import check_model
from fxexpand.graph.traced import copy_model
from fxexpand.passes.collapse import release_all


def counterpart(model: nn.Module, activation: Activation = nn.ReLU) -> nn.Module:
    """A copy of an expanded model with an activation between each pair of the new layers of each expansion.

    Before:  y = conv.reduce(conv.kernel(conv.expand(x)))
    After:   y = conv.reduce(σ(conv.kernel(σ(conv.expand(x)))))

    The "+Init" of Guo et al. 2020 (§4): train this one like any model, then ``transfer`` its weights to the linear one,
    and train that. It starts with the weights that ``model`` has, under the same ``state_dict`` keys.

    An activation follows each layer of a chain but the last: after the layer's batch norm, before a pad or a pool. In
    expansions with branches it does so inside those that are chains; nothing comes between the branches and their sum.
    In an expansion that was expanded again (``CL(4).then(...)``), it does so between the outer layers and inside. Every
    convolution is a layer, the scales of ``Orepa`` too. Where there are no two layers in a row in the whole model, as
    with ``RepVGG`` alone, a warning says so: then the result computes what ``model`` computes.

    ``activation`` is a class, or a function without arguments, called for each place; a module is copied for each. One
    that has parameters (``nn.PReLU``) brings keys of its own, ``conv.expand_activation.weight``: ``transfer`` leaves
    these behind, as it does the activations. A collapsed ``model`` is taken layer by layer. ``contract`` refuses the
    result: it has no expansion.

    Raises ``ExpansionError`` when nothing in ``model`` was expanded, or something stands between the layers of an
    expansion already; and for an ``activation`` that is none: no module, a layer, a module that does not keep the shape
    of a signal, or a linear one.
    """
    check_model(model, "counterpart")
    check_activation(activation, "counterpart")
    _check_expanded(model)
    work = copy_model(model, share=False)
    release_all(work)
    found = {path: module for path, module in work.named_modules() if isinstance(module, Expanded)}
    edits = [edit for path, module in outermost(work) for edit in _edits(work, path, module)]
    made = [(module, _activations(path, module, activation)) for path, module in found.items()]
    if not any(activations for _, activations in made):
        warnings.warn(
            "counterpart: no expansion has two layers in a row to put an activation between, so the result computes "
            "what the model computes. Expand with CL, CK, FC or Overparam, or with one of them .then(...)",
            UserWarning,
            stacklevel=2,
        )
    for module, activations in made:
        Counterpart.adopt(module, activations)
    rewrite(edits)
    return work


def _check_expanded(model: nn.Module) -> None:
    if stray := strays(model):
        raise ExpansionError(
            f"{stray[0]}: a layer of an expansion, found outside of one: another pass has kept only what its graph "
            "calls (torch.fx.symbolic_trace and Transformer do). Make the counterpart before it."
        )
    if any(isinstance(module, Expanded) for module in model.modules()):
        return
    already = next((path for path, module in model.named_modules() if isinstance(module, Counterpart)), None)
    if already is not None:
        raise ExpansionError(
            f"{already or 'the model'}: it is a nonlinear counterpart already. Pass the expanded model."
        )
    raise ExpansionError(
        "counterpart: expected a model that fxexpand.expand has made, found no expanded layer in it. Expand it first."
    )


def _edits(work: nn.Module, path: str, expanded: Expanded) -> Iterator[Edit]:
    """The edits that call the layers of ``expanded`` anew, wherever graphs of ``work`` call them one by one."""

    def step(target: str) -> StructureStep:
        return StructureStep(target, expanded)

    for gm in work.modules():
        if isinstance(gm, fx.GraphModule):
            for found in edits_of(gm, expanded, step):
                if isinstance(found, Refusal):
                    raise ExpansionError(f"{path}: {found}. Undo the change, or make the counterpart before it.")
                if not _calls(gm, found.nodes, expanded):
                    yield found


def _calls(gm: fx.GraphModule, nodes: tuple[fx.Node, ...], expanded: Expanded) -> bool:
    """Whether ``nodes`` call ``expanded`` as a whole, as they will its counterpart."""
    return len(nodes) == 1 and gm.get_submodule(str(nodes[0].target)) is expanded


def _activations(path: str, expanded: Expanded, activation: Activation) -> list[tuple[Place, nn.Module]]:
    assert isinstance(expanded, (Series, Sum)), "an expansion is one of them"
    like, dims = next(expanded.parameters()), expanded.origin.geometry.dims
    found: list[tuple[Place, nn.Module]] = []
    for place in places(expanded):
        where = f"{path}.{place.path}".lstrip(".")
        made = make_activation(activation, where, place.channels, dims)
        found.append((place, made.to(device=like.device, dtype=like.dtype).train(expanded.training)))
    return found
