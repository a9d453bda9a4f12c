"""Hypothesis strategies for the linear steps of a graph; each draws what adds the step behind a value.

They know nothing of shapes: what a step becomes is decided where it is added.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxexpand.testing.draw.drafts import conv_drafts, triples
from fxexpand.testing.draw.sketch import Misfit, Sketch

# Adds calls behind a value, and gives the new value.
Add: TypeAlias = "Callable[[Sketch, fx.Node], fx.Node]"

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
    """The step that calls a new module."""
    return lambda sketch, value: sketch.module(make(), value)


def call(function: Any, *args: Any, **kwargs: Any) -> Add:
    """The step that calls a function, or a method by its name."""
    return lambda sketch, value: sketch.call(function, value, *args, **kwargs)


def nth(choices: Any, index: int) -> Any:
    """A choice that any number makes; the first one for 0."""
    if not choices:
        raise Misfit
    return choices[index % len(choices)]


PASSING = (module(nn.Identity), module(nn.Dropout), call(F.dropout, training=False))


@st.composite
def convolutions(draw: st.DrawFn, transposed: bool = False, *, modules: bool = False) -> Add:
    """A convolution with any options, as a module or as a call."""
    draft = draw(conv_drafts(transposed=transposed))
    functional, unbatched = not modules and draw(st.booleans()), draw(st.integers(0, 19)) == 19

    def add(sketch: Sketch, value: fx.Node) -> fx.Node:
        shape = sketch.shapes[value]
        d = sketch.dims(value) + (1 if unbatched and sketch.batched else 0)
        if not 1 <= d <= 3:
            raise Misfit
        layer: Any = draft.build(d, shape[-d - 1])
        if not functional or draft.mode != "zeros":
            return sketch.module(layer, value)
        weight, shift = sketch.constant(layer.weight), sketch.constant(layer.bias)
        names = ("stride", "padding", "output_padding", "groups", "dilation")
        settings = {name: getattr(layer, name) for name in names if transposed or name != "output_padding"}
        return sketch.call(_CALLS[type(layer)], value, weight, shift, **settings)

    return add


@st.composite
def linears(draw: st.DrawFn, *, modules: bool = False) -> Add:
    """A linear layer on the last axis, whatever axis that is."""
    n, bias = draw(st.sampled_from((3, 2, 4))), draw(st.booleans())
    form = "module" if modules else draw(st.sampled_from(("module", "linear", "matmul", "addmm")))

    def add(sketch: Sketch, value: fx.Node) -> fx.Node:
        layer = nn.Linear(sketch.shapes[value][-1], n, bias=bias)
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
def norms(draw: st.DrawFn, *, modules: bool = False) -> Add:
    """Batch norm in eval mode, on axis 1, whatever axis that is."""
    affine, functional = draw(st.booleans()), not modules and draw(st.booleans())

    def add(sketch: Sketch, value: fx.Node) -> fx.Node:
        shape = sketch.shapes[value]
        if not 2 <= len(shape) <= 5:
            raise Misfit
        norm = _NORMS[len(shape) - 2](shape[1], affine=affine)
        if not functional:
            return sketch.module(norm, value)
        buffers = [sketch.constant(t, buffer=True) for t in (norm.running_mean, norm.running_var)]
        return sketch.call(F.batch_norm, value, *buffers, sketch.constant(norm.weight), sketch.constant(norm.bias))

    return add


@st.composite
def pools(draw: st.DrawFn, *, modules: bool = False) -> Add:
    """An average pool."""
    window, stride = draw(triples(st.integers(1, 3))), draw(st.none() | triples(st.integers(1, 2)))
    padding, ceil, count = draw(st.sampled_from((0, 0, 1))), draw(st.integers(0, 4)) == 4, draw(st.integers(0, 4)) < 4
    functional = not modules and draw(st.booleans())

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
def paddings(draw: st.DrawFn, *, modules: bool = False) -> Add:
    """Zeros around the signal, or a crop; sometimes around its channels, or of another kind, which no layer does."""
    amounts = draw(st.lists(st.sampled_from((0, 1, 2, -1)), min_size=2, max_size=6).map(lambda a: a[: len(a) // 2 * 2]))
    kind = "module" if modules else draw(st.sampled_from(("zeros", "zeros", "zeros", "module", "ones", "replicate")))

    def add(sketch: Sketch, value: fx.Node) -> fx.Node:
        d = sketch.dims(value)
        if modules and not 1 <= d <= 3:
            raise Misfit
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
            operand = sketch.constant(torch.empty(shapes.get(constant, ())))
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


def unary(*, modules: bool = False) -> st.SearchStrategy[Add]:
    """Any linear step with one operand; with ``modules``, only such as are the call of a module."""
    common = (convolutions(modules=modules), norms(modules=modules))
    rarer = (linears(modules=modules), pools(modules=modules), paddings(modules=modules))
    if modules:
        return st.one_of(*common, *common, *rarer, st.sampled_from(PASSING[:2]))
    return st.one_of(convolutions(), *common, scalings(), *rarer, selections(), st.sampled_from(PASSING))
