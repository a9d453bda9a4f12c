"""Finding and replacing modules and parameters wherever a model holds them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def replace_modules(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Put ``new[id(old)]`` in every place where ``model``, or a module inside it, holds ``old``."""
    for owner in list(model.modules()):
        for name, child in list(owner._modules.items()):
            if id(child) in new:
                owner._modules[name] = new[id(child)]


def parameter_owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """id of each parameter -> the modules that hold it and the names they hold it under.

    A module under two names is one owner: only a parameter that is tied has more.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name))
    return owners
