"""What one layer of torch can be: a kernel with a padding mode of its own, or a transposed convolution."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from fxexpand.algebra.combine import add, concatenate, scaled
from fxexpand.algebra.compose import Blocks, compose, compose_rounded
from fxexpand.algebra.cost import macs
from fxexpand.algebra.kernel import Ints, Kernel, Sides, pad_amounts, with_groups
from fxexpand.algebra.refusal import Refusal


@dataclass(frozen=True)
class Border:
    """Padding before a kernel with something else than zeros: the mode of ``ConvNd``, and (before, after) an axis."""

    mode: str
    sides: Sides


@dataclass(frozen=True)
class Transposed:
    """The settings of a transposed convolution, one entry an axis."""

    stride: Ints
    padding: Ints
    output_padding: Ints
    dilation: Ints


@dataclass(frozen=True, eq=False)
class Affine:
    """The map of one layer.

    With ``border``, the signal is padded so before ``kernel``, which pads nothing itself. With ``transposed``, the
    layer is a transposed convolution with the weight that ``kernel`` holds as (n, m / groups, *k): each input sample
    is spread over k outputs, and the settings of ``kernel`` itself are neutral.
    """

    kernel: Kernel
    border: Border | None = None
    transposed: Transposed | None = None

    @property
    def dims(self) -> int:
        return self.kernel.dims

    def over(self, weight: Tensor, bias: Tensor | None) -> Affine:
        """The map with the same settings and other numbers of the same shapes."""
        return Affine(self.kernel.over(weight, bias), self.border, self.transposed)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Affine:
        """The same map with its tensors in ``dtype``, on ``device``."""
        return Affine(self.kernel.to(dtype=dtype, device=device), self.border, self.transposed)

    def output_size(self, size: Ints) -> Ints:
        """The spatial size of the output for an input of spatial size ``size``, at least 1 an axis."""
        if self.transposed is not None:
            t = self.transposed
            return tuple(
                (length - 1) * s - 2 * p + step * (k - 1) + more + 1
                for length, s, p, more, step, k in zip(
                    size, t.stride, t.padding, t.output_padding, t.dilation, self.kernel.kernel_size, strict=True
                )
            )
        return tuple(max(length, 1) for length in self.kernel.output_size(self._padded(size)))

    def macs(self, size: Ints) -> int:
        """Multiply-accumulates of the layer for one sample of spatial size ``size``."""
        if self.dims == 0:
            return self.kernel.in_channels * self.kernel.out_channels  # a linear layer has no groups
        if self.transposed is not None:
            return self.kernel.weight.numel() * prod(size)
        return max(macs(self.kernel, self._padded(size)), self.kernel.weight.numel())

    def apply(self, x: Tensor) -> Tensor:
        """y for x of shape (batch, m, *size), or (*, m) when there are no spatial axes."""
        return self.apply_with(x, self.kernel.weight, self.kernel.bias)

    def apply_with(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same with other numbers: what ``over(weight, bias).apply(x)`` gives."""
        if self.border is not None:
            x = F.pad(x, pad_amounts(self.border.sides), mode=self.border.mode)
        if self.transposed is None:
            return self.kernel.apply_with(x, weight, bias)
        t, convolve = self.transposed, (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self.dims - 1]
        groups = self.kernel.groups
        weight = swapped(weight, groups)
        y: Tensor = convolve(x, weight, bias, t.stride, t.padding, t.output_padding, groups, t.dilation)
        return y

    def _padded(self, size: Ints) -> Ints:
        if self.border is None:
            return size
        return tuple(length + sum(sides) for length, sides in zip(size, self.border.sides, strict=True))


def swapped(weight: Tensor, groups: int) -> Tensor:
    """(n, m / g, *k) -> (m, n / g, *k), and back: a kernel's weight, and what a transposed convolution has for it."""
    turned: Tensor = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return turned


def identity(dims: int, channels: int, dtype: torch.dtype = torch.float64) -> Affine:
    """The map that leaves a signal as it is."""
    return Affine(Kernel(torch.ones(channels, 1, *(1,) * dims, dtype=dtype), groups=channels))


def in_series(first: Affine, second: Affine) -> Affine | Refusal:
    """The map of ``second ∘ first``, as one layer; see ``compose`` for when there is one.

    A padding mode other than zeros has to come first. Around a transposed convolution stand pointwise maps only,
    without a bias before it: at the border, its taps see that bias fewer times.
    """
    if second.border is not None:
        return Refusal(f"it pads with mode {second.border.mode!r} in the middle, where one layer would see the signal")
    if first.transposed is not None or second.transposed is not None:
        return _with_transposed(first, second)
    whole = compose(first.kernel, second.kernel)
    if isinstance(whole, Refusal):
        return whole
    if first.border is not None and any(map(any, whole.padding)):
        return Refusal(f"one layer cannot pad with zeros and with mode {first.border.mode!r}")
    return Affine(whole, first.border)


def scales(affine: Affine) -> bool:
    """Whether ``affine`` is a number for each channel, as batch norm is."""
    kernel = affine.kernel
    if affine.border is not None or affine.transposed is not None:
        return False
    return kernel.depthwise and kernel.pointwise and set(kernel.stride) <= {1} and not any(map(any, kernel.padding))


def scaled_and_rounded(affine: Affine, scale: Affine, dtype: torch.dtype, blocks: Blocks) -> Affine:
    """``scale`` after ``affine``, computed in float64 and rounded once to ``dtype``; see ``compose_rounded``."""
    return Affine(compose_rounded(affine.kernel, scale.kernel, dtype, blocks), affine.border, affine.transposed)


def _with_transposed(first: Affine, second: Affine) -> Affine | Refusal:
    other = second if first.transposed is not None else first
    plain = other.kernel.pointwise and set(other.kernel.stride) <= {1} and not any(map(any, other.kernel.padding))
    if other.transposed is not None or other.border is not None or not plain:
        return Refusal("beside a transposed convolution only pointwise layers merge")
    if other is first and first.kernel.bias is not None:
        return Refusal("its bias would be seen fewer times at the border of the transposed convolution; drop the bias")
    whole = compose(first.kernel, second.kernel)
    return whole if isinstance(whole, Refusal) else Affine(whole, None, first.transposed or second.transposed)


def in_sum(a: Affine, b: Affine) -> Affine | Refusal:
    """The map of ``a + b``; see ``add``."""
    return _only_kernels(a, b) or _affine(add(a.kernel, b.kernel))


def in_concatenation(a: Affine, b: Affine) -> Affine | Refusal:
    """The map that gives the channels of ``a``, then those of ``b``; see ``concatenate``."""
    return _only_kernels(a, b) or _affine(concatenate(a.kernel, b.kernel))


def pads_itself(a: Affine) -> bool:
    """Whether one layer of torch pads as ``a`` does: as much before the signal as after it, and never less than 0."""
    sides = a.kernel.padding if a.border is None else a.border.sides
    return all(before == after >= 0 for before, after in sides)


def times(a: Affine, factor: float) -> Affine:
    """The map of ``factor * a``."""
    return a if factor == 1 else replace(a, kernel=scaled(a.kernel, factor))


def without_groups(a: Affine) -> Affine:
    """The same map; a linear layer is dense."""
    return replace(a, kernel=with_groups(a.kernel, 1)) if a.dims == 0 else a


def _only_kernels(a: Affine, b: Affine) -> Refusal | None:
    for branch in (a, b):
        if branch.transposed is not None:
            return Refusal("one of the branches is a transposed convolution")
        if branch.border is not None:
            return Refusal(f"one of the branches pads with mode {branch.border.mode!r}")
    return None


def _affine(kernel: Kernel | Refusal) -> Affine | Refusal:
    return kernel if isinstance(kernel, Refusal) else Affine(kernel)
