"""Hypothesis strategies for layers with a strategy that can keep their function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
from hypothesis import assume
from torch import Tensor, nn

from drawing import random
from fxexpand import CK, CL, FC
from fxexpand.graph.find import layer_site
from fxexpand.strategies import ACNet, DiverseBranch, MobileOne, Orepa, Overparam, RepVGG, Strategy
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


# Strategies of every structure: branches, with and without batch norm; branches of chains; chains of branches.
BRANCHES: tuple[Strategy, ...] = (
    ACNet(),
    RepVGG(),
    MobileOne(2),
    DiverseBranch(),
    Orepa(2),
    Overparam(1.5, depth=4, residual=True),
    CL(2).then(RepVGG()),
    RepVGG().then(CL(1)),
)
WITH_NORM: tuple[Strategy, ...] = (ACNet(True), RepVGG(True), MobileOne(2, True), DiverseBranch(True))


@st.composite
def _by_branches(draw: st.DrawFn, strategies: tuple[Strategy, ...]) -> Expansion:
    """A convolution that some of ``strategies`` reach; in eval mode, in which batch norm is a part of one layer."""
    d = draw(st.integers(1, 3))
    conv = draw(convolutions(draw(st.tuples(*[st.integers(2, 4 if d < 3 else 3)] * d)))).double().eval()
    site = layer_site(conv, "conv", reads_input=False, expanded=False)
    fitting = [s for s in strategies if d in s.dims and s.reaches(site) and (s.collapses or site.has_bias)]
    assume(fitting)
    return Expansion(conv, draw(st.sampled_from(fitting)), _size(draw, d))


def chain_expansions() -> st.SearchStrategy[Expansion]:
    """Any layer with a strategy that makes a chain of layers of it."""
    return st.one_of(_by_fc(), _by_cl(), _by_ck())


def branch_expansions(*, batch_norm: bool) -> st.SearchStrategy[Expansion]:
    """A convolution in eval mode, with a strategy that makes branches of it, with or without batch norm in them."""
    return _by_branches(WITH_NORM if batch_norm else BRANCHES)


def expansions() -> st.SearchStrategy[Expansion]:
    """Any layer with a strategy for it."""
    branches = branch_expansions(batch_norm=False) | branch_expansions(batch_norm=True)
    return chain_expansions() | branches


def _size(draw: st.DrawFn, d: int) -> tuple[int, ...]:
    return tuple(LENGTHS[d] + draw(st.integers(0, 3)) for _ in range(d))
