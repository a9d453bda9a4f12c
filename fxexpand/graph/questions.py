"""What code that has no graph asks of a layer that it holds, and an expansion in its place would answer differently."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable
from functools import cache
from types import CodeType
from typing import Any

from torch import nn

from fxexpand.graph.outside import functions_of, nested

_KINDS = {"isinstance", "issubclass", "type", "__class__"}
_WALKS = {"modules", "named_modules", "parameters", "named_parameters"}
_TENSORS = {"weight", "bias"}


def question(codes: Iterable[CodeType], layer: nn.Module, name: str | None) -> str | None:
    """What ``codes`` do with ``layer``, and could not do with an expansion in its place; or None.

    ``name`` is the one under which it is held, None where that is not known.

    Calling an expansion, and reading its weight, is as good as calling and reading the layer. It is another class,
    holds other modules and parameters, and what is written to the weight that it composes is lost. Read from the names
    in each function: code may ask in ways that nobody sees.
    """
    kinds = {cls.__name__ for cls in type(layer).__mro__[: type(layer).__mro__.index(nn.Module)]} | {"Sequential"}
    for code in codes:
        names = set(code.co_names)
        if names & _KINDS and names & kinds:
            return f"asks for the class of layers ({', '.join(sorted(names & kinds))})"
        if names & _WALKS and "next" not in names:  # next(self.parameters()) asks for a device or a dtype
            return f"runs through {min(names & _WALKS)}()"
        if any(map(_writes, names)) and _reads_tensors_of(code, name):
            return "may write to its weight or bias"
    return None


def code_of(module: nn.Module) -> tuple[CodeType, ...]:
    """The code of ``forward``, and of all methods and properties of the class that it speaks of, torch's own aside."""
    cls: Any = type(module)
    return _code_of(cls)


@cache
def _code_of(cls: Any) -> tuple[CodeType, ...]:
    waiting, seen, found = ["forward"], set[str](), list[CodeType]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for function in functions_of(inspect.getattr_static(cls, name, None)):
            for code in nested(function.__code__):
                found.append(code)
                waiting += code.co_names
    return tuple(found)


def _writes(name: str) -> bool:
    """Whether an attribute of this name is a tensor's way to be written to."""
    return name == "data" or (name.endswith("_") and not name.endswith("__"))


def _reads_tensors_of(code: CodeType, name: str | None) -> bool:
    """Whether ``code`` reads the weight or bias of ``self.name``, or of a module whose name is not known."""
    before: dis.Instruction | None = None
    for step in dis.get_instructions(code):
        if step.argval in _TENSORS and step.opname.startswith("LOAD_"):
            attribute = before is not None and before.opname == "LOAD_ATTR"
            if before is None or not attribute or name is None or before.argval == name:
                return True
        before = step
    return False
