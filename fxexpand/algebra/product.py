"""The weight of two kernels in series, as a product of their weights: linear in each, with its derivatives."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fxexpand.algebra.kernel import Ints, Kernel


class Product(Protocol):
    """(W₁, W₂) -> the weight of ``second ∘ first``.

    ``first`` is (c, m/g₁, *k₁), ``second`` (n, c/g₂, *k₂); the weight is (n, m/G, *K), contiguous: a convolution takes
    the memory format of its output from its weight, too. Everything here is differentiable, ``pull`` as well.
    """

    def weight(self, first: Tensor, second: Tensor) -> Tensor:
        """W₂ ∘ W₁."""

    def pull(self, first: Tensor, second: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients with respect to W₁ and W₂, for that of the weight."""


def product_of(first: Kernel, second: Kernel) -> Product | None:
    """How the weight of ``second ∘ first`` is made; shapes and settings alone are looked at.

    None for kernels of different groups that do not scale each other: they are to be written with equal groups first.
    """
    if first.pointwise or second.pointwise:  # one is a number for each channel: products without a sum
        if second.depthwise:
            return _scaled_after(first, second)
        if first.depthwise:
            return _scaled_before(first, second)
    if first.groups != second.groups:
        return None
    if second.pointwise:
        return PointwiseLast(first.groups)
    if first.pointwise:
        return PointwiseFirst(first.groups)
    return Spread.of(first, second)


def elements_turned(first: Kernel, second: Kernel) -> int:
    """How many elements of W₂ are moved before and after the product, besides being multiplied."""
    turns = _few(second.weight) and second.out_channels != second.groups
    return second.weight.numel() if turns and isinstance(product_of(first, second), PointwiseFirst) else 0


def tap_spacing(first: Kernel, second: Kernel) -> Ints:
    """The distance between neighbouring taps of the composition: gcd(δ₁, s₁·δ₂), of those that have two taps."""
    found = []
    for axis in range(first.dims):
        spacings = []
        if first.kernel_size[axis] > 1:
            spacings.append(first.dilation[axis])
        if second.kernel_size[axis] > 1:
            spacings.append(first.stride[axis] * second.dilation[axis])
        found.append(gcd(*spacings) if spacings else 1)
    return tuple(found)


@dataclass(frozen=True)
class Scaled:
    """One kernel is depthwise, one pointwise: each number is a product of two. ``left`` and ``right`` are the shapes
    to give the weights so that they broadcast, ``whole`` that of the result.
    """

    left: Ints
    right: Ints
    whole: Ints

    def weight(self, first: Tensor, second: Tensor) -> Tensor:
        return (first.reshape(self.left) * second.reshape(self.right)).reshape(self.whole)

    def pull(self, first: Tensor, second: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        left, right = first.reshape(self.left), second.reshape(self.right)
        both = gradient.reshape(torch.broadcast_shapes(self.left, self.right))
        through = (both * right).sum_to_size(self.left), (both * left).sum_to_size(self.right)
        return through[0].reshape(first.shape), through[1].reshape(second.shape)


@dataclass(frozen=True)
class PointwiseLast:
    """The second kernel has one tap: (G, n/G, c/G) @ (G, c/G, m/G·k₁) -> (G, n/G, m/G·k₁)."""

    groups: int

    def weight(self, first: Tensor, second: Tensor) -> Tensor:
        a, b = self._matrices(first, second)
        return _matmul(b, a).reshape(second.shape[0], *first.shape[1:])

    def pull(self, first: Tensor, second: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self._matrices(first, second)
        g = gradient.reshape(*b.shape[:-1], a.shape[-1])
        return _matmul(b.mT, g).reshape(first.shape), _matmul(g, a.mT).reshape(second.shape)

    def _matrices(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        if self.groups == 1:
            return first.flatten(1), second.flatten(1)
        count = self.groups
        return first.reshape(count, first.shape[0] // count, -1), second.reshape(count, -1, second.shape[1])


@dataclass(frozen=True)
class PointwiseFirst:
    """The first kernel has one tap: for each output channel, (m/G, c/G) @ (c/G, k₂) -> (m/G, k₂)."""

    groups: int

    def weight(self, first: Tensor, second: Tensor) -> Tensor:
        a, b = self._matrices(first, second)
        if second.shape[0] == self.groups:
            product = _matmul(a[:, 0].mT, b[:, 0])
        elif _few(second):
            turned = b.mT.reshape(self.groups, -1, a.shape[2])  # (G, n/G·k₂, c/G), so that one product does
            product = _matmul(turned, a[:, 0]).unflatten(1, (b.shape[1], -1)).mT.contiguous()
        else:
            product = a.mT @ b
        return product.reshape(second.shape[0], first.shape[1], *second.shape[2:])

    def pull(self, first: Tensor, second: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self._matrices(first, second)
        g = gradient.reshape(*b.shape[:2], a.shape[3], -1)  # (G, n/G, m/G, k₂)
        if second.shape[0] == self.groups:
            before, after = _matmul(b[:, 0], g[:, 0].mT), _matmul(a[:, 0], g[:, 0])
        elif _few(second):
            turned = g.mT.reshape(self.groups, -1, a.shape[3])  # (G, n/G·k₂, m/G)
            before = _matmul(b.mT.reshape(self.groups, -1, a.shape[2]).mT, turned)
            after = _matmul(turned, a[:, 0].mT).unflatten(1, (b.shape[1], -1)).mT.contiguous()
        else:
            before, after = (b @ g.mT).sum(1), a @ g
        return before.reshape(first.shape), after.reshape(second.shape)

    def _matrices(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """(G, 1, c/G, m/G) and (G, n/G, c/G, k₂)."""
        a = first.reshape(self.groups, 1, first.shape[0] // self.groups, first.shape[1])
        return a, second.reshape(self.groups, second.shape[0] // self.groups, second.shape[1], -1)


@dataclass(frozen=True)
class Spread:
    """A transposed convolution adds W₁ at every tap of W₂: batch n/G, channels c -> m, the taps of W₂ as the signal."""

    stride: Ints
    dilation: Ints
    groups: int

    @staticmethod
    def of(first: Kernel, second: Kernel) -> Spread:
        steps = tap_spacing(first, second)
        stride = [
            b * a // s if k > 1 else 1
            for b, a, s, k in zip(second.dilation, first.stride, steps, second.kernel_size, strict=True)
        ]
        dilation = [a // s if k > 1 else 1 for a, s, k in zip(first.dilation, steps, first.kernel_size, strict=True)]
        return Spread(tuple(stride), tuple(dilation), first.groups)

    def weight(self, first: Tensor, second: Tensor) -> Tensor:
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(self.stride) - 1]
        spread = convolve(
            self._signal(second), first, stride=self.stride, dilation=self.dilation, groups=self.groups
        )  # (n/G, m, *K)
        return self._turned(spread).contiguous()

    def pull(self, first: Tensor, second: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        zeros = (0,) * len(self.stride)
        after, before, _ = torch.ops.aten.convolution_backward(
            *(self._signal(gradient).contiguous(), self._signal(second), first, None),
            *(self.stride, zeros, self.dilation, True, zeros, self.groups, (True, True, False)),
        )
        return before.contiguous(), self._turned(after).contiguous()

    def _signal(self, weight: Tensor) -> Tensor:
        """(n, c/G, *k) -> (n/G, c, *k)."""
        if self.groups == 1:
            return weight
        signal: Tensor = weight.unflatten(0, (self.groups, -1)).transpose(0, 1).flatten(1, 2)
        return signal

    def _turned(self, signal: Tensor) -> Tensor:
        """(n/G, c, *k) -> (n, c/G, *k)."""
        if self.groups == 1:
            return signal
        weight: Tensor = signal.unflatten(1, (self.groups, -1)).transpose(0, 1).flatten(0, 1)
        return weight


def _scaled_after(first: Kernel, second: Kernel) -> Scaled:
    """``second`` is depthwise: (n, m/g, *k₁) · (n, 1, *k₂)."""
    taps = second.kernel_size if first.pointwise else first.kernel_size
    return Scaled(tuple(first.weight.shape), tuple(second.weight.shape), (*first.weight.shape[:2], *taps))


def _scaled_before(first: Kernel, second: Kernel) -> Scaled:
    """``first`` is depthwise: (g, 1, c/g, *k₁) · (g, n/g, c/g, *k₂) -> (n, c/g, *K)."""
    n, c = second.weight.shape[:2]
    taps = second.kernel_size if first.pointwise else first.kernel_size
    g = second.groups
    return Scaled((g, 1, c, *first.kernel_size), (g, n // g, c, *second.kernel_size), (n, c, *taps))


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``. Many small products that are outer ones, or of a short row, are faster element by element: those of
    depthwise layers, by factors of 9 and 2 at 960 channels.
    """
    if a.dim() == 3 and a.shape[2] == 1:
        return a * b
    if a.dim() == 3 and a.shape[1] == 1 and a.shape[2] <= 8:
        return (a.mT * b).sum(1, keepdim=True)
    return a @ b


def _few(second: Tensor) -> bool:
    """Whether the taps are so few that one large product, and turning the axes for it, is faster than one for each
    output channel. Measured on two to a thousand channels: 9 taps are, 25 are not.
    """
    return second.shape[2:].numel() < 16
