"""expand: layers become chains of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, fx, nn

from fxexpand.algebra.compose import compose_all
from fxexpand.algebra.kernel import Kernel
from fxexpand.algebra.refusal import Refusal
from fxexpand.errors import ExpansionError
from fxexpand.graph.expanded import PAD, CallOrigin, Expanded, LayerOrigin
from fxexpand.graph.find import find_sites
from fxexpand.graph.lift import lift_bare, memory_format_of, pad_module
from fxexpand.graph.rewrite import Edit, ModuleStep, rewrite
from fxexpand.graph.site import Call, Site
from fxexpand.graph.trace import Limits, check_model, open_up
from fxexpand.graph.traced import copy_model
from fxexpand.graph.tree import parameter_owners, replace_modules
from fxexpand.passes.collapse import release_all
from fxexpand.rules import Rule, as_rules, match
from fxexpand.strategies.strategy import Strategy

Init: TypeAlias = "str | Callable[[Site, Mapping[str, nn.Module]], object]"

# How far factors may be from the layer in any dtype: rounding stays far below, a wrong formula far above.
_MOST = 0.25


def expand(
    model: nn.Module,
    rules: Rule | Strategy | Sequence[Rule | Strategy],
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

    ``init="preserve"`` keeps the function exactly; ``"standard"`` leaves each new layer its class's own fresh
    initialisation (Guo et al. 2020, §4); a callable ``(site, layers) -> None`` does what it likes.

    The result is a copy. With ``inplace=True`` nothing is copied: a ``GraphModule`` is itself rewritten and returned;
    of any other model, the result shares the parameters of the layers that stay. If an error is raised, ``model`` is as
    it was.

    Raises ``RuleError`` when no rule matches any layer, or a ``Rule`` with a ``where`` matches none;
    ``ExpansionError`` for a layer that a rule matches but that cannot be expanded as asked.
    """
    checked = as_rules(rules)
    check_model(model, "expand")
    if not (callable(init) or init in ("preserve", "standard")):
        raise ExpansionError(f"init: expected 'preserve', 'standard' or a function (site, layers), found {init!r}.")
    work = open_up(_copied(model, share=inplace), Limits())
    release_all(work)
    plans = [_plan(site, rule.strategy, init) for site, rule in match(find_sites(work), checked)]
    result = _install(work, plans)
    return _become(model, result) if inplace and isinstance(model, fx.GraphModule) else result


@dataclass(frozen=True)
class _Plan:
    site: Site
    expanded: Expanded


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
    # A strategy sees padding that a layer can express; any other goes before its layers as a module.
    seen = site if site.geometry.symmetric else replace(site, geometry=_unpadded(site))
    layers = strategy.layers(seen)
    if isinstance(layers, Refusal):
        raise ExpansionError(f"{site}: {layers.reason}, or exclude it with {_exclusion(site)}.")
    _check_layers(site, strategy, layers)
    pad = {} if seen is site else {PAD: pad_module(site.padding_mode, site.padding)}
    expanded = Expanded({**pad, **layers}, _origin(site), strategy)
    _check_geometry(site, strategy, expanded)
    if callable(init):
        init(site, dict(layers))
    elif init == "preserve":
        _preserve(site, strategy, list(layers.values()))
    _carry_over(site, expanded)
    return _Plan(site, expanded)


def _unpadded(site: Site) -> Any:
    return replace(site.geometry, padding=((0, 0),) * site.dims, padding_mode="zeros")


def _exclusion(site: Site) -> str:
    return f'where=~layer(name="{site.path}")'


def _origin(site: Site) -> LayerOrigin | CallOrigin:
    if site.module is not None:
        return LayerOrigin.of(site.module, site.geometry)
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
    )


def _check_geometry(site: Site, strategy: Strategy, expanded: Expanded) -> None:
    kernel = expanded.as_kernel(sketch=True)
    if isinstance(kernel, Refusal):
        raise ExpansionError(f"{site}: the layers of {strategy} do not make up this one: {kernel}. Mend its layers().")


def _check_layers(site: Site, strategy: Strategy, layers: object) -> None:
    """Raise ``ExpansionError`` unless a user's strategy gave distinct layers under names that modules can have."""
    named = isinstance(layers, Mapping) and all(isinstance(name, str) for name in layers)
    if not (named and layers and all(isinstance(layer, nn.Module) for layer in cast(Any, layers).values())):
        raise ExpansionError(f"{site}: {strategy}.layers() must give a mapping of names to modules, found {layers!r}.")
    given = cast("Mapping[str, nn.Module]", layers)
    taken = [
        name
        for name in given
        if "." in name or not name or hasattr(Expanded, name) or name in (PAD, "origin", "strategy")
    ]
    if taken:
        raise ExpansionError(
            f"{site}: {strategy}.layers() names a layer {taken[0]!r}, which is no free name. Use another."
        )
    if len(set(map(id, given.values()))) < len(given):
        raise ExpansionError(f"{site}: {strategy}.layers() gives one module twice. Make one for each name.")


def _preserve(site: Site, strategy: Strategy, layers: list[nn.Module]) -> None:
    """Give ``layers`` weights that compose to the weight of ``site``, computed in float64 and cast once."""
    weight = cast(Tensor, site.weight)
    if weight.is_meta:  # there are no values to keep
        return
    target = _exactly(Kernel(weight, site.bias, groups=site.groups))
    if not all(bool(t.isfinite().all()) for t in (target.weight, target.bias) if t is not None):
        raise ExpansionError(f"{site}: its weight or bias holds NaN or infinity; mend it, or use init='standard'.")
    found = strategy.factorize(target, [_exactly_of(layer) for layer in layers])
    if isinstance(found, Refusal):
        raise ExpansionError(
            f"{site}: {strategy} cannot keep the function: {found.reason}. Use that, or init='standard', "
            f"or exclude it with {_exclusion(site)}."
        )
    with torch.no_grad():
        for layer, kernel in zip(layers, found, strict=True):
            cast(Tensor, layer.weight).copy_(kernel.weight)
            if kernel.bias is not None:
                cast(Tensor, layer.bias).copy_(kernel.bias)
    _check_product(site, strategy, compose_all(map(_exactly_of, layers)), target)


def _exactly(kernel: Kernel) -> Kernel:
    return kernel.detach().to(dtype=torch.float64)


def _exactly_of(layer: nn.Module) -> Kernel:
    kernel = lift_bare(layer)
    if isinstance(kernel, Refusal):
        raise ExpansionError(f"{type(layer).__name__}: {kernel.reason}; init='preserve' needs layers of those kinds.")
    return _exactly(kernel)


def _check_product(site: Site, strategy: Strategy, product: Kernel | Refusal, target: Kernel) -> None:
    """No factorisation is taken on trust: raise ``ExpansionError`` when the layers, as cast, are another layer."""
    error = float("inf") if isinstance(product, Refusal) else _relative(_flat(product) - _flat(target), _flat(target))
    # A thousand units in the last place, for strategies that are less careful than they could be.
    most = min(_MOST, 1024 * torch.finfo(cast(Tensor, site.weight).dtype).eps)
    if not error <= most:
        raise ExpansionError(
            f"{site}: the factors of {strategy} differ from the layer by {error:.1e} (relative), expected at most "
            f"{most:.0e}. Mend its factorize(), expand in a wider dtype, or use init='standard'."
        )


def _flat(kernel: Kernel) -> Tensor:
    return torch.cat([t.flatten() for t in (kernel.weight, kernel.bias) if t is not None])


def _relative(difference: Tensor, expected: Tensor) -> float:
    return float(difference.norm() / expected.norm()) if bool((difference != 0).any()) else 0.0


def _carry_over(site: Site, expanded: Expanded) -> None:
    """Give the new layers the flags and the memory format of the old one, and keep what else it held."""
    weight = cast(Tensor, site.weight)
    for layer in expanded.children():
        for name, parameter in layer.named_parameters():
            old = site.bias if name == "bias" and site.bias is not None else weight
            parameter.requires_grad_(old.requires_grad)
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
    steps = tuple(ModuleStep(f"{path}.{name}") for name in plan.expanded._modules)
    return Edit(call.graph_module, (node,), steps)


def _become(model: fx.GraphModule, result: nn.Module) -> nn.Module:
    """Make the ``GraphModule`` that the caller holds the one that was built from it."""
    built = cast(fx.GraphModule, result)
    for name in ("_parameters", "_buffers", "_modules"):
        vars(model)[name] = vars(built)[name]
    model.graph = built.graph
    return model
