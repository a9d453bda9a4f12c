"""Hypothesis strategies for layers with a strategy that can keep their function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
from torch import Tensor, nn

from drawing import random
from fxexpand import CK, CL, FC
from fxexpand.strategies import Strategy
from fxexpand.testing.draw.layers import convolutions
from fxexpand.testing.draw.sizes import LENGTHS


@dataclass
class Expansion:
    """A layer in float64, a strategy for it, and the size of a signal for it (without batch)."""

    layer: nn.Module
    strategy: Strategy
    size: tuple[int, ...]

    @property
    def channels(self) -> int:
        layer: Any = self.layer
        return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)

    def signal(self, batch: int = 2) -> Tensor:
        shape = (self.channels,) if isinstance(self.layer, nn.Linear) else (self.channels, *self.size)
        return random(batch, *shape)


@st.composite
def _by_cl(draw: st.DrawFn) -> Expansion:
    d = draw(st.integers(1, 3))
    taps = draw(st.tuples(*[st.integers(1, 4 if d < 3 else 3)] * d).filter(lambda k: max(k) > 1))
    rate = draw(st.sampled_from((1, 1.5, 2, 3)))
    return Expansion(draw(convolutions(taps)).double(), CL(rate), _size(draw, d))


@st.composite
def _by_ck(draw: st.DrawFn) -> Expansion:
    d = draw(st.integers(1, 2))
    taps = draw(st.tuples(*[st.sampled_from((5, 1, 3, 7, 9))] * d).filter(lambda k: max(k) > 3))
    return Expansion(draw(convolutions(taps)).double(), CK(draw(st.sampled_from((4, 5)))), _size(draw, d))


@st.composite
def _by_fc(draw: st.DrawFn) -> Expansion:
    layer = nn.Linear(draw(st.integers(1, 7)), draw(st.integers(1, 7)), bias=draw(st.booleans()))
    return Expansion(layer.double(), FC(draw(st.sampled_from((1, 1.5, 2, 4))), depth=draw(st.integers(2, 4))), ())


def expansions() -> st.SearchStrategy[Expansion]:
    """Any layer with a strategy for it."""
    return st.one_of(_by_fc(), _by_cl(), _by_ck())


def _size(draw: st.DrawFn, d: int) -> tuple[int, ...]:
    return tuple(LENGTHS[d] + draw(st.integers(0, 3)) for _ in range(d))
