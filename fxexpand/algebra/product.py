"""The weight of two kernels in series, as a product of their weights: linear in each, with its derivatives."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod
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
            return Scaled.after(first, second)
        if first.depthwise:
            return Scaled.before(first, second)
    if first.groups != second.groups:
        return None
    if second.pointwise:
        return PointwiseLast.of(first, second)
    if first.pointwise:
        return PointwiseFirst.of(first, second)
    return Spread.of(first, second)


def elements_turned(first: Kernel, second: Kernel) -> int:
    """How many elements of W₂ are moved before and after the product, besides being multiplied."""
    product = product_of(first, second)
    return second.weight.numel() if isinstance(product, PointwiseFirst) and product.turns else 0


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
    to give the weights so that they broadcast to ``both``; the others are the shapes of the weights.
    """

    left: Ints
    right: Ints
    both: Ints
    first: Ints
    second: Ints
    whole: Ints

    @staticmethod
    def after(first: Kernel, second: Kernel) -> Scaled:
        """``second`` is depthwise: (n, m/g, *k₁) · (n, 1, *k₂)."""
        taps = second.kernel_size if first.pointwise else first.kernel_size
        shapes = tuple(first.weight.shape), tuple(second.weight.shape)
        return Scaled(*shapes, torch.broadcast_shapes(*shapes), *shapes, (*first.weight.shape[:2], *taps))

    @staticmethod
    def before(first: Kernel, second: Kernel) -> Scaled:
        """``first`` is depthwise: (g, 1, c/g, *k₁) · (g, n/g, c/g, *k₂) -> (n, c/g, *K)."""
        n, c = second.weight.shape[:2]
        taps = second.kernel_size if first.pointwise else first.kernel_size
        g = second.groups
        shapes = (g, 1, c, *first.kernel_size), (g, n // g, c, *second.kernel_size)
        own = tuple(first.weight.shape), tuple(second.weight.shape)
        return Scaled(*shapes, torch.broadcast_shapes(*shapes), *own, (n, c, *taps))

    def weight(self, first: Tensor, second: Tensor) -> Tensor:
        return (first.reshape(self.left) * second.reshape(self.right)).reshape(self.whole)

    def pull(self, first: Tensor, second: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        left, right, both = first.reshape(self.left), second.reshape(self.right), gradient.reshape(self.both)
        through = (both * right).sum_to_size(self.left), (both * left).sum_to_size(self.right)
        return through[0].reshape(self.first), through[1].reshape(self.second)


@dataclass(frozen=True)
class PointwiseLast:
    """The second kernel has one tap: (G, n/G, c/G) @ (G, c/G, m/G·k₁) -> (G, n/G, m/G·k₁).

    ``left`` and ``right`` are the shapes of the first and the second kernel as matrices, ``product`` is that of their
    product; the others are the shapes of the weights.
    """

    left: Ints
    right: Ints
    product: Ints
    first: Ints
    second: Ints
    whole: Ints

    @staticmethod
    def of(first: Kernel, second: Kernel) -> PointwiseLast:
        groups, n, c = second.groups, second.out_channels // second.groups, second.weight.shape[1]
        shape, columns = tuple(first.weight.shape), prod(first.weight.shape[1:])
        return PointwiseLast(
            left=(groups, c, columns),
            right=(groups, n, c),
            product=(groups, n, columns),
            first=shape,
            second=tuple(second.weight.shape),
            whole=(second.out_channels, *shape[1:]),
        )

    def weight(self, first: Tensor, second: Tensor) -> Tensor:
        return _matmul(second, self.right, first, self.left).reshape(self.whole)

    def pull(self, first: Tensor, second: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        before = _matmul(second, self.right, gradient, self.product, turned=0)
        after = _matmul(gradient, self.product, first, self.left, turned=1)
        return before.reshape(self.first), after.reshape(self.second)


@dataclass(frozen=True)
class PointwiseFirst:
    """The first kernel has one tap: for each output channel, (m/G, c/G) @ (c/G, k₂) -> (m/G, k₂)."""

    groups: int
    left: Ints  # (G, c/G, m/G)
    each: Ints  # (n, c/G, m/G): the first kernel's, once for each output channel
    right: Ints  # (n, c/G, k₂)
    product: Ints  # (n, m/G, k₂)
    first: Ints
    second: Ints
    whole: Ints
    turns: bool  # the taps are moved, so that one product does

    @staticmethod
    def of(first: Kernel, second: Kernel) -> PointwiseFirst:
        groups, n, c = second.groups, second.out_channels, second.weight.shape[1]
        m, taps = first.weight.shape[1], prod(second.kernel_size)
        return PointwiseFirst(
            groups=groups,
            left=(groups, c, m),
            each=(n, c, m),
            right=(n, c, taps),
            product=(n, m, taps),
            first=tuple(first.weight.shape),
            second=tuple(second.weight.shape),
            whole=(n, m, *second.kernel_size),
            turns=n != groups and _few(taps),
        )

    def weight(self, first: Tensor, second: Tensor) -> Tensor:
        if not self.turns:
            return _matmul(self._each(first), self.each, second, self.right, turned=0).reshape(self.whole)
        # (G, n/G·k₂, c/G) @ (G, c/G, m/G)
        n, m, taps = self.product
        product = self._turned(second, self.right) @ first.reshape(self.left)
        return product.reshape(n, taps, m).mT.reshape(self.whole).contiguous()

    def pull(self, first: Tensor, second: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        if not self.turns:
            before = _matmul(second, self.right, gradient, self.product, turned=1)
            if self.product[0] != self.groups:
                before = before.reshape(self.groups, -1, *self.left[1:]).sum(1)
            after = _matmul(self._each(first), self.each, gradient, self.product)
            return before.reshape(self.first), after.reshape(self.second)
        n, c, taps = self.right
        g = self._turned(gradient, self.product)  # (G, n/G·k₂, m/G)
        before, after = self._turned(second, self.right).mT @ g, g @ first.reshape(self.left).mT
        return before.reshape(self.first), after.reshape(n, taps, c).mT.reshape(self.second).contiguous()

    def _each(self, first: Tensor) -> Tensor:
        groups, c, m = self.left
        if groups == 1:
            return first.reshape(self.left).expand(self.each)
        return first.reshape(groups, 1, c, m).expand(groups, self.each[0] // groups, c, m).reshape(self.each)

    def _turned(self, weight: Tensor, shape: Ints) -> Tensor:
        """(n, ·, k₂) -> (G, n/G·k₂, ·)."""
        return weight.reshape(shape).mT.reshape(self.groups, -1, shape[1])


@dataclass(frozen=True)
class Spread:
    """A transposed convolution adds W₁ at every tap of W₂: batch n/G, channels c -> m, the taps of W₂ as the signal."""

    stride: Ints
    dilation: Ints
    groups: int
    second: Ints
    whole: Ints

    @staticmethod
    def of(first: Kernel, second: Kernel) -> Spread:
        steps = tap_spacing(first, second)
        stride = [
            b * a // s if k > 1 else 1
            for b, a, s, k in zip(second.dilation, first.stride, steps, second.kernel_size, strict=True)
        ]
        dilation = [a // s if k > 1 else 1 for a, s, k in zip(first.dilation, steps, first.kernel_size, strict=True)]
        sizes = [
            (k2 - 1) * step + (k1 - 1) * tap + 1
            for k2, step, k1, tap in zip(second.kernel_size, stride, first.kernel_size, dilation, strict=True)
        ]
        whole = (second.out_channels, first.weight.shape[1], *sizes)
        return Spread(tuple(stride), tuple(dilation), first.groups, tuple(second.weight.shape), whole)

    def weight(self, first: Tensor, second: Tensor) -> Tensor:
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(self.stride) - 1]
        signal = self._signal(second, self.second)
        spread = convolve(signal, first, stride=self.stride, dilation=self.dilation, groups=self.groups)  # (n/G, m, *K)
        return self._turned(spread, self.whole).contiguous()

    def pull(self, first: Tensor, second: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        zeros = (0,) * len(self.stride)
        after, before, _ = torch.ops.aten.convolution_backward(
            *(self._signal(gradient, self.whole).contiguous(), self._signal(second, self.second), first, None),
            *(self.stride, zeros, self.dilation, True, zeros, self.groups, (True, True, False)),
        )
        return before.contiguous(), self._turned(after, self.second).contiguous()

    def _signal(self, weight: Tensor, shape: Ints) -> Tensor:
        """(n, c/G, *k), which is ``shape``, -> (n/G, c, *k)."""
        if self.groups == 1:
            return weight
        n, c, *size = shape
        blocks = weight.reshape(self.groups, n // self.groups, c, *size)
        return blocks.transpose(0, 1).reshape(n // self.groups, self.groups * c, *size)

    def _turned(self, signal: Tensor, shape: Ints) -> Tensor:
        """(n/G, c, *k) -> (n, c/G, *k), which is ``shape``."""
        if self.groups == 1:
            return signal
        n, c, *size = shape
        blocks = signal.reshape(n // self.groups, self.groups, c, *size)
        return blocks.transpose(0, 1).reshape(shape)


def _matmul(a: Tensor, left: Ints, b: Tensor, right: Ints, turned: int | None = None) -> Tensor:
    """``a`` @ ``b`` as matrices in batches, of the shapes ``left`` and ``right``; ``turned`` says whether one of them
    is to be transposed, 0 or 1.

    Many small products that are outer ones, or of a short row, are faster element by element: those of depthwise
    layers, by factors of 9 and 2 at 960 channels.
    """
    batch, rows, inner = (left[0], left[2], left[1]) if turned == 0 else left
    if batch == 1:  # the batch has an axis of its own all the same
        a, b = a.reshape(left[1:]), b.reshape(right[1:])
        return torch.mm(a.t() if turned == 0 else a, b.t() if turned == 1 else b)
    a, b = a.reshape(left), b.reshape(right)
    a, b = a.mT if turned == 0 else a, b.mT if turned == 1 else b
    if inner == 1:
        return a * b
    if rows == 1 and inner <= 8:
        return (a.mT * b).sum(1, keepdim=True)
    return torch.bmm(a, b)


def _few(taps: int) -> bool:
    """Whether one large product, and turning the axes for it, is faster than one for each output channel.

    Measured on two to a thousand channels: for 9 taps it is, for 25 it is not.
    """
    return taps < 16
