"""Hypothesis strategies for layers to expand, rules that fit them, and small networks around them."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor, nn

import drawing
from fxexpand import CK, CL, FC
from fxexpand.strategies import Strategy

CONVOLUTIONS: tuple[type[nn.Conv1d], type[nn.Conv2d], type[nn.Conv3d]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# A signal that every padding mode and window below fits in.
LENGTHS = {1: 17, 2: 13, 3: 9}


class UserConv(nn.Conv2d):
    """A layer as users subclass it: with something of its own, and torch's forward."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.note = "mine"
        self.register_buffer("mask", torch.ones(3, dtype=torch.float64))


@dataclass
class Case:
    """A layer, a strategy that can keep its function, and the size of a signal for it (without batch)."""

    layer: nn.Module
    strategy: Strategy
    size: tuple[int, ...]

    @property
    def channels(self) -> int:
        layer: Any = self.layer
        return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)

    def signal(self, batch: int = 2) -> Tensor:
        shape = (self.channels,) if isinstance(self.layer, nn.Linear) else (self.channels, *self.size)
        return drawing.random(batch, *shape)


@st.composite
def convolutions(draw: st.DrawFn, kernel_size: tuple[int, ...]) -> nn.Module:
    """A ``ConvNd`` in float64 with ``kernel_size`` and any other option."""
    d = len(kernel_size)
    m, n = draw(st.sampled_from((1, 2, 3, 4))), draw(st.sampled_from((1, 2, 3, 4, 6)))
    padding = draw(st.sampled_from(("same", "valid")) | st.tuples(*[st.integers(0, 2)] * d))
    options: dict[str, Any] = {
        "stride": (1,) * d if padding == "same" else draw(st.tuples(*[st.integers(1, 3)] * d)),
        "padding": padding,
        "dilation": draw(st.tuples(*[st.integers(1, 2 if max(kernel_size) < 6 else 1)] * d)),
        "groups": draw(st.sampled_from([g for g in range(1, m + 1) if gcd(m, n) % g == 0])),
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(("zeros", "reflect", "replicate", "circular"))),
    }
    cls: Any = draw(st.sampled_from((nn.Conv2d, UserConv))) if d == 2 else CONVOLUTIONS[d - 1]
    layer: nn.Module = cls(m, n, kernel_size, dtype=torch.float64, **options)
    return layer


@st.composite
def cl_cases(draw: st.DrawFn) -> Case:
    d = draw(st.integers(1, 3))
    taps = draw(st.tuples(*[st.integers(1, 4 if d < 3 else 3)] * d).filter(lambda k: max(k) > 1))
    return Case(draw(convolutions(taps)), CL(draw(st.sampled_from((1, 1.5, 2, 3)))), _size(draw, d))


@st.composite
def ck_cases(draw: st.DrawFn) -> Case:
    d = draw(st.integers(1, 2))
    taps = draw(st.tuples(*[st.sampled_from((5, 1, 3, 7, 9))] * d).filter(lambda k: max(k) > 3))
    return Case(draw(convolutions(taps)), CK(draw(st.sampled_from((4, 5)))), _size(draw, d))


@st.composite
def fc_cases(draw: st.DrawFn) -> Case:
    m, n = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    layer = nn.Linear(m, n, bias=draw(st.booleans()), dtype=torch.float64)
    return Case(layer, FC(draw(st.sampled_from((1, 1.5, 2, 4))), depth=draw(st.integers(2, 4))), ())


def cases() -> st.SearchStrategy[Case]:
    """Any layer with a strategy for it."""
    return st.one_of(fc_cases(), cl_cases(), ck_cases())


def _size(draw: st.DrawFn, d: int) -> tuple[int, ...]:
    return tuple(LENGTHS[d] + draw(st.integers(0, 3)) for _ in range(d))


class Functional(nn.Module):
    """A convolution written as a call, its weight and bias parameters of the module."""

    def __init__(self, channels: int, *, bias: bool, stride: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(drawing.random(channels, channels, 3, 3) / 6)  # 1/√fan-in
        self.offset = nn.Parameter(drawing.random(channels)) if bias else None
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, self.weight, self.offset, stride=self.stride, padding=1)


class Residual(nn.Module):
    """x + f(x), where f may be called twice."""

    def __init__(self, inner: nn.Module, times: int) -> None:
        super().__init__()
        self.inner = inner
        self.alias = inner  # a second name for the same module
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        for _ in range(1, self.times):
            y = self.alias(torch.relu(y))
        return x + y


class Picky(nn.Module):
    """A block whose path depends on its input: nothing that FX could trace."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x) if x.sum() > 0 else self.inner(-x)
        return y


@st.composite
def networks(draw: st.DrawFn, channels: int = 4) -> nn.Module:
    """A small image network in float64: blocks of every kind, a pool, and a linear layer at the end."""
    blocks = draw(st.lists(_blocks(channels), min_size=1, max_size=4))
    head = nn.Linear(channels, 3, dtype=torch.float64)
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double()


@st.composite
def _blocks(draw: st.DrawFn, channels: int) -> nn.Module:
    kernel_size: Any = draw(st.sampled_from((3, 5, (1, 3))))
    conv = nn.Conv2d(
        channels,
        channels,
        kernel_size,
        padding="same",
        groups=draw(st.sampled_from((1, 2, channels))),
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(("zeros", "replicate"))),
    )
    kind = draw(st.sampled_from(("conv", "residual", "shared", "functional", "picky", "norm", "strided")))
    if kind == "functional":
        return Functional(channels, bias=draw(st.booleans()), stride=draw(st.integers(1, 2)))
    if kind == "strided":
        return nn.Sequential(nn.Conv2d(channels, channels, 3, stride=2, padding=1), nn.SiLU())
    if kind == "norm":
        return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())
    if kind == "picky":
        return Picky(conv)
    return conv if kind == "conv" else Residual(conv, times=2 if kind == "shared" else 1)
