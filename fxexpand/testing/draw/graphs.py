"""Hypothesis strategies for graphs of linear nodes, joins and a few nonlinearities, with values and modules used twice.

A graph is drawn as a list of steps that know nothing of shapes; what each becomes is decided where it is added, and
one that does not fit there is left out. So Hypothesis can drop any step of a failing example.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxexpand.testing.blocks import Outer
from fxexpand.testing.case import Case
from fxexpand.testing.draw.sketch import Shape, Sketch
from fxexpand.testing.draw.steps import Add, call, convolutions, module, nth, unary

_LENGTHS = {0: 3, 1: 9, 2: 6, 3: 4}

NONLINEAR = (
    module(nn.ReLU),
    module(lambda: nn.ReLU(inplace=True)),
    call(F.relu, inplace=True),
    call(torch.tanh),
    call("relu_"),
)
OTHER_AXES = (call(torch.flatten, 1), call("transpose", 1, -1))


@dataclass(frozen=True)
class Step:
    """``add`` behind the value that comes ``back`` values before the last one."""

    add: Add
    back: int = 0


@st.composite
def joins(draw: st.DrawFn) -> Add:
    """A value with another one that fits: added, subtracted, concatenated, or multiplied, which is not linear."""
    other, kind = draw(st.integers(0, 4)), draw(st.sampled_from(("add", "add", "cat", "iadd", "sub", "alpha", "mul")))
    broadcast, swapped, from_end = draw(st.integers(0, 5)) == 5, draw(st.booleans()), draw(st.booleans())

    def add(sketch: Sketch, value: fx.Node) -> fx.Node:
        shape, d = sketch.shapes[value], sketch.dims(value)
        axis = len(shape) - d - 1
        values = [v for v in reversed(sketch.values) if len(sketch.shapes[v]) == len(shape)]
        if kind == "cat":
            fitting = [v for v in values if _but(sketch.shapes[v], axis) == _but(shape, axis)]
        else:
            fitting = [v for v in values if broadcast or sketch.shapes[v] == shape]
        pair = [value, nth(fitting, other + 1)]  # the first one may be the value itself
        a, b = pair[::-1] if swapped else pair
        if kind == "cat":
            return sketch.call(torch.cat, [a, b], axis - len(shape) if from_end else axis)
        if kind == "alpha":
            return sketch.call(torch.add, a, b, alpha=0.5)
        return sketch.call(getattr(operator, kind), a, b)

    return add


@st.composite
def blocks(draw: st.DrawFn) -> Add:
    """Branches from one value, joined where they fit: added, else concatenated over channels."""
    chains = draw(st.lists(st.lists(unary(), max_size=3), min_size=2, max_size=3))
    join = draw(st.sampled_from((operator.add, operator.sub, operator.iadd)))

    def add(sketch: Sketch, value: fx.Node) -> fx.Node:
        ends = [_chained(sketch, value, chain) for chain in chains]
        whole = ends[0]
        for end in ends[1:]:
            same = sketch.shapes[whole] == sketch.shapes[end]
            axis = len(sketch.shapes[whole]) - sketch.dims(whole) - 1
            whole = sketch.call(join, whole, end) if same else sketch.call(torch.cat, [whole, end], axis)
        return whole

    return add


def _chained(sketch: Sketch, value: fx.Node, chain: list[Add]) -> fx.Node:
    for add in chain:
        value = sketch.tried(add, value) or value
    return value


@st.composite
def repeats(draw: st.DrawFn) -> Add:
    """A module that is there called again, or a second name for it."""
    index, renamed = draw(st.integers(0, 3)), draw(st.booleans())

    def add(sketch: Sketch, value: fx.Node) -> fx.Node:
        path = nth([name for name, _ in sketch.root.named_children()], index)
        if renamed:
            module, path = sketch.root.get_submodule(path), f"{path}_alias"
            sketch.root.add_module(path, module)
        return sketch.again(path, value)

    return add


def _but(shape: Shape, axis: int) -> Shape:
    return shape[:axis] + shape[axis + 1 :]


def _steps() -> st.SearchStrategy[Step]:
    adds = st.one_of(
        unary(),
        unary(),
        joins(),
        blocks(),
        repeats(),
        convolutions(transposed=True),
        st.sampled_from((*NONLINEAR, *OTHER_AXES)),
    )
    return st.builds(Step, adds, st.sampled_from((0, 0, 0, 1, 2)))


@st.composite
def linear_graphs(draw: st.DrawFn) -> Case:
    """Any graph, with one or two inputs of the same shape; in a few cases, inside another module."""
    d, batched = draw(st.integers(0, 3)), draw(st.integers(0, 5)) < 5
    channels = draw(st.sampled_from((2, 4, 3, 1)))
    sizes = [_LENGTHS[d] + draw(st.integers(0, 2)) for _ in range(d)]
    shape = (*((2,) if batched else ()), channels, *sizes)
    sketch = Sketch(shape, draw(st.sampled_from((1, 1, 1, 2))), batched=batched)
    for step in draw(st.lists(_steps(), min_size=1, max_size=8)):
        last = len(sketch.values) - 1
        value = sketch.tried(step.add, sketch.values[max(last - step.back, 0)])
        if value is not None:
            sketch.values.append(value)
    returned = draw(st.lists(st.integers(1, 6), max_size=1))
    outputs = [sketch.values[-1], *(sketch.values[-1 - back] for back in returned if back < len(sketch.values))]
    gm = sketch.finish(outputs)
    inputs = [shape for node in gm.graph.nodes if node.op == "placeholder"]
    return Case(Outer(gm) if draw(st.integers(0, 4)) == 4 else gm, inputs)
