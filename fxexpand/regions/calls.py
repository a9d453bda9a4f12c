"""Calls of functions and methods that apply an affine map, and the map."""

from __future__ import annotations

import operator
from collections.abc import Callable
from math import ceil
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxexpand.algebra.affine import Affine, Transposed
from fxexpand.algebra.kernel import Kernel
from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.geometry import padding_sides, spread
from fxexpand.graph.layers import dtype_refusal
from fxexpand.regions.constants import Constants
from fxexpand.regions.effects import Effects, writes
from fxexpand.regions.layers import fixed, transposed_map
from fxexpand.regions.maps import average, batch_norm_map, padding_map, scale_and_shift, selection
from fxexpand.regions.parts import Join, Lifted, Made, Signal, Unary

_CONVOLUTIONS: dict[Any, int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_TRANSPOSED: dict[Any, int] = {F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3}
_POOLS: dict[Any, int] = {F.avg_pool1d: 1, F.avg_pool2d: 2, F.avg_pool3d: 3}
_CONV_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_NAMES = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_POOL_NAMES = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_NORM_NAMES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


class Calls:
    """Lifts the ``call_function`` and ``call_method`` nodes of one graph."""

    def __init__(self, constants: Constants, effects: Effects) -> None:
        self.constants = constants
        self.effects = effects

    def lift(self, node: fx.Node) -> Lifted:
        """What ``node`` does: None where that is not affine in one of its inputs."""
        target = _METHODS.get(str(node.target)) if node.op == "call_method" else node.target
        rule = _RULES.get(target)
        if rule is None or "out" in node.kwargs:
            return None
        lifted = rule(self, node, target)
        if isinstance(lifted, (Unary, Join)) and writes(node) and not self.effects.owns(node.all_input_nodes[0]):
            return Refusal("it changes a value in place that something else sees too")
        return lifted

    def _variable(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and value not in self.constants

    def _given(self, node: fx.Node, names: tuple[str, ...]) -> dict[str, Any] | None:
        """The arguments of ``node`` by name: the first one a variable node, the values of all others.

        None where others vary too.
        """
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        source = given.pop(names[0], None)
        flat = fx.node.map_arg(given, lambda used: used)  # a copy
        if not self._variable(source) or any(self._variable(used) for used in _nodes(flat)):
            return None
        return {names[0]: source, **{k: fx.node.map_arg(v, self.constants.value) for k, v in given.items()}}

    def _convolution(self, node: fx.Node, target: Any) -> Lifted:
        given = self._given(node, _CONV_NAMES)
        if given is None:
            return None
        d, weight = _CONVOLUTIONS[target], given["weight"]
        dilation = spread(given.get("dilation", 1), d)
        kernel = Kernel(
            weight,
            given.get("bias"),
            spread(given.get("stride", 1), d),
            padding_sides(given.get("padding", 0), tuple(weight.shape[2:]), dilation),
            dilation,
            given.get("groups", 1),
        )
        return dtype_refusal(weight) or fixed(given["input"], Affine(kernel), computes=True)

    def _transposed(self, node: fx.Node, target: Any) -> Lifted:
        given = self._given(node, _TRANSPOSED_NAMES)
        if given is None:
            return None
        d, weight = _TRANSPOSED[target], given["weight"]
        stride, padding, more, dilation = (
            spread(given.get(name, default), d)
            for name, default in (("stride", 1), ("padding", 0), ("output_padding", 0), ("dilation", 1))
        )
        affine = transposed_map(
            weight, given.get("bias"), Transposed(stride, padding, more, dilation), given.get("groups", 1)
        )
        return dtype_refusal(weight) or fixed(given["input"], affine, computes=True)

    def _linear(self, node: fx.Node, target: Any) -> Lifted:
        given = self._given(node, ("input", "weight", "bias"))
        if given is None or given["weight"].dim() != 2:
            return None
        return self._product(given["input"], given["weight"], given.get("bias"))

    def _matmul(self, node: fx.Node, target: Any) -> Lifted:
        second = "mat2" if target is torch.mm else "other"
        given = self._given(node, ("input", second))
        if given is None or not isinstance(given[second], Tensor) or given[second].dim() != 2:
            return None
        return self._product(given["input"], given[second].t(), None)

    def _addmm(self, node: fx.Node, target: Any) -> Lifted:
        names = {"input": 0, "mat1": 1, "mat2": 2}
        given = {name: node.kwargs.get(name, node.args[i] if i < len(node.args) else None) for name, i in names.items()}
        if not self._variable(given["mat1"]) or self._variable(given["input"]) or self._variable(given["mat2"]):
            return None
        bias, weight = self.constants.value(given["input"]), self.constants.value(given["mat2"])
        if not isinstance(bias, Tensor) or bias.dim() != 1 or bias.numel() != weight.shape[1]:
            return None
        alpha, beta = (cast(float, node.kwargs.get(name, 1)) for name in ("alpha", "beta"))
        source = given["mat1"]
        assert isinstance(source, fx.Node)
        lifted = self._product(source, weight.t() * alpha, bias * beta)
        return lifted if isinstance(lifted, Refusal) else _with_rank(lifted, 2)

    def _product(self, source: fx.Node, weight: Tensor, bias: Tensor | None) -> Unary | Refusal:
        return dtype_refusal(weight) or fixed(source, Affine(Kernel(weight, bias)), computes=True)

    def _batch_norm(self, node: fx.Node, target: Any) -> Lifted:
        given = self._given(node, _NORM_NAMES)
        if given is None:
            return None
        mean, var = given.get("running_mean"), given.get("running_var")
        if given.get("training", False):
            return Refusal("training=True: it normalises each batch by its own statistics")
        if mean is None or var is None:
            return Refusal("it has no running statistics: it normalises each batch by its own")
        weight, bias, eps = given.get("weight"), given.get("bias"), given.get("eps", 1e-5)

        def make(signal: Signal) -> Made:
            return batch_norm_map(signal, mean, var, weight, bias, eps)

        known = Signal(channels=mean.numel())
        return Unary(given["input"], make, reads=known, gives=known, tensors=(mean, var))

    def _pool(self, node: fx.Node, target: Any) -> Lifted:
        given = self._given(node, _POOL_NAMES)
        if given is None:
            return None
        return average(
            given["input"],
            _POOLS[target],
            given["kernel_size"],
            given.get("stride"),
            given.get("padding", 0),
            given.get("ceil_mode", False),
            given.get("count_include_pad", True),
            given.get("divisor_override"),
        )

    def _dropout(self, node: fx.Node, target: Any) -> Lifted:
        given = self._given(node, ("input", "p", "training", "inplace"))
        if given is None:
            return None
        if given.get("training", True) and given.get("p", 0.5) > 0:
            return Refusal("training mode, in which it drops values at random; call model.eval() first")
        return Unary(given["input"], lambda _: None)

    def _pad(self, node: fx.Node, target: Any) -> Lifted:
        given = self._given(node, ("input", "pad", "mode", "value"))
        if given is None:
            return None
        if given.get("mode", "constant") != "constant":
            return Refusal(f"it pads with mode {given['mode']!r}; zeros are what a layer pads with by itself")
        if given.get("value"):
            return Refusal(f"it pads with {given['value']}, where a layer would pad with zeros")
        return padding_map(given["input"], tuple(given["pad"]), Signal())

    def _sum(self, node: fx.Node, target: Any) -> Lifted:
        sign = -1 if target in (operator.sub, operator.isub, torch.sub) else 1
        values = _two(node)
        if values is None:
            return None
        a, b = values
        alpha = node.kwargs.get("alpha", 1)
        if not isinstance(alpha, (int, float)):
            return None
        if self._variable(a) and self._variable(b):
            return Join((a, b), (1, sign * alpha))
        if self._variable(a):
            return _shift(a, 1, self.constants.value(b), sign * alpha)
        return _shift(b, sign * alpha, self.constants.value(a), 1) if self._variable(b) else None

    def _reversed_difference(self, node: fx.Node, target: Any) -> Lifted:
        """``torch.rsub(a, b)``, which is b - a."""
        values, alpha = _two(node), node.kwargs.get("alpha", 1)
        if values is None or not isinstance(alpha, (int, float)) or not self._variable(values[0]):
            return None
        a, b = values
        return Join((b, a), (1, -alpha)) if self._variable(b) else _shift(a, -alpha, self.constants.value(b), 1)

    def _times(self, node: fx.Node, target: Any) -> Lifted:
        values = _two(node)
        if values is None or node.kwargs.get("rounding_mode") is not None:
            return None
        a, b = values
        if target in (operator.truediv, operator.itruediv, torch.div):
            factor = self.constants.value(b) if self._variable(a) and not self._variable(b) else None
            if not isinstance(factor, (int, float, Tensor)) or not _is_real(factor) or _has_zero(factor):
                return None
            return scale_and_shift(a, 1 / factor, 0)
        if self._variable(a) == self._variable(b):
            return None
        source, factor = (a, self.constants.value(b)) if self._variable(a) else (b, self.constants.value(a))
        return scale_and_shift(source, factor, 0) if _is_real(factor) else None

    def _negative(self, node: fx.Node, target: Any) -> Lifted:
        return scale_and_shift(node.all_input_nodes[0], -1, 0)

    def _concatenation(self, node: fx.Node, target: Any) -> Lifted:
        tensors = node.kwargs.get("tensors", node.args[0] if node.args else None)
        axis = node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if len(node.args) > 1 else 0))
        if not isinstance(tensors, (list, tuple)) or not isinstance(axis, int) or not tensors:
            return None
        branches = [value for value in tensors if isinstance(value, fx.Node)]
        if not all(self._variable(value) for value in tensors):
            return None
        return Join(tuple(branches), None, axis)

    def _parts(self, node: fx.Node, target: Any) -> Lifted:
        """``chunk`` and ``split`` leave the value as it is: taking one of their parts selects channels."""
        given = self._given(node, ("input", "number", "dim"))
        indexed = all(_index(user) is not None for user in node.users)
        if given is None or not indexed or self._bounds(node) is None:
            return None
        return Unary(given["input"], lambda _: None, whole=False)

    def _bounds(self, node: fx.Node) -> tuple[Callable[[int, int], slice], int] | None:
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

    def _item(self, node: fx.Node, target: Any) -> Lifted:
        source, key = node.args
        if not isinstance(source, fx.Node) or not self._variable(source):
            return None
        index = _index(node)
        if index is not None:
            bounds = self._bounds(source) if _target(source) in _PARTED else None
            if bounds is None or index < 0:
                return None
            part, axis = bounds
            return selection(source, lambda channels: part(index, channels), axis)
        keys = key if isinstance(key, tuple) else (key,)
        if not all(isinstance(k, slice) or k is Ellipsis for k in keys):
            return None
        return _slices(source, keys)

    def _narrow(self, node: fx.Node, target: Any) -> Lifted:
        given = self._given(node, ("input", "dim", "start", "length"))
        if given is None or not all(isinstance(given.get(name), int) for name in ("dim", "start", "length")):
            return None
        start, length = given["start"], given["length"]
        if start < 0:
            return None
        return selection(given["input"], lambda _: slice(start, start + length), given["dim"])


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


def _with_rank(part: Unary, rank: int) -> Unary:
    known = Signal(rank=rank)
    return Unary(
        part.source,
        part.make,
        part.reads.known_with(known),
        part.gives.known_with(known),
        part.channels,
        part.computes,
        part.tensors,
    )


def _is_real(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_complex()
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _has_zero(value: float | Tensor) -> bool:
    return bool((value == 0).any()) if isinstance(value, Tensor) else value == 0


def _two(node: fx.Node) -> tuple[Any, Any] | None:
    """Both arguments of a binary operation."""
    given = dict(zip(("input", "other"), node.args, strict=False)) | dict(node.kwargs)
    return (given["input"], given["other"]) if {"input", "other"} <= given.keys() else None


def _index(node: fx.Node) -> int | None:
    """i, where ``node`` is ``value[i]``."""
    if node.target is operator.getitem and isinstance(node.args[1], int):
        return node.args[1]
    return None


def _target(node: fx.Node) -> Any:
    return _METHODS.get(str(node.target)) if node.op == "call_method" else node.target


def _nodes(values: Any) -> list[fx.Node]:
    found: list[fx.Node] = []

    def note(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.node.map_arg(values, note)
    return found


_PARTED = {torch.chunk, torch.split}
_RULES: dict[Any, Callable[[Calls, fx.Node, Any], Lifted]] = {
    **dict.fromkeys(_CONVOLUTIONS, Calls._convolution),
    **dict.fromkeys(_TRANSPOSED, Calls._transposed),
    **dict.fromkeys(_POOLS, Calls._pool),
    F.linear: Calls._linear,
    **dict.fromkeys((operator.matmul, torch.matmul, torch.mm), Calls._matmul),
    torch.addmm: Calls._addmm,
    F.batch_norm: Calls._batch_norm,
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout), Calls._dropout),
    F.pad: Calls._pad,
    **dict.fromkeys((operator.add, operator.sub, torch.add, torch.sub, operator.iadd, operator.isub), Calls._sum),
    **dict.fromkeys(
        (operator.mul, operator.truediv, torch.mul, torch.div, operator.imul, operator.itruediv), Calls._times
    ),
    torch.rsub: Calls._reversed_difference,
    **dict.fromkeys((operator.neg, torch.neg), Calls._negative),
    **dict.fromkeys((torch.cat, torch.concat), Calls._concatenation),
    **dict.fromkeys(_PARTED, Calls._parts),
    operator.getitem: Calls._item,
    torch.narrow: Calls._narrow,
}
_METHODS: dict[str, Any] = {
    **{
        name: getattr(torch, name)
        for name in ("add", "sub", "mul", "div", "neg", "matmul", "mm", "chunk", "split", "narrow")
    },
    "add_": torch.add,
    "sub_": torch.sub,
    "mul_": torch.mul,
    "div_": torch.div,
    "__getitem__": operator.getitem,
}
