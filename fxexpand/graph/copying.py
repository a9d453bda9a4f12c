"""Copying modules: what ``copy.deepcopy`` does, without what it costs for attributes that hold next to nothing."""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict
from typing import Any

from torch import nn

# What deepcopy gives back as it is; exactly these classes, no subclasses.
ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes})

_SHARED = ATOMS | {tuple}

# What can decide how an object is copied, and ``nn.Module`` leaves to ``object``; or what its attributes are.
_DECIDING = (
    *("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__getnewargs__", "__getnewargs_ex__", "__new__"),
    *("__getattr__", "__getattribute__", "__slots__"),
)


def deep_copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``copy.deepcopy(model, memo)``, several times faster, and for modules that nest however deep.

    A module has some fifteen containers, most of them empty, and deepcopy takes each of them apart. Classes that say
    how they are copied are left to it, and so are all values but plain dictionaries and tuples.
    """
    states: list[tuple[Any, dict[str, Any]]] = []
    plain: dict[type, bool] = {}
    waiting: list[Any] = [model]
    while waiting:
        module = waiting.pop()
        state = None if id(module) in memo else _plain_state(module, plain)
        if state is not None:
            memo[id(module)] = twin = object.__new__(type(module))
            states.append((twin, state))
            waiting += state["_modules"].values()
    for twin, state in states:
        twin.__setstate__(_copied_values(state, memo))
    found: nn.Module = copy.deepcopy(model, memo)
    return found


def bare_twin(layer: nn.Module) -> nn.Module:
    """A copy of a layer of torch without parameters, hooks and modules: of numbers, texts, tuples, flat containers."""
    twin = object.__new__(type(layer))
    vars(twin).update({name: value if type(value) in _SHARED else value.copy() for name, value in vars(layer).items()})
    return twin


def _plain_state(module: Any, plain: dict[type, bool]) -> dict[str, Any] | None:
    """The attributes of ``module``; None where copying it is more than copying these.

    ``plain`` says of classes whether that is certain by the class alone.
    """
    cls = type(module)
    if cls not in plain:
        plain[cls] = _is_plain(cls)
    certain = plain[cls] and vars(module).keys().isdisjoint(_DECIDING)
    state = vars(module) if certain else _reduced_state(module)
    return state if type(state) is dict and type(state.get("_modules")) in (dict, OrderedDict) else None


def _is_plain(cls: type) -> bool:
    as_modules = all(getattr(cls, name, None) is getattr(nn.Module, name, None) for name in _DECIDING)
    return as_modules and cls not in copyreg.dispatch_table


def _reduced_state(module: Any) -> dict[str, Any] | None:
    if not isinstance(module, nn.Module) or hasattr(module, "__deepcopy__") or type(module) in copyreg.dispatch_table:
        return None
    if type(module).__new__ is not object.__new__:
        return None
    reduced: Any = module.__reduce_ex__(4)
    if reduced[:2] != (copyreg.__newobj__, (type(module),)) or any(reduced[3:]):  # type: ignore[attr-defined]
        return None
    state: dict[str, Any] | None = reduced[2]
    return state


def _copied_values(state: dict[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
    """``state`` with its values copied: of those of a module, most are empty tables of hooks."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        cls = type(value)
        if cls in ATOMS:
            found[name] = value
        elif cls is OrderedDict and not value and id(value) not in memo and not vars(value):
            found[name] = memo[id(value)] = OrderedDict()
        else:
            found[name] = _copied(value, memo)
    return found


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """``copy.deepcopy(value, memo)``, for values that modules hold."""
    cls = type(value)
    if cls in ATOMS:
        return value
    if id(value) in memo:
        return memo[id(value)]
    if cls is dict:
        memo[id(value)] = twin = {}
        for key, held in value.items():
            twin[_copied(key, memo)] = _copied(held, memo)
        return twin
    if cls in (OrderedDict, set) and not value and not getattr(value, "__dict__", None):
        empty: Any = cls()
        memo[id(value)] = empty
        return empty
    if cls is tuple and ATOMS.issuperset(map(type, value)):
        return value
    return copy.deepcopy(value, memo)
