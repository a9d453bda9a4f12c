"""Do gradients reach every parameter, and are they those of another model?"""

from __future__ import annotations

from collections.abc import Container
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxexpand.graph.expanded import Expanded
from fxexpand.report.run import copied, undisturbed
from fxexpand.testing.equivalent import Agreement, Observed, PropertyError, agreement
from fxexpand.testing.tolerance import measured

Gradients = dict[str, Tensor]

# Comparing takes three sets of gradients beside the models; those of large models are compared part by part.
_BYTES_AT_ONCE = 2**29


def gradients(model: nn.Module, inputs: tuple[object, ...]) -> Gradients:
    """The gradients of ½·Σ|y|² by the parameters, in eval mode; those that do not depend on any are left out.

    The parameters' own ``grad`` stays as it is.
    """
    with undisturbed(model, inputs):
        return _gradients(model, *copied(inputs))


def _gradients(model: nn.Module, *own: object, names: Container[str] | None = None) -> Gradients:
    named = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (names is None or name in names)
    }
    with torch.enable_grad():
        outputs = [x for x in pytree.tree_leaves(model(*own)) if isinstance(x, Tensor) and x.requires_grad]
        if not outputs or not named:
            return {}
        loss = torch.stack([x.abs().square().sum() for x in outputs]).sum() / 2
        found: tuple[Tensor | None, ...] = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def gradients_agree(where: str, a: nn.Module, b: nn.Module, inputs: tuple[object, ...]) -> Agreement:
    """That both models have the same gradients, by name. Raises ``PropertyError``."""
    found = [
        agreement(f"{where}: gradients", _observed(a, inputs, names), _observed(b, inputs, names))
        for names in _parts(a, b)
    ]
    return max(found, key=lambda each: each.share)


def _parts(*models: nn.Module) -> list[set[str]]:
    """The names of all parameters, in sets that take some memory and no more, or are one parameter."""
    parts: list[set[str]] = [set()]
    taken = 0
    for name, parameter in {name: p for model in models for name, p in model.named_parameters()}.items():
        if taken + parameter.nbytes > _BYTES_AT_ONCE and parts[-1]:
            parts.append(set())
            taken = 0
        parts[-1].add(name)
        taken += parameter.nbytes
    return parts


def _observed(model: nn.Module, inputs: tuple[object, ...], names: Container[str]) -> Observed:
    leaves, rounding = measured(partial(_gradients, model, names=names), inputs, model)
    return Observed(model, inputs, leaves, rounding)


def gradients_flow(where: str, model: nn.Module, big: nn.Module, inputs: tuple[object, ...]) -> str:
    """That the parameters of each expansion have gradients, finite, and not zero where the old layer's are not."""
    reached_before = {name for name, gradient in gradients(model, inputs).items() if gradient.any()}
    after = gradients(big, inputs)
    reached = 0
    expansions = [module for module in big.modules() if isinstance(module, Expanded)]
    fixed = {id(module.get_parameter(name)) for module in expansions for name in module.fixed}
    for path, module in big.named_modules():
        if not isinstance(module, Expanded):
            continue
        if f"{path}.weight" not in reached_before and path not in reached_before:
            continue  # nothing reached the old layer either
        for name, parameter in module.named_parameters(prefix=path):
            if id(parameter) in fixed:
                continue  # by the strategy, as the filters of a prior are
            gradient = after.get(name)
            if gradient is None or not gradient.isfinite().all() or not gradient.any():
                found = "none" if gradient is None else "zero" if not gradient.any() else "one that is not finite"
                shape = tuple(parameter.shape)
                raise PropertyError(f"{where}: {name}: expected a gradient of shape {shape}, found {found}.")
            reached += 1
    return f"{reached} new parameters"
