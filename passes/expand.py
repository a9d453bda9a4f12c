"""expand: layers become chains of layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

from torch import Tensor, fx, nn

from fxexpand.algebra.memory_format import memory_format_of
from fxexpand.algebra.refusal import Refusal
from fxexpand.errors import ExpansionError
from fxexpand.graph.expanded import BRANCHES, PAD, CallOrigin, Expanded, LayerOrigin
from fxexpand.graph.find import find_sites, layer_site
from fxexpand.graph.geometry import DIMS
from fxexpand.graph.lift import pad_module
from fxexpand.graph.rewrite import Edit, StructureStep, rewrite
from fxexpand.graph.site import Call, Site
from fxexpand.graph.structure import Series, Sum, entrances, leaves
from fxexpand.graph.trace import Limits, check_model, open_up
from fxexpand.graph.traced import copy_model
from fxexpand.graph.tree import parameter_owners, replace_modules
from fxexpand.manifests import Entry, check_plain, check_rebuilt, fitting, read_manifest
from fxexpand.passes.collapse import release_all
from fxexpand.rules import Rule, as_rules, match
from fxexpand.strategies.checks import check_layers, check_product
from fxexpand.strategies.fill import body, fill
from fxexpand.strategies.strategy import Strategy

Init: TypeAlias = "str | Callable[[Site, Mapping[str, nn.Module]], object]"


def expand(
    model: nn.Module,
    rules: Rule | Strategy | Sequence[Rule | Strategy] | Mapping[str, Any],
    *,
    init: Init = "preserve",
    inplace: bool = False,
) -> nn.Module:
    """``model`` with each layer that a rule matches replaced by the layers of its strategy, to be trained.

    Before:  y = features_0(x)
    After:   y = features_0.reduce(features_0.kernel(features_0.expand(x)))      for CL

    The first rule that matches a layer wins; layers that none matches stay. The new layers live under the path of the
    old one, with its dtype, device, memory format, ``requires_grad`` and train/eval flag. A layer that is used at
    several places is expanded once. ``contract`` is the inverse.

    A ``manifest(model)`` in place of rules rebuilds what it lists, on the model as it was before: the same modules and
    ``state_dict`` keys, also of expansions inside others. If it does not fit, the error says where.

    ``init="preserve"`` keeps the function exactly; ``"standard"`` leaves each new layer its class's own fresh
    initialisation (Guo et al. 2020, §4); a callable ``(site, layers) -> None`` does what it likes.

    The result is a copy. With ``inplace=True`` nothing is copied: a ``GraphModule`` is itself rewritten and returned;
    of any other model, the result shares the parameters of the layers that stay. If an error is raised, ``model`` is as
    it was.

    Raises ``RuleError`` when no rule matches any layer, or a ``where`` is in vain: no ``Rule`` that has it matches any;
    also for a manifest that is none, or does not fit the model;
    ``ExpansionError`` for a layer that a rule matches but that cannot be expanded as asked.
    """
    levels = read_manifest(rules) if isinstance(rules, Mapping) else None
    checked = as_rules(rules) if levels is None else []
    check_model(model, "expand")
    check_init(init)
    work = opened_copy(model, share=inplace)
    if levels is None:
        result = expand_sites(work, [(site, rule.strategy) for site, rule in match(find_sites(work), checked)], init)
    else:
        result = _rebuilt(work, levels, init)
    return _become(model, result) if inplace and isinstance(model, fx.GraphModule) else result


def check_init(init: Init) -> None:
    """Raise ``ExpansionError`` for what is no way to initialise the new layers."""
    if not (callable(init) or init in ("preserve", "standard")):
        raise ExpansionError(f"init: expected 'preserve', 'standard' or a function (site, layers), found {init!r}.")


def opened_copy(model: nn.Module, *, share: bool) -> nn.Module:
    """A copy of ``model``, with ``share`` over the same tensors, with graphs and without collapsed regions."""
    work = open_up(_copied(model, share=share), Limits())
    release_all(work)
    return work


def expand_sites(work: nn.Module, chosen: Sequence[tuple[Site, Strategy]], init: Init) -> nn.Module:
    """``work`` itself, or what stands in its place, with these layers of it expanded."""
    plans = [_plan(site, strategy, init) for site, strategy in chosen]
    inexact = "; ".join(plan.inexact for plan in plans if plan.inexact)
    if inexact:
        warnings.warn(f"expand: {inexact}", UserWarning, stacklevel=3)
    return _install(work, plans)


def _rebuilt(work: nn.Module, levels: Sequence[Sequence[Entry]], init: Init) -> nn.Module:
    """``work``, expanded as a manifest says. Expansions inside others are made once those are there."""
    check_plain(work)
    for entries in levels:
        work = expand_sites(work, fitting(work, entries), init)
    check_rebuilt(work, levels)
    return work


@dataclass(frozen=True)
class _Plan:
    site: Site
    expanded: Expanded
    inexact: str


def _copied(model: nn.Module, *, share: bool) -> nn.Module:
    try:
        return copy_model(model, share=share)
    except Exception as error:  # an attribute of the user's, with a __deepcopy__ or __reduce__ of its own
        raise ExpansionError(
            f"expand: the model cannot be copied ({type(error).__name__}: {error}). Make copy.deepcopy(model) work, "
            "for instance by leaving out of the model what it need not own."
        ) from error


def _plan(site: Site, strategy: Strategy, init: Init) -> _Plan:
    """The expansion of one site, with its weights; changes nothing. Raises ``ExpansionError``."""
    if site.refusal is not None:
        raise ExpansionError(f"{site}: {site.refusal.reason}. Or exclude it with {_exclusion(site)}.")
    expanded = _expansion(site, strategy)
    expanded.eval()  # batch norm has a kernel then; the flags of the old layer are carried over below
    _check_geometry(site, strategy, expanded)
    if callable(init):
        init(site, {name: part for name, part in body(expanded)._modules.items() if name != PAD})
    inexact = _preserve(site, strategy, expanded) if init == "preserve" else ""
    _carry_over(site, expanded)
    return _Plan(site, expanded, inexact)


def _expansion(site: Site, strategy: Strategy, whole: Site | None = None) -> Expanded:
    """The layers of ``strategy`` for ``site``, freshly initialised. Raises ``ExpansionError``.

    ``whole`` is the layer of the model that ``site`` is a part of, itself by default: what a rule can exclude.
    """
    first, *later = strategy.stages
    expanded = _first_expansion(site, first, whole or site)
    for stage in later:
        _expand_again(site, expanded, stage, whole or site)
    return expanded


def _first_expansion(site: Site, strategy: Strategy, whole: Site) -> Expanded:
    # A strategy sees padding that its layers can express; any other goes before them as a module.
    seen = site if site.geometry.symmetric else replace(site, geometry=_unpadded(site))
    layers = strategy.layers(seen)
    if isinstance(layers, Sum) and seen is site and site.geometry.padded and site.padding_mode != "zeros":
        seen = replace(site, geometry=_unpadded(site))
        layers = strategy.layers(seen)
    if isinstance(layers, Refusal):
        raise ExpansionError(f"{site}: {layers.reason}, or exclude it with {_exclusion(whole)}.")
    check_layers(site, strategy, layers)
    structure = layers if isinstance(layers, Sum) else Series(layers)
    if seen is not site:
        parts = {BRANCHES: structure} if isinstance(structure, Sum) else structure._modules
        structure = Series({PAD: pad_module(site.padding_mode, site.padding), **cast(Any, parts)})
    return Expanded.of(structure, _origin(site), strategy)


def _expand_again(site: Site, expanded: Expanded, strategy: Strategy, whole: Site) -> None:
    """Put expansions in the place of those layers of ``expanded`` that ``strategy`` reaches."""
    entered = set(map(id, entrances(expanded))) if site.reads_input else set()
    inner = [
        layer_site(layer, f"{site.path}.{path}".lstrip("."), reads_input=id(layer) in entered, expanded=True)
        for path, layer in leaves(expanded)
        if isinstance(layer, tuple(DIMS))
    ]
    reached = [found for found in inner if found.dims in strategy.dims and strategy.reaches(found)]
    if not reached:
        raise ExpansionError(
            f"{site}: {strategy} reaches none of the layers that it was to expand again: {', '.join(map(str, inner))}. "
            f"Choose another strategy, or exclude it with {_exclusion(whole)}."
        )
    replace_modules(expanded, {id(found.module): _expansion(found, strategy, whole) for found in reached})


def _unpadded(site: Site) -> Any:
    return replace(site.geometry, padding=((0, 0),) * site.dims, padding_mode="zeros")


def _exclusion(site: Site) -> str:
    return f'where=~layer(name="{site.path}")'


def _origin(site: Site) -> LayerOrigin | CallOrigin:
    if site.module is not None:
        return LayerOrigin.of(site.module, site.geometry, feeds_norm=site.feeds_norm)
    call = site.calls[0]
    given = dict(zip(("input", "weight", "bias"), call.node.args, strict=False)) | dict(call.node.kwargs)
    names = ("stride", "padding", "dilation", "groups") if site.dims else ()
    settings = dict(zip(names, call.node.args[3:], strict=False)) | {k: v for k, v in given.items() if k in names}
    bias = cast("fx.Node | None", given.get("bias"))
    owner = call.graph_module.get_submodule(str(cast(fx.Node, given["weight"]).target).rpartition(".")[0])
    return CallOrigin(
        geometry=site.geometry,
        function=site.function,
        bias=None if bias is None else str(bias.target).rpartition(".")[2],
        settings=tuple(settings.items()),
        parameters=tuple(owner._parameters),
        feeds_norm=site.feeds_norm,
    )


def _check_geometry(site: Site, strategy: Strategy, expanded: Expanded) -> None:
    assembly = expanded.assembly()
    if isinstance(assembly, Refusal):
        reason = f"the layers of {strategy} do not make up this one: {assembly}. Mend its layers()"
        raise ExpansionError(f"{site}: {reason}.")


def _preserve(site: Site, strategy: Strategy, expanded: Expanded) -> str:
    """Give the layers weights that make up the weight of ``site``, computed in float64 and cast once.

    Returns what there is to say of them: how far they are from the layer, where its strategy does not keep it.
    """
    weight, bias = cast(Tensor, site.weight), site.bias
    if weight.is_meta:  # there are no values to keep
        return ""
    if not all(bool(t.isfinite().all()) for t in (weight, bias) if t is not None):
        raise ExpansionError(f"{site}: its weight or bias holds NaN or infinity; mend it, or use init='standard'.")
    refusal = fill(expanded, weight, bias)
    if refusal is not None:
        raise ExpansionError(
            f"{site}: {strategy} cannot keep the function: {refusal}. Or use init='standard', "
            f"or exclude it with {_exclusion(site)}."
        )
    return check_product(site, strategy, expanded)


def _carry_over(site: Site, expanded: Expanded) -> None:
    """Give the new layers the flags and the memory format of the old one, and keep what else it held."""
    weight = cast(Tensor, site.weight)
    for name, parameter in expanded.named_parameters():
        old = site.bias if name.endswith(".bias") and site.bias is not None else weight
        parameter.requires_grad_(old.requires_grad and parameter.requires_grad)
    expanded.to(memory_format=memory_format_of(weight))
    if site.module is not None:
        expanded.train(site.module.training)
        held = {name: p for name, p in site.module._parameters.items() if name not in ("weight", "bias")}
        expanded._parameters.update(held)
        expanded._buffers.update(site.module._buffers)
        expanded._non_persistent_buffers_set = set(site.module._non_persistent_buffers_set)


def _install(work: nn.Module, plans: Sequence[_Plan]) -> nn.Module:
    """Put the expansions in place, in the modules and in the graphs of ``work``."""
    owners = parameter_owners(work)
    for plan in plans:
        if plan.site.module is None:
            _replace_parameters(plan, owners)
    new = {id(plan.site.module): plan.expanded for plan in plans if plan.site.module is not None}
    replace_modules(work, new)
    rewrite(_edit(call, plan) for plan in plans for call in plan.site.calls)
    return new.get(id(work), work)


def _replace_parameters(plan: _Plan, owners: dict[int, list[tuple[nn.Module, str]]]) -> None:
    for owner, name in owners[id(plan.site.weight)]:
        del owner._parameters[name]
        owner.add_module(name, plan.expanded)
        plan.expanded.train(owner.training)
    for owner, name in owners.get(id(plan.site.bias), []) if plan.site.bias is not None else []:
        owner._parameters[name] = None


def _edit(call: Call, plan: _Plan) -> Edit:
    node = call.node
    given = node if plan.site.module is not None else cast(fx.Node, [*node.args, node.kwargs.get("weight")][1])
    path = str(given.target)
    return Edit(call.graph_module, (node,), (StructureStep(path, plan.expanded),))


def _become(model: fx.GraphModule, result: nn.Module) -> nn.Module:
    """Make the ``GraphModule`` that the caller holds the one that was built from it."""
    built = cast(fx.GraphModule, result)
    for name in ("_parameters", "_buffers", "_modules"):
        vars(model)[name] = vars(built)[name]
    model.graph = built.graph
    return model
