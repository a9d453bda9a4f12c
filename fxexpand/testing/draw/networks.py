"""Small image networks: what users have, in a few layers."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from torch import nn

from fxexpand.testing.blocks import Branches, Functional, Picky, Residual
from fxexpand.testing.case import Case

_CHANNELS = 4


@st.composite
def networks(draw: st.DrawFn, size: int = 9) -> Case:
    """A network for images of ``size`` × ``size``: blocks of every kind, a pool, and a linear layer at the end.

    Nonlinearities, pools, batch norm, residuals, branches, modules that are called twice or under two names, functional
    calls, and blocks that cannot be traced.
    """
    blocks = draw(st.lists(_blocks(), min_size=1, max_size=4))
    head = nn.Linear(_CHANNELS, 3)
    return Case(nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head), [(3, _CHANNELS, size, size)])


@st.composite
def _blocks(draw: st.DrawFn) -> nn.Module:
    kind = draw(st.sampled_from(_KINDS))
    if kind == "functional":
        return Functional(_CHANNELS, bias=draw(st.booleans()), stride=draw(st.integers(1, 2)))
    if kind == "strided":
        return nn.Sequential(nn.Conv2d(_CHANNELS, _CHANNELS, 3, stride=2, padding=1), nn.SiLU())
    if kind == "pool":
        pools = (nn.AvgPool2d(2, ceil_mode=True), nn.MaxPool2d(3, stride=2, padding=1), nn.AvgPool2d(3, 1, 1))
        return draw(st.sampled_from(pools))
    conv = draw(_convolutions())
    if kind == "norm":
        return nn.Sequential(conv, nn.BatchNorm2d(_CHANNELS), nn.ReLU())
    if kind == "picky":
        return Picky(conv)
    if kind == "branches":
        other = nn.Conv2d(_CHANNELS, _CHANNELS, 1, bias=draw(st.booleans()))
        if draw(st.booleans()):
            return Branches(nn.Sequential(conv, nn.BatchNorm2d(_CHANNELS)), other)
        return nn.Sequential(Branches(conv, other, join="cat"), nn.Conv2d(2 * _CHANNELS, _CHANNELS, 1))
    if kind == "depthwise":
        wide = nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1, groups=_CHANNELS, bias=False)
        return nn.Sequential(wide, nn.BatchNorm2d(_CHANNELS), nn.Hardswish(), nn.Conv2d(_CHANNELS, _CHANNELS, 1))
    return conv if kind == "conv" else Residual(conv, times=2 if kind == "shared" else 1)


_KINDS = (
    *("conv", "norm", "residual", "strided", "pool"),
    *("depthwise", "functional", "shared", "branches", "picky"),
)


@st.composite
def _convolutions(draw: st.DrawFn) -> nn.Module:
    """A convolution that keeps the size of its input."""
    kernel_size: Any = draw(st.sampled_from((3, 5, (1, 3))))
    return nn.Conv2d(
        _CHANNELS,
        _CHANNELS,
        kernel_size,
        padding="same",
        groups=draw(st.sampled_from((1, 2, _CHANNELS))),
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(("zeros", "replicate"))),
    )
