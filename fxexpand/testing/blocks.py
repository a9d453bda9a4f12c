"""Small blocks of the kinds that networks are made of: what ``networks()`` draws, and what its examples print."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """x + f(x), where f may be called several times, with a ReLU in between, under a second name."""

    def __init__(self, inner: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.inner = inner
        self.alias = inner
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        for _ in range(1, self.times):
            y = self.alias(torch.relu(y))
        return x + y


class Functional(nn.Module):
    """A 3×3 convolution written as a call, its weight and bias parameters of the module."""

    def __init__(self, channels: int, *, bias: bool = True, stride: int = 1) -> None:
        super().__init__()
        self.channels = channels
        self.bias = bias
        self.stride = stride
        self.weight = nn.Parameter(torch.randn(channels, channels, 3, 3) / 6)
        self.offset = nn.Parameter(torch.randn(channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.offset, stride=self.stride, padding=1)


class Picky(nn.Module):
    """A block whose path depends on its input: nothing that a graph could stand for."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x) if x.sum() > 0 else self.inner(-x)
        return y


class Branches(nn.Module):
    """The sum, or the concatenation over channels, of two branches of one input."""

    def __init__(self, left: nn.Module, right: nn.Module, join: str = "add") -> None:
        super().__init__()
        self.left = left
        self.right = right
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        pair = [self.left(x), self.right(x)]
        return torch.cat(pair, 1) if self.join == "cat" else pair[0] + pair[1]


class Outer(nn.Module):
    """A module around another one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Any) -> Any:
        return self.inner(*inputs)


class UserConv(nn.Conv2d):
    """A layer as users subclass it: with something of its own, and torch's forward."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.note = "mine"
        self.register_buffer("mask", torch.ones(3))
