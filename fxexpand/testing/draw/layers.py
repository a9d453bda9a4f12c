"""Layers, and chains of layers."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from hypothesis import assume
from torch import nn

from fxexpand.testing.blocks import UserConv
from fxexpand.testing.case import Case
from fxexpand.testing.draw.sizes import LENGTHS, PADDING_MODES, divisors, tuples
from fxexpand.testing.draw.sketch import Sketch
from fxexpand.testing.draw.steps import convolutions as conv_steps
from fxexpand.testing.draw.steps import unary

_CONVOLUTIONS: Any = (None, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CHAIN_LENGTHS = {0: 3, 1: 9, 2: 6, 3: 4}


@st.composite
def convolutions(draw: st.DrawFn, kernel_size: tuple[int, ...] | None = None) -> nn.Module:
    """A ``Conv1d``, ``Conv2d`` or ``Conv3d`` with any of its options; with ``kernel_size``, where it is given."""
    if kernel_size is None:
        d = draw(st.integers(1, 3))
        kernel_size = draw(tuples(d, st.integers(1, 4 if d < 3 else 2)))
    d = len(kernel_size)
    m, n = draw(st.integers(1, 4)), draw(st.sampled_from((1, 2, 3, 4, 6)))
    padding = draw(st.sampled_from(("valid", "same")) | tuples(d, st.integers(0, 2)))
    options: dict[str, Any] = {
        "stride": (1,) * d if padding == "same" else draw(tuples(d, st.integers(1, 3))),  # torch has no other "same"
        "padding": padding,
        "dilation": draw(tuples(d, st.integers(1, 2 if max(kernel_size) < 6 else 1))),
        "groups": draw(st.sampled_from(divisors(m, n))),
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(PADDING_MODES)),
    }
    cls: Any = draw(st.sampled_from((nn.Conv2d, UserConv))) if d == 2 else _CONVOLUTIONS[d]
    layer: nn.Module = cls(m, n, kernel_size, **options)
    return layer


@st.composite
def expandable_layers(draw: st.DrawFn, kernel_size: tuple[int, ...] | None = None) -> Case:
    """A layer that strategies are about: a ``Linear``, or a ``ConvNd`` with any of its options."""
    if kernel_size == () or (kernel_size is None and draw(st.integers(0, 3)) == 0):
        linear = nn.Linear(draw(st.integers(1, 7)), draw(st.integers(1, 7)), bias=draw(st.booleans()))
        return Case(linear, [(2, linear.in_features)])
    layer: Any = draw(convolutions(kernel_size))
    size = [LENGTHS[len(layer.kernel_size)] + draw(st.integers(0, 3)) for _ in layer.kernel_size]
    return Case(layer, [(2, layer.in_channels, *size)])


def layers() -> st.SearchStrategy[Case]:
    """Any linear layer with any of its options.

    ``Linear``, ``ConvNd`` and ``ConvTransposeNd``, batch norm in eval mode, average pools, zero padding, identities.
    """
    return st.one_of(expandable_layers(), _stretches(unary(modules=True), 1), _stretches(_transposed(), 1))


def linear_chains(max_length: int = 5) -> st.SearchStrategy[Case]:
    """Linear layers one after another, in an ``nn.Sequential``."""
    return _stretches(st.one_of(unary(modules=True), unary(modules=True), _transposed()), max_length)


def _transposed() -> Any:
    return conv_steps(transposed=True, modules=True)


@st.composite
def _stretches(draw: st.DrawFn, steps: Any, most: int) -> Case:
    """Modules one after another, as many as fit; a single one stands for itself."""
    d = draw(st.integers(0, 3))
    shape = (2, draw(st.sampled_from((2, 4, 3, 1))), *(_CHAIN_LENGTHS[d] + draw(st.integers(0, 2)) for _ in range(d)))
    sketch = Sketch(shape, 1, batched=True)
    for add in draw(st.lists(steps, min_size=1, max_size=most)):
        value = sketch.tried(add, sketch.values[-1])
        if value is not None:
            sketch.values.append(value)
    modules = list(sketch.root.children())
    assume(modules)
    return Case(modules[0] if most == 1 else nn.Sequential(*modules), [shape])
