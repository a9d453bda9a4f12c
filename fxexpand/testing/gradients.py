"""Do gradients reach every parameter, and are they those of another model?"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxexpand.graph.expanded import Expanded
from fxexpand.report.run import copied, undisturbed
from fxexpand.testing.equivalent import Agreement, Observed, PropertyError, agreement
from fxexpand.testing.tolerance import measured

Gradients = dict[str, Tensor]


def gradients(model: nn.Module, inputs: tuple[object, ...]) -> Gradients:
    """The gradients of ½·Σ|y|² by the parameters, in eval mode; those that do not depend on any are left out.

    The parameters' own ``grad`` stays as it is.
    """
    with undisturbed(model, inputs):
        return _gradients(model, *copied(inputs))


def _gradients(model: nn.Module, *own: object) -> Gradients:
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.enable_grad():
        outputs = [x for x in pytree.tree_leaves(model(*own)) if isinstance(x, Tensor) and x.requires_grad]
        if not outputs or not named:
            return {}
        loss = torch.stack([x.abs().square().sum() for x in outputs]).sum() / 2
        found: tuple[Tensor | None, ...] = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def gradients_agree(where: str, a: nn.Module, b: nn.Module, inputs: tuple[object, ...]) -> Agreement:
    """That both models have the same gradients, by name. Raises ``PropertyError``."""
    return agreement(f"{where}: gradients", _observed(a, inputs), _observed(b, inputs))


def _observed(model: nn.Module, inputs: tuple[object, ...]) -> Observed:
    leaves, rounding = measured(partial(_gradients, model), inputs, model)
    return Observed(model, inputs, leaves, rounding)


def gradients_flow(where: str, model: nn.Module, big: nn.Module, inputs: tuple[object, ...]) -> str:
    """That the parameters of each expansion have gradients, finite, and not zero where the old layer's are not."""
    before, after = gradients(model, inputs), gradients(big, inputs)
    reached = 0
    expansions = [module for module in big.modules() if isinstance(module, Expanded)]
    fixed = {id(module.get_parameter(name)) for module in expansions for name in module.fixed}
    for path, module in big.named_modules():
        if not isinstance(module, Expanded):
            continue
        old = before.get(f"{path}.weight", before.get(path))
        if old is None or not old.any():
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
