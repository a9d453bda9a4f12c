"""Modules as the code that makes them: what a failing example prints."""

from __future__ import annotations

import inspect
import operator
import re
from math import inf, nan
from textwrap import dedent, indent
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxexpand.graph.tracer import ReplayTracer

_WIDTH = 100


def code_of(module: nn.Module) -> str:
    """An expression that makes ``module`` again, but for the values of its parameters and buffers.

    Works for modules whose constructor's arguments are their attributes, as are torch's layers and containers, and for
    a ``GraphModule`` of such, which becomes a call of ``graph``. Classes outside of torch go by their bare name.
    """
    if isinstance(module, fx.GraphModule):
        return _graph_code(module)
    if isinstance(module, nn.Sequential):
        return _call(_name(type(module)), [code_of(child) for child in module])
    return _call(_name(type(module)), _arguments(module))


def graph(source: str, **attributes: nn.Module | Tensor | str) -> fx.GraphModule:
    """The ``GraphModule`` of ``source``, a method ``forward`` that FX can trace, over modules, parameters and buffers.

    An attribute that is a string is a second name of the attribute of that name.

        graph("def forward(self, x): return self.conv(x) + x", conv=nn.Conv2d(4, 4, 1))

    Each step of the code is one node, also ``x += y`` and a call of a module by its second name.
    """
    names: dict[str, Any] = {"torch": torch, "operator": operator, "inf": inf, "nan": nan}
    exec(dedent(source), names)
    root = type("Graph", (nn.Module,), {"forward": names["forward"]})()
    for name, value in attributes.items():
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            root.register_buffer(name, value)
        else:
            setattr(root, name, getattr(root, value) if isinstance(value, str) else value)
    return fx.GraphModule(root, _ByName().trace(root)).eval()


class _ByName(ReplayTracer):
    """Calls each module by the name by which the code has called it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[nn.Module, str] = {}

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if isinstance(attr_val, nn.Module):
            self.names[attr_val] = attr
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def path_of_module(self, mod: nn.Module) -> str:
        return self.names[mod]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _graph_code(gm: fx.GraphModule) -> str:
    source = re.sub(r";  (\w+ = )+None", "", gm.code).strip()  # FX drops what is used no more
    quoted = f'"""\n{indent(source, "    ")}\n"""'
    first: dict[nn.Module, str] = {}
    attributes = []
    for name, child in gm._modules.items():
        if child is None:
            continue
        attributes.append(f"{name}={first[child]!r}" if child in first else f"{name}={code_of(child)}")
        first.setdefault(child, name)
    shapes = {name: list(tensor.shape) for name, tensor in gm.named_parameters(recurse=False)}
    attributes += [f"{name}=nn.Parameter(torch.empty({shape}))" for name, shape in shapes.items()]
    attributes += [f"{name}=torch.empty({list(b.shape)})" for name, b in gm.named_buffers(recurse=False)]
    return _call("graph", [quoted, *attributes])


def _call(name: str, arguments: list[str]) -> str:
    whole = f"{name}({', '.join(arguments)})"
    if len(whole) <= _WIDTH and "\n" not in whole:
        return whole
    return f"{name}(\n{indent(''.join(f'{argument},{chr(10)}' for argument in arguments), '    ')})"


def _name(cls: type[nn.Module]) -> str:
    return f"nn.{cls.__name__}" if cls.__module__.startswith("torch.nn.") else cls.__name__


def _arguments(module: nn.Module) -> list[str]:
    """The constructor's arguments, read from attributes of the same names; defaults are left out."""
    found = []
    for parameter in _parameters(type(module)):
        if parameter.name in {"dtype", "device"} or (parameter.name == "bias" and not getattr(module, "affine", True)):
            continue
        value = getattr(module, parameter.name)
        if parameter.name == "bias" and (value is None or isinstance(value, Tensor)):
            value = value is not None
        if parameter.default is parameter.empty:
            found.append(_value(value))
        elif not _is(value, parameter.default):
            found.append(f"{parameter.name}={_value(value)}")
    return found


def _parameters(cls: type[nn.Module]) -> list[inspect.Parameter]:
    """Those of the first class whose constructor names all of them: subclasses pass them on."""
    for base in cls.__mro__:
        parameters = list(inspect.signature(base).parameters.values())
        if not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            return parameters
    return []


def _is(value: object, default: object) -> bool:
    """Whether an attribute says what the default does: numbers may have become one for each axis."""
    spread = isinstance(value, tuple) and bool(value) and all(entry == default for entry in value)
    return spread or (type(value) is type(default) and value == default)


def _value(value: object) -> str:
    return code_of(value) if isinstance(value, nn.Module) else repr(value)
