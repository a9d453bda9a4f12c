"""What a strategy makes is not taken on trust: its layers, and the weights that it gave them."""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxexpand.algebra.kernel import Kernel
from fxexpand.algebra.refusal import Refusal
from fxexpand.errors import ExpansionError
from fxexpand.graph.expanded import BRANCHES, PAD, Expanded, ExpandedChain, ExpandedSum
from fxexpand.graph.layers import has_hooks
from fxexpand.graph.site import Site
from fxexpand.graph.structure import Sum, leaves
from fxexpand.strategies.strategy import Strategy

# How far factors may be from the layer in any dtype: rounding stays far below, a wrong formula far above.
_MOST = 0.25


def check_layers(site: Site, strategy: Strategy, layers: object) -> None:
    """Raise ``ExpansionError`` unless a user's strategy gave distinct layers, with names that modules can have and the
    dtype of the layer.
    """
    named = isinstance(layers, (Mapping, Sum)) and all(isinstance(name, str) for name in layers)
    if not (named and layers and all(isinstance(layer, nn.Module) for layer in cast(Any, layers).values())):
        raise ExpansionError(
            f"{site}: {strategy}.layers() must give a mapping of names to modules, or a Sum, found {layers!r}."
        )
    if isinstance(layers, nn.Module) and has_hooks(layers):
        raise ExpansionError(
            f"{site}: {strategy}.layers() gives a Sum with hooks, which would be lost. Add them after."
        )
    given = dict(cast("Mapping[str, nn.Module]", layers).items())
    taken = [name for name in given if not _is_free(name, site)]
    if taken:
        raise ExpansionError(
            f"{site}: {strategy}.layers() names a layer {taken[0]!r}, which is no free name. Use another."
        )
    inside = [(name, module) for own, part in given.items() for name, module in leaves(part, own)]
    if len({id(module) for _, module in inside}) < len(inside):
        raise ExpansionError(f"{site}: {strategy}.layers() gives one module twice. Make one for each name.")
    weight = cast(Tensor, site.weight)
    for name, module in inside:
        for parameter in module.parameters():
            lazy = torch.nn.parameter.is_lazy(parameter)
            if lazy or parameter.dtype != weight.dtype:
                found = "a lazy one" if lazy else f"{parameter.dtype}"
                raise ExpansionError(
                    f"{site}: {strategy}.layers(), {name}: expected parameters of {weight.dtype}, found {found}. Build "
                    "layers by site.layer, site.branch and site.norm."
                )


def _is_free(name: str, site: Site) -> bool:
    """Whether a layer can have this name in an expansion of ``site``."""
    held = {PAD, BRANCHES, "origin", "strategy", "fixed", *vars(nn.Module()), *vars(site.module or nn.Module())}
    known = hasattr(ExpandedSum, name) or hasattr(ExpandedChain, name)
    return bool(name) and "." not in name and not keyword.iskeyword(name) and not known and name not in held


def check_product(site: Site, strategy: Strategy, expanded: Expanded) -> str:
    """No factorisation is taken on trust: raise ``ExpansionError`` when the layers, as cast, are another layer.

    By how much they are another one is what it returns, where the strategy only comes near.
    """
    product, weight = expanded.as_kernel(torch.float64), cast(Tensor, site.weight)
    target = Kernel(weight, site.bias, groups=site.groups).detach().to(dtype=torch.float64)
    error = float("inf") if isinstance(product, Refusal) else _relative(product.detach(), target)
    # A thousand units in the last place, for strategies that are less careful than they could be.
    inexact = [module.strategy for module in expanded.modules() if isinstance(module, Expanded) and not _exact(module)]
    if inexact and not isinstance(product, Refusal):
        difference = (product.weight.detach() - target.weight).norm() / target.weight.norm()
        return f"{site} as {inexact[0]} differs from the layer by {float(difference):.1e} (relative)"
    most = min(_MOST, 1024 * torch.finfo(weight.dtype).eps)
    if not error <= most:
        raise ExpansionError(
            f"{site}: the factors of {strategy} differ from the layer by {error:.1e} (relative), expected at most "
            f"{most:.0e}. Mend its factorize(), expand in a wider dtype, or use init='standard'."
        )
    return ""


def _exact(expanded: Expanded) -> bool:
    return cast(Strategy, expanded.strategy).exact


def _flat(kernel: Kernel) -> Tensor:
    bias = kernel.weight.new_zeros(kernel.out_channels) if kernel.bias is None else kernel.bias
    return torch.cat([kernel.weight.flatten(), bias])


def _relative(found: Kernel, wanted: Kernel) -> float:
    difference, expected = _flat(found) - _flat(wanted), _flat(wanted)
    return float(difference.norm() / expected.norm()) if bool((difference != 0).any()) else 0.0
