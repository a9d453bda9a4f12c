"""State that modules keep outside their parameters and buffers, and that a graph would neither change nor follow."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import CodeType, MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.jit import ScriptModule

from fxexpand.graph.layers import hooks_of

# Attributes of every module that say nothing about the state it keeps for itself.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def changed_modules(before: nn.Module, after: nn.Module) -> set[str]:
    """The paths of modules whose state is another in ``after``, a copy of ``before`` over the same tensors that ran."""
    ours, theirs = dict(before.named_modules()), dict(after.named_modules())
    if list(ours) != list(theirs):
        return {""}
    return {path for path in ours if _has_changed(ours[path], theirs[path])}


def volatile_attributes(model: nn.Module, kept: Iterable[str]) -> dict[str, set[str]]:
    """path -> names of the attributes that the code of a module, or of a hook, may change while a graph calls it.

    ``kept`` are the modules that graphs call. All their attributes that can change in place count, and those that the
    code assigns to, except where it sets them up.
    """
    hooked = [reached for module in model.modules() for hook in hooks_of(module) for reached in _held_by(hook)]
    found = {path: _changing(model.get_submodule(path)) for path in kept}
    for path, module in model.named_modules() if hooked else ():
        names = {name for name, value in plain_attributes(module).items() if any(value is held for held in hooked)}
        if any(module is held for held in hooked):
            names |= _changing(module)
        if names:
            found.setdefault(path, set()).update(names)
    return {path: names for path, names in found.items() if not isinstance(model.get_submodule(path), ScriptModule)}


def hide(module: nn.Module, names: Iterable[str], refuse: Callable[[str], NoReturn]) -> None:
    """Make reading the attributes ``names`` of ``module`` call ``refuse``; also where it is asked for them."""

    def guard(name: str) -> property:
        return property(lambda _: refuse(f"it reads {name}, which changes while the model runs"))

    cls = type(module)
    module.__class__ = type(
        cls.__name__, (cls,), {name: guard(name) for name in names} | {"__module__": cls.__module__}
    )


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """What ``module`` holds beside parameters, buffers, modules and hooks."""
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}


def _has_changed(before: nn.Module, after: nn.Module) -> bool:
    if before is after:  # a scripted module is never copied
        return False
    for name in ("_parameters", "_buffers"):
        held, holds = vars(before)[name], vars(after)[name]
        if list(held) != list(holds) or any(held[key] is not holds[key] for key in held):
            return True
    ours, theirs = vars(before), vars(after)
    if ours.keys() != theirs.keys() and (ours.keys() ^ theirs.keys()) - _OF_EVERY_MODULE:
        return True
    plain = [name for name in ours if name not in _OF_EVERY_MODULE and ours[name] is not theirs[name]]
    return any(_differ(ours[name], theirs[name], {}) for name in plain)


def _differ(before: Any, after: Any, seen: dict[int, object]) -> bool:
    if isinstance(after, fx.Proxy):  # first of all: a proxy answers no question about its type
        return True
    if before is after or isinstance(after, nn.Module) or id(after) in seen:  # modules are compared in their own place
        return False
    if type(before) is not type(after):
        return True
    seen[id(after)] = after  # held, so that nothing else gets its id
    if isinstance(after, _PLAIN):
        return repr(before) != repr(after)  # so that NaN is unchanged
    if isinstance(after, Tensor):
        return before.shape != after.shape or not (before.is_meta or torch.equal(before, after))
    ours, theirs = _parts(before), _parts(after)
    return len(ours) != len(theirs) or any(_differ(a, b, seen) for a, b in zip(ours, theirs, strict=True))


def _parts(value: Any) -> list[Any]:
    """What an object is made of: the elements of a container, or else what copying it would take."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, (set, frozenset)):
        return [len(value), *sorted(repr(element) for element in value if isinstance(element, _PLAIN))]
    try:
        _, *parts = value.__reduce_ex__(2)
    except Exception:  # noqa: BLE001 -- what cannot be copied cannot be compared, and may raise anything
        return []
    return [list(part) if isinstance(part, Iterator) else part for part in parts]


def _held_by(hook: object) -> list[object]:
    """The objects that a hook can reach and change, so far as a copy of the model has copies of them."""
    if isinstance(hook, MethodType):
        return [hook.__self__]
    if isinstance(hook, partial):
        return [*_held_by(hook.func), *hook.args, *hook.keywords.values()]
    return [hook, *vars(hook).values()] if hasattr(hook, "__dict__") else [hook]


def _changing(module: nn.Module) -> set[str]:
    """The attributes of ``module`` that can change in place, or that its code assigns to outside ``__init__``."""
    mutable = {name for name, value in plain_attributes(module).items() if not _is_constant(value)}
    assigned = {name for code in _own_code(type(module)) for name in _assigned(code)}
    return (mutable | assigned) - {"forward"}  # which calling the module reads


def _is_constant(value: object) -> bool:
    """Whether only assignment can change what a graph sees: it reads a tensor anew at every call."""
    return isinstance(value, (*_PLAIN, Tensor)) or (isinstance(value, tuple) and all(map(_is_constant, value)))


def _own_code(cls: type) -> Iterator[CodeType]:
    """The code of the methods of ``cls`` and its bases, up to torch's own classes."""
    for base in cls.__mro__:
        if not base.__module__.startswith(("torch.", "builtins")):
            for name, member in vars(base).items():
                code = getattr(inspect.unwrap(getattr(member, "__func__", member)), "__code__", None)
                if name != "__init__" and code is not None:
                    yield code


def _assigned(code: CodeType) -> Iterator[str]:
    yield from (step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _assigned(constant)
