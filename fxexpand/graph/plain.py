"""Which graphs can surely be written as code, so that nobody has to write them to find out."""

from __future__ import annotations

import operator
from keyword import iskeyword
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.graph import CodeGen

_TYPES = (None, Tensor)
_PLAIN = frozenset({type(None), bool, int})
_NAMESPACES: tuple[Any, ...] = (torch, F, operator)


def surely_has_code(graph: fx.Graph) -> bool:
    """Whether FX can write ``graph`` as code, and Python can read that.

    True for calls of modules, of functions of torch and of methods, under names that Python takes, of nodes, integers,
    None and tuples or lists of these, annotated with ``Tensor`` at most. Of any other graph this knows nothing.
    """
    return type(graph._codegen) is CodeGen and all(map(_is_plain, graph.nodes))


def _is_plain(node: fx.Node) -> bool:
    if node.type not in _TYPES or not (_is_value(node.args) and all(map(_is_name, node.kwargs))):
        return False
    if not all(map(_is_value, node.kwargs.values())):
        return False
    if node.op == "placeholder":
        return not node.args and _is_name(str(node.target))
    if node.op in ("call_module", "get_attr"):
        return all(part.isdecimal() or _is_name(part) for part in str(node.target).split("."))
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        return any(getattr(space, name, None) is node.target for space in _NAMESPACES)
    if node.op == "call_method":
        return _is_name(str(node.target)) and bool(node.args) and isinstance(node.args[0], fx.Node)
    return node.op == "output" and len(node.args) == 1


def _is_name(text: str) -> bool:
    return text.isidentifier() and not iskeyword(text)


def _is_value(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_value, value)) and not hasattr(value, "_fields")
    return isinstance(value, fx.Node) or type(value) in _PLAIN
