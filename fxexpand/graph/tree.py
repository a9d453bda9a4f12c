"""Finding and replacing modules and parameters wherever a model holds them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

_INTERNAL = frozenset(vars(nn.Module()))


def submodule(root: nn.Module, path: str) -> nn.Module:
    """``root.get_submodule(path)``, a good deal faster: passes ask for the modules of nodes again and again."""
    module = root
    for name in path.split(".") if path else ():
        own = vars(module)
        held = own["_modules"].get(name) if type(own["_modules"]) in (dict, OrderedDict) else None
        if held is None or name in own or hasattr(type(module), name):  # some other attribute may stand before it
            return root.get_submodule(path)
        module = held
    return module


def replace_modules(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Put ``new[id(old)]`` in every place where ``model``, or a module inside it, holds ``old``.

    Also in plain attributes: a list of layers that code runs through holds them a second time.
    """
    if not new:
        return
    for owner in list(model.modules()):
        for name, child in list(owner._modules.items()):
            if id(child) in new:
                owner._modules[name] = new[id(child)]
        for name, value in list(vars(owner).items()):
            if name not in _INTERNAL:
                vars(owner)[name] = _replaced(value, new)


def _replaced(value: Any, new: Mapping[int, nn.Module]) -> Any:
    """``value`` with modules replaced, itself where it can be: lists and dicts may be held elsewhere too."""
    if isinstance(value, nn.Module):
        return new.get(id(value), value)
    if type(value) is list:
        value[:] = [_replaced(item, new) for item in value]
    elif type(value) is dict:
        value.update({key: _replaced(item, new) for key, item in value.items()})
    elif type(value) is tuple:
        return tuple(_replaced(item, new) for item in value)
    return value


def modules_beside(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that ``module`` holds in plain attributes, also in lists, tuples and dictionaries."""
    for name, value in vars(module).items():
        if name not in _INTERNAL:
            yield from _modules_in(value)


def _modules_in(value: Any) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif type(value) in (list, tuple, dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _modules_in(item)


def parameter_owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """id of each parameter -> the modules that hold it and the names they hold it under.

    A module under two names is one owner: only a parameter that is tied, or kept in a plain attribute too, has more.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name))
        for name, value in vars(module).items():
            for parameter in _parameters_in(value) if name not in _INTERNAL else ():
                owners.setdefault(id(parameter), []).append((module, name))
    return owners


def _parameters_in(value: Any) -> Iterator[nn.Parameter]:
    if isinstance(value, nn.Parameter):
        yield value
    elif type(value) in (list, tuple, dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _parameters_in(item)
