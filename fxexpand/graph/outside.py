"""Whether code may read, or change, what is neither in a model nor an argument: a counter in a global variable, say."""

from __future__ import annotations

import builtins
import dis
import inspect
from collections.abc import Iterator
from functools import cache
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from fxexpand.graph.layers import hooks_of

_FIXED = (bool, int, float, complex, str, bytes, type(None), type, BuiltinFunctionType)
_FIXED_HOMES = frozenset({"collections", "functools", "math", "numpy", "operator", "torch", "torchvision", "typing"})
_STORES = frozenset({"STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "IMPORT_NAME"})


def reaches_outside(module: nn.Module) -> bool:
    """Whether ``forward`` of the class of ``module``, or what it comes by, names anything else that can change.

    A liberal answer, from the names in the code: it says where to look twice.
    """
    cls: Any = type(module)
    return _reaches_outside(cls)


@cache
def _reaches_outside(cls: Any) -> bool:
    waiting: list[FunctionType] = list(_methods(cls, ["forward"]))
    seen: set[CodeType] = set()
    while waiting:
        function = waiting.pop()
        if function.__code__ in seen:
            continue
        seen.add(function.__code__)
        held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *_cells(function)]
        for code in nested(function.__code__):
            steps = list(dis.get_instructions(code))
            if any(step.opname in _STORES or _stores_on_the_class(step, cls) for step in steps):
                return True
            named = [step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
            held += [function.__globals__.get(name, getattr(builtins, name, None)) for name in named]
            waiting += _methods(cls, code.co_names)
        waiting += [value for value in held if _is_own(value)]
        if not all(_is_own(value) or _is_fixed(value) for value in held):
            return True
    return False


def nested(code: CodeType) -> Iterator[CodeType]:
    """``code``, and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested(constant)


def functions_of(member: Any) -> Iterator[FunctionType]:
    """The functions that a member of a class stands for, unless they are torch's."""
    parts = (member.fget, member.fset) if isinstance(member, property) else (getattr(member, "__func__", member),)
    for part in parts:
        function = inspect.unwrap(part) if callable(part) else None
        if isinstance(function, FunctionType) and not str(function.__module__).startswith("torch."):
            yield function


def hook_code(module: nn.Module) -> list[CodeType]:
    """The code of the hooks that calling ``module`` runs, as far as it can be read."""
    return [code for hook in hooks_of(module) for code in nested(_code_of_hook(hook)[0])]


def uses_its_module(hook: object) -> bool:
    """Whether ``hook`` does anything with the module that it is given first."""
    code, position = _code_of_hook(hook)
    name = code.co_varnames[position] if len(code.co_varnames) > position else None
    steps = [step for step in dis.get_instructions(code) if step.opname.startswith("LOAD_")]
    return name is None or any(
        name in (step.argval if isinstance(step.argval, tuple) else (step.argval,)) for step in steps
    )


def _code_of_hook(hook: Any) -> tuple[CodeType, int]:
    """The code of ``hook``, and where the module is among its arguments; that of nothing, where none is known."""
    if isinstance(hook, MethodType):
        return hook.__func__.__code__, 1
    if isinstance(hook, FunctionType):
        return hook.__code__, 0
    call = inspect.getattr_static(type(hook), "__call__", None)
    return (call.__code__, 1) if isinstance(call, FunctionType) else (_nothing.__code__, 0)


def _nothing() -> None:
    """Stands for a hook that cannot be read: it has no arguments, so it may do anything."""


def _methods(cls: Any, names: Any) -> Iterator[FunctionType]:
    for name in names:
        yield from functions_of(inspect.getattr_static(cls, name, None))


def _cells(function: FunctionType) -> list[Any]:
    return list(inspect.getclosurevars(function).nonlocals.values())


def _stores_on_the_class(step: dis.Instruction, cls: type) -> bool:
    return step.opname == "STORE_ATTR" and inspect.getattr_static(cls, step.argval, None) is not None


def _is_own(value: object) -> bool:
    """Whether ``value`` is a function the code of which is to be read, too."""
    return isinstance(value, FunctionType) and str(value.__module__).partition(".")[0] not in _FIXED_HOMES


def _is_fixed(value: object) -> bool:
    if isinstance(value, ModuleType):
        return value.__name__.partition(".")[0] in _FIXED_HOMES
    if isinstance(value, (tuple, frozenset)):
        return all(map(_is_fixed, value))
    home = str(getattr(type(value), "__module__", ""))
    return isinstance(value, (*_FIXED, FunctionType)) or home.partition(".")[0] == "typing"
