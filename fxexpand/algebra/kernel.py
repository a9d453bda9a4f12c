"""One affine, translation-equivariant map: the value that every pass computes with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Ints: TypeAlias = tuple[int, ...]
Sides: TypeAlias = tuple[tuple[int, int], ...]
_CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True, eq=False)
class Kernel:
    """An affine map on a signal with d spatial axes.

        y[o, t] = bias[o] + Σ_i Σ_u  weight[o, i, u] · x[i, stride·t + dilation·u − padding]

    with x = 0 outside its support. d = 1, 2, 3 are convolutions; d = 0 is a linear layer, whose features are the
    last axis of its input.

    Shapes: ``weight`` is (n, m / groups, k₁, …, k_d), ``bias`` is (n,) or None. ``stride`` and ``dilation`` have one
    entry an axis; ``padding`` has a pair (before, after) an axis, in samples, where a negative number crops.

    Raises ``ValueError`` when these disagree.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: Ints = ()
    padding: Sides = ()
    dilation: Ints = ()
    groups: int = 1

    def __post_init__(self) -> None:
        d = self.weight.dim() - 2
        if d not in (0, 1, 2, 3):
            raise ValueError(f"weight must have 2 to 5 axes, found shape {tuple(self.weight.shape)}")
        # An empty tuple is the neutral setting for every axis.
        for name, neutral in (("stride", 1), ("dilation", 1), ("padding", (0, 0))):
            if not getattr(self, name):
                object.__setattr__(self, name, (neutral,) * d)
        if not len(self.stride) == len(self.dilation) == len(self.padding) == d:
            raise ValueError(
                f"stride {self.stride}, dilation {self.dilation} and padding {self.padding} "
                f"must have one entry for each of the {d} spatial axes"
            )
        if min((*self.stride, *self.dilation), default=1) < 1:
            raise ValueError(f"stride {self.stride} and dilation {self.dilation} must be at least 1")
        if self.groups < 1 or self.out_channels % self.groups:
            raise ValueError(f"groups={self.groups} does not divide {self.out_channels} output channels")
        if self.bias is not None and tuple(self.bias.shape) != (self.out_channels,):
            raise ValueError(f"bias must have shape ({self.out_channels},), found {tuple(self.bias.shape)}")

    @property
    def dims(self) -> int:
        """d, the number of spatial axes."""
        return self.weight.dim() - 2

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1] * self.groups

    @property
    def kernel_size(self) -> Ints:
        return tuple(self.weight.shape[2:])

    @property
    def depthwise(self) -> bool:
        """Whether every output channel reads the input channel of the same number, and no other."""
        return self.groups == self.in_channels == self.out_channels

    @property
    def pointwise(self) -> bool:
        """Whether the kernel has one tap on every axis."""
        return all(k == 1 for k in self.kernel_size)

    @property
    def reach(self) -> Ints:
        """The distance between the first and the last tap on each axis, in samples: δ·(k − 1)."""
        return tuple(step * (k - 1) for step, k in zip(self.dilation, self.kernel_size, strict=True))

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Kernel:
        """The same map with its tensors in ``dtype``, on ``device``; on "meta", it computes shapes alone."""
        bias = None if self.bias is None else self.bias.to(dtype=dtype, device=device)
        return self.over(self.weight.to(dtype=dtype, device=device), bias)

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether every number that is finite stays so in ``dtype``; on "meta" there are none."""
        held = [t for t in (self.weight, self.bias) if t is not None and not t.is_meta]
        return all(bool((t.to(dtype).isfinite() == t.isfinite()).all()) for t in held)

    def detach(self) -> Kernel:
        """The same map, cut off from autograd."""
        return self.over(self.weight.detach(), None if self.bias is None else self.bias.detach())

    def over(self, weight: Tensor, bias: Tensor | None) -> Kernel:
        """The map with the same settings and other numbers; the shapes are those of this one, and not checked again."""
        kernel = object.__new__(Kernel)
        vars(kernel).update(vars(self), weight=weight, bias=bias)
        return kernel

    def output_size(self, size: Ints) -> Ints:
        """The spatial size of the output for an input of spatial size ``size``."""
        return tuple(
            (length + sum(sides) - reach - 1) // stride + 1
            for length, sides, reach, stride in zip(size, self.padding, self.reach, self.stride, strict=True)
        )

    def apply(self, x: Tensor) -> Tensor:
        """y for x of shape (batch, m, *size), or (*, m) when d = 0."""
        return self.apply_with(x, self.weight, self.bias)

    def apply_with(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same with other numbers: what ``over(weight, bias).apply(x)`` gives."""
        d = len(self.stride)
        if d == 0:
            return _apply_features(x, weight, bias, self.groups)
        padding = [before for before, after in self.padding if before == after >= 0]
        if len(padding) < d:  # torch's convolutions take no such
            x, padding = _padded(x, self.padding), [0] * d
        y: Tensor = _CONVOLVE[d - 1](x, weight, bias, self.stride, padding, self.dilation, self.groups)
        return y


def _apply_features(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    if groups == 1:
        return F.linear(x, weight, bias)
    parts = x.unflatten(-1, (groups, weight.shape[1]))  # (*, g, m/g)
    y: Tensor = torch.einsum("gnm,...gm->...gn", grouped(weight, groups), parts).flatten(-2)
    return y if bias is None else y + bias


def pad_amounts(sides: Sides) -> list[int]:
    """What ``F.pad`` and the padding modules of torch take: (before, after) of the last axis first."""
    return [amount for pair in reversed(sides) for amount in pair]


def pad_sides(amounts: Sequence[int]) -> Sides:
    """(before, after) for each axis, from what ``F.pad`` takes."""
    return tuple((amounts[i], amounts[i + 1]) for i in reversed(range(0, len(amounts), 2)))


def _padded(x: Tensor, padding: Sides) -> Tensor:
    """``x`` with zeros added, then cropped: what is cut off may reach beyond the signal into the zeros."""
    amounts = pad_amounts(padding)
    x = F.pad(x, [max(amount, 0) for amount in amounts])
    if min(amounts) < 0:
        x = F.pad(x, [min(amount, 0) for amount in amounts])
    return x


def grouped(weight: Tensor, groups: int) -> Tensor:
    """(n, m/g, *k) -> (g, n/g, m/g, *k), a view."""
    blocks: Tensor = weight.unflatten(0, (groups, -1))
    return blocks


def with_groups(kernel: Kernel, groups: int) -> Kernel:
    """The same map written with fewer groups; the blocks between the old groups are zero.

    Exact when ``groups`` divides ``kernel.groups``. Raises ``ValueError`` otherwise.
    """
    if groups == kernel.groups:
        return kernel
    if groups < 1 or kernel.groups % groups:
        raise ValueError(f"{kernel.groups} groups cannot be written as {groups}")
    fold = kernel.groups // groups
    blocks = kernel.weight.unflatten(0, (groups, fold, -1))  # (G, f, n/g, m/g, *k)
    eye = torch.eye(fold, dtype=kernel.weight.dtype, device=kernel.weight.device)
    # (G, f, n/g, 1, m/g, *k) · (f, 1, f, 1, 1…): block row a keeps its inputs in block column a
    spread = blocks.unsqueeze(3) * eye.reshape(fold, 1, fold, 1, *(1,) * kernel.dims)
    return replace(kernel, weight=spread.flatten(3, 4).flatten(0, 2), groups=groups)
