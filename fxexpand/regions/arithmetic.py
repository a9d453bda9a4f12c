"""Sums, multiples, concatenations and selections, as joins and affine maps."""

from __future__ import annotations

import operator
from collections.abc import Callable
from math import ceil
from typing import Any

import torch
from torch import Tensor, fx

from fxexpand.regions.arguments import METHODS, Arguments, Rule
from fxexpand.regions.maps import scale_and_shift, selection
from fxexpand.regions.parts import Join, Lifted, Unary

# Functions that give a tuple of parts.
_PARTED = {torch.chunk, torch.split}


def _sum(arguments: Arguments, node: fx.Node, target: Any) -> Lifted:
    sign = -1 if target in (operator.sub, operator.isub, torch.sub) else 1
    values = _two(node)
    if values is None:
        return None
    a, b = values
    alpha = node.kwargs.get("alpha", 1)
    if not isinstance(alpha, (int, float)):
        return None
    if arguments.varies(a) and arguments.varies(b):
        return Join((a, b), (1, sign * alpha))
    if arguments.varies(a):
        return _shift(a, 1, arguments.value(b), sign * alpha)
    return _shift(b, sign * alpha, arguments.value(a), 1) if arguments.varies(b) else None


def _reversed_difference(arguments: Arguments, node: fx.Node, target: Any) -> Lifted:
    """``torch.rsub(a, b)``, which is b - a."""
    values, alpha = _two(node), node.kwargs.get("alpha", 1)
    if values is None or not isinstance(alpha, (int, float)) or not arguments.varies(values[0]):
        return None
    a, b = values
    return Join((b, a), (1, -alpha)) if arguments.varies(b) else _shift(a, -alpha, arguments.value(b), 1)


def _times(arguments: Arguments, node: fx.Node, target: Any) -> Lifted:
    values = _two(node)
    if values is None or node.kwargs.get("rounding_mode") is not None:
        return None
    a, b = values
    if target in (operator.truediv, operator.itruediv, torch.div):
        factor = arguments.value(b) if arguments.varies(a) and not arguments.varies(b) else None
        if not isinstance(factor, (int, float, Tensor)) or not _is_real(factor) or _has_zero(factor):
            return None
        return scale_and_shift(a, 1 / factor, 0)
    if arguments.varies(a) == arguments.varies(b):
        return None
    source, factor = (a, arguments.value(b)) if arguments.varies(a) else (b, arguments.value(a))
    return scale_and_shift(source, factor, 0) if _is_real(factor) else None


def _negative(arguments: Arguments, node: fx.Node, target: Any) -> Lifted:
    return scale_and_shift(node.all_input_nodes[0], -1, 0)


def _concatenation(arguments: Arguments, node: fx.Node, target: Any) -> Lifted:
    tensors = node.kwargs.get("tensors", node.args[0] if node.args else None)
    axis = node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if len(node.args) > 1 else 0))
    if not isinstance(tensors, (list, tuple)) or not isinstance(axis, int) or not tensors:
        return None
    branches = [value for value in tensors if isinstance(value, fx.Node)]
    if not all(arguments.varies(value) for value in tensors):
        return None
    return Join(tuple(branches), None, axis)


def _parts(arguments: Arguments, node: fx.Node, target: Any) -> Lifted:
    """``chunk`` and ``split`` leave the value as it is: taking one of their parts selects channels."""
    given = arguments.by_name(node, ("input", "number", "dim"))
    indexed = all(_index(user) is not None for user in node.users)
    if given is None or not indexed or _bounds(node) is None:
        return None
    return Unary(given["input"], lambda _: None, whole=False)


def _item(arguments: Arguments, node: fx.Node, target: Any) -> Lifted:
    source, key = node.args
    if not isinstance(source, fx.Node) or not arguments.varies(source):
        return None
    index = _index(node)
    if index is not None:
        bounds = _bounds(source) if _target(source) in _PARTED else None
        if bounds is None or index < 0:
            return None
        part, axis = bounds
        return selection(source, lambda channels: part(index, channels), axis)
    keys = key if isinstance(key, tuple) else (key,)
    if not all(isinstance(k, slice) or k is Ellipsis for k in keys):
        return None
    return _slices(source, keys)


def _narrow(arguments: Arguments, node: fx.Node, target: Any) -> Lifted:
    given = arguments.by_name(node, ("input", "dim", "start", "length"))
    if given is None or not all(isinstance(given.get(name), int) for name in ("dim", "start", "length")):
        return None
    start, length = given["start"], given["length"]
    if start < 0:
        return None
    return selection(given["input"], lambda _: slice(start, start + length), given["dim"])


def _bounds(node: fx.Node) -> tuple[Callable[[int, int], slice], int] | None:
    """(the channels of part i for a number of channels, axis) of a ``chunk`` or ``split`` node."""
    names = {"chunks": "number", "split_size": "number", "split_size_or_sections": "number"}
    given = dict(zip(("input", "number", "dim"), node.args, strict=False))
    given |= {names.get(k, k): v for k, v in node.kwargs.items()}
    number, axis = given.get("number"), given.get("dim", 0)
    chunked = "chunk" in (node.target if isinstance(node.target, str) else getattr(node.target, "__name__", ""))
    if not isinstance(axis, int):
        return None
    if isinstance(number, (list, tuple)) and all(isinstance(size, int) for size in number):
        ends = [sum(number[: i + 1]) for i in range(len(number))]
        return (lambda i, channels: slice(ends[i] - number[i], ends[i])), axis
    if not isinstance(number, int):
        return None

    def part(i: int, channels: int) -> slice:
        size = ceil(channels / number) if chunked else number
        return slice(i * size, (i + 1) * size)

    return part, axis


def _slices(source: fx.Node, keys: tuple[Any, ...]) -> Lifted:
    """``x[:, a:b]``: a slice of one axis, all of the others."""
    cut = [i for i, k in enumerate(keys) if isinstance(k, slice) and k != slice(None)]
    if len(cut) != 1 or keys.count(Ellipsis) > 1:
        return None
    (position,) = cut
    picked = keys[position]
    if not all(isinstance(bound, (int, type(None))) for bound in (picked.start, picked.stop, picked.step)):
        return None
    axis = position - len(keys) if Ellipsis in keys[:position] else position
    return selection(source, lambda _: picked, axis)


def _shift(source: fx.Node, scale: float, shift: Any, factor: float) -> Unary | None:
    if not _is_real(shift):
        return None
    return scale_and_shift(source, scale, shift if factor == 1 else shift * factor)


def _is_real(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_complex()
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _has_zero(value: float | Tensor) -> bool:
    """Whether a divisor is zero somewhere, as far as its numbers are known."""
    if isinstance(value, Tensor):
        return not value.is_meta and bool((value == 0).any())
    return value == 0


def _two(node: fx.Node) -> tuple[Any, Any] | None:
    """Both arguments of a binary operation; in an old form, a number may stand between them."""
    if len(node.args) > 2:
        return None
    given = dict(zip(("input", "other"), node.args, strict=False)) | dict(node.kwargs)
    return (given["input"], given["other"]) if {"input", "other"} <= given.keys() else None


def _index(node: fx.Node) -> int | None:
    """i, where ``node`` is ``value[i]``."""
    if node.target is operator.getitem and isinstance(node.args[1], int):
        return node.args[1]
    return None


def _target(node: fx.Node) -> Any:
    return METHODS.get(str(node.target)) if node.op == "call_method" else node.target


RULES: dict[Any, Rule] = {
    **dict.fromkeys((operator.add, operator.sub, torch.add, torch.sub, operator.iadd, operator.isub), _sum),
    **dict.fromkeys((operator.mul, operator.truediv, torch.mul, torch.div, operator.imul, operator.itruediv), _times),
    torch.rsub: _reversed_difference,
    **dict.fromkeys((operator.neg, torch.neg), _negative),
    **dict.fromkeys((torch.cat, torch.concat), _concatenation),
    **dict.fromkeys(_PARTED, _parts),
    operator.getitem: _item,
    torch.narrow: _narrow,
}
