"""Hypothesis strategies for the linear steps of a graph; each draws what adds the step behind a value.

They know nothing of shapes: what a step becomes is decided where it is added. Weights are random, in float64.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from torch import fx, nn

from drawing import PADDING_MODES
from sketching import Misfit, Sketch

# Adds calls behind a value, and gives the new value.
Add: TypeAlias = "Callable[[Sketch, fx.Node], fx.Node]"

_DOUBLE: dict[str, Any] = {"dtype": torch.float64}
_CONVOLUTIONS: Any = (None, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED: Any = (None, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS: Any = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_POOLS: Any = (None, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_ZERO_PADS: Any = (None, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
_CALLS: Any = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
    nn.AvgPool1d: F.avg_pool1d,
    nn.AvgPool2d: F.avg_pool2d,
    nn.AvgPool3d: F.avg_pool3d,
}


def module(make: Callable[[], nn.Module]) -> Add:
    return lambda sketch, value: sketch.module(make(), value)


def call(function: Any, *args: Any, **kwargs: Any) -> Add:
    return lambda sketch, value: sketch.call(function, value, *args, **kwargs)


def nth(choices: Any, index: int) -> Any:
    """A choice that any number makes; the first one for 0."""
    if not choices:
        raise Misfit
    return choices[index % len(choices)]


def _divisors(m: int, n: int) -> list[int]:
    return [g for g in range(1, m + 1) if m % g == n % g == 0]


def _triples(entries: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[int, int, int]]:
    return st.tuples(entries, entries, entries)


PASSING = (module(nn.Identity), module(nn.Dropout), call(F.dropout, training=False))


@st.composite
def convolutions(draw: st.DrawFn, transposed: bool = False) -> Add:
    """A convolution with any options, as a module or as a call."""
    taps, dilation = draw(_triples(st.sampled_from((1, 3, 2)))), draw(_triples(st.sampled_from((1, 1, 2))))
    stride = draw(_triples(st.sampled_from((1, 1, 2, 3))) if draw(st.booleans()) else st.just((1, 1, 1)))
    padding = draw(st.sampled_from(("none", "half", "full", "same")) | _triples(st.integers(0, 2)))
    out, group = draw(st.sampled_from((0, 0, 1, 2, 3, 4))), draw(st.sampled_from((0, 0, 1, -1)))
    bias = draw(st.booleans())
    mode = draw(st.sampled_from((*("zeros",) * 6, *PADDING_MODES)))
    functional, unbatched = draw(st.booleans()), draw(st.integers(0, 19)) == 19

    def add(sketch: Sketch, value: fx.Node) -> fx.Node:
        shape = sketch.shapes[value]
        d = sketch.dims(value) + (1 if unbatched and sketch.batched else 0)
        if not 1 <= d <= 3:
            raise Misfit
        m = shape[-d - 1]
        n = out or m
        k, steps = taps[:d], stride[:d]
        reach = [step * (taps - 1) for step, taps in zip(dilation, k, strict=False)]
        named: dict[Any, Any] = {"none": (0,) * d, "half": tuple(r // 2 for r in reach), "full": tuple(reach)}
        sides: Any = named.get(padding, padding)
        options: dict[str, Any] = {"groups": nth(_divisors(m, n), group), "bias": bias, "dilation": dilation[:d]}
        if transposed:
            sides = (0,) * d if sides == "same" else tuple(sides[:d])
            layer = _TRANSPOSED[d](m, n, k, steps, sides, output_padding=int(min(steps) > 1 and group == 1), **options)
        else:
            steps = (1,) * d if sides == "same" else steps  # torch has no other "same"
            sides = sides if sides == "same" else tuple(sides[:d])
            layer = _CONVOLUTIONS[d](m, n, k, steps, sides, padding_mode=mode, **options)
        if not functional or mode != "zeros":
            return sketch.module(layer, value)
        layer.double()
        weight, shift = sketch.constant(layer.weight), sketch.constant(layer.bias)
        names = ("stride", "padding", "output_padding", "groups", "dilation")
        settings = {name: getattr(layer, name) for name in names if transposed or name != "output_padding"}
        return sketch.call(_CALLS[type(layer)], value, weight, shift, **settings)

    return add


@st.composite
def linears(draw: st.DrawFn) -> Add:
    """A linear layer on the last axis, whatever axis that is."""
    n, bias = draw(st.sampled_from((3, 2, 4))), draw(st.booleans())
    form = draw(st.sampled_from(("module", "linear", "matmul", "addmm")))

    def add(sketch: Sketch, value: fx.Node) -> fx.Node:
        layer = nn.Linear(sketch.shapes[value][-1], n, bias=bias, **_DOUBLE)
        if form == "module":
            return sketch.module(layer, value)
        if form == "linear":
            return sketch.call(F.linear, value, sketch.constant(layer.weight), sketch.constant(layer.bias))
        weight = sketch.constant(layer.weight.t())
        if form == "matmul" or layer.bias is None:
            return sketch.call(operator.matmul, value, weight)
        return sketch.call(torch.addmm, sketch.constant(layer.bias), value, weight)

    return add


@st.composite
def norms(draw: st.DrawFn) -> Add:
    """Batch norm in eval mode with random statistics, on axis 1, whatever axis that is."""
    affine, functional = draw(st.booleans()), draw(st.booleans())

    def add(sketch: Sketch, value: fx.Node) -> fx.Node:
        shape = sketch.shapes[value]
        if not 2 <= len(shape) <= 5:
            raise Misfit
        norm = _NORMS[len(shape) - 2](shape[1], affine=affine)
        with torch.no_grad():
            for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
                tensor.uniform_(0.5, 2)
            norm.running_mean.sub_(1.2)
        if not functional:
            return sketch.module(norm, value)
        norm.double()
        buffers = [sketch.constant(t, buffer=True) for t in (norm.running_mean, norm.running_var)]
        return sketch.call(F.batch_norm, value, *buffers, sketch.constant(norm.weight), sketch.constant(norm.bias))

    return add


@st.composite
def pools(draw: st.DrawFn) -> Add:
    """An average pool."""
    window, stride = draw(_triples(st.integers(1, 3))), draw(st.none() | _triples(st.integers(1, 2)))
    padding, ceil, count = draw(st.sampled_from((0, 0, 1))), draw(st.integers(0, 4)) == 4, draw(st.integers(0, 4)) < 4
    functional = draw(st.booleans())

    def add(sketch: Sketch, value: fx.Node) -> fx.Node:
        d = sketch.dims(value)
        if not 1 <= d <= 3:
            raise Misfit
        steps = None if stride is None else stride[:d]
        cls = _POOLS[d]
        if functional:
            return sketch.call(_CALLS[cls], value, window[:d], steps, padding, ceil, count)
        return sketch.module(cls(window[:d], steps, padding, ceil, count), value)

    return add


@st.composite
def paddings(draw: st.DrawFn) -> Add:
    """Zeros around the signal, or a crop; sometimes around its channels, or of another kind, which no layer does."""
    amounts = draw(st.lists(st.sampled_from((0, 1, 2, -1)), min_size=2, max_size=6).map(lambda a: a[: len(a) // 2 * 2]))
    kind = draw(st.sampled_from(("zeros", "zeros", "zeros", "module", "ones", "replicate")))

    def add(sketch: Sketch, value: fx.Node) -> fx.Node:
        d = sketch.dims(value)
        if kind == "module" and 1 <= d <= 3:
            return sketch.module(_ZERO_PADS[d](tuple((amounts * 3)[: 2 * d])), value)
        if kind == "replicate":
            return sketch.call(F.pad, value, (amounts * 3)[: 2 * d], mode="replicate")
        return sketch.call(F.pad, value, amounts, value=1.0) if kind == "ones" else sketch.call(F.pad, value, amounts)

    return add


_OPERATORS: Any = {
    "*": (operator.mul, torch.mul, operator.imul, "mul"),
    "/": (operator.truediv, torch.div, operator.itruediv, "div"),
    "+": (operator.add, torch.add, operator.iadd, "add"),
    "-": (operator.sub, torch.sub, operator.isub, "sub"),
}


@st.composite
def scalings(draw: st.DrawFn) -> Add:
    """A constant multiplied by, divided by, added or subtracted: a number, one a channel, or one a column."""
    operation, form = draw(st.sampled_from("*+-/")), draw(st.sampled_from((0, 0, 1, 2, 3)))
    constant = draw(st.sampled_from(("number", "channels", "batch of channels", "columns", "tensor", "negative")))
    swapped = draw(st.integers(0, 3)) == 3

    def add(sketch: Sketch, value: fx.Node) -> fx.Node:
        shape, d = sketch.shapes[value], sketch.dims(value)
        if constant == "negative":
            return sketch.call(operator.neg, value)
        channels = shape[-d - 1]
        per_channel = (channels, *(1,) * d)
        shapes = {"channels": per_channel, "columns": shape[-1:], "batch of channels": (1, *per_channel)}
        operand: Any = 1.5
        if constant != "number":
            operand = sketch.constant(torch.rand(shapes.get(constant, ()), **_DOUBLE) + 0.5)
        function = _OPERATORS[operation][form]
        number_first = form == 0 or (form == 1 and constant != "number")  # torch.mul takes no number first
        if swapped and number_first and operation != "/":  # which would divide by what may be zero
            return sketch.call(function, operand, value)
        return sketch.call(function, value, operand)

    return add


@st.composite
def selections(draw: st.DrawFn) -> Add:
    """Some of the channels; sometimes of another axis."""
    kind, index = draw(st.sampled_from(("slice", "chunk", "split", "narrow"))), draw(st.integers(0, 2))
    odd, first, step = draw(st.integers(0, 5)) == 5, draw(st.integers(-2, 2)), draw(st.sampled_from((None, None, 2)))
    from_end = draw(st.booleans())

    def add(sketch: Sketch, value: fx.Node) -> fx.Node:
        shape, d = sketch.shapes[value], sketch.dims(value)
        axis = len(shape) - 1 if odd else len(shape) - d - 1
        named = axis - len(shape) if from_end else axis
        if kind == "slice":
            picked = slice(first or None, None if index == 0 else index + 1, step)
            all_of: list[Any] = [slice(None)] * len(shape)
            key = [Ellipsis, picked, *all_of[axis + 1 :]] if from_end else [*all_of[:axis], picked]
            return sketch.call(operator.getitem, value, tuple(key))
        if kind == "narrow":
            return sketch.call(torch.narrow, value, named, 0, max(1, shape[axis] - index))
        function: Any = (torch.chunk, "chunk") if kind == "chunk" else (torch.split, "split")
        parts = sketch.call(nth(function, index), value, 2, named)
        return sketch.call(operator.getitem, parts, index % len(sketch.shapes[parts]))

    return add


def unary() -> st.SearchStrategy[Add]:
    common = (convolutions(), convolutions(), norms(), scalings())
    return st.one_of(*common, linears(), pools(), paddings(), selections(), st.sampled_from(PASSING))
