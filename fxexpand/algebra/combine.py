"""Parallel: one kernel for branches that read the same signal and are joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import gcd

import torch
from torch import Tensor

from fxexpand.algebra.kernel import Ints, Kernel, Sides, with_groups
from fxexpand.algebra.refusal import Refusal


def add(a: Kernel, b: Kernel) -> Kernel | Refusal:
    """The kernel of ``a + b``.

    Before:  y = a(x) + b(x)
    After:   y = add(a, b)(x)

    Identity: (W_a + W_b) · x = W_a · x + W_b · x, the taps aligned by their offset δ·u − p.
    Exact when: channels and strides agree and both give the same output size for every input size, which is when
    p − δ·(k − 1), summed over both sides, agrees on every axis. Differentiable in both kernels.
    """
    refusal = _mismatch(a, b)
    if refusal is not None:
        return refusal
    groups = gcd(a.groups, b.groups)
    a, b = with_groups(a, groups), with_groups(b, groups)
    dilation, size, padding = _grid(a, b)
    weight = _on_grid(a, dilation, size, padding) + _on_grid(b, dilation, size, padding)
    return Kernel(weight, _sum_of_biases(a.bias, b.bias), a.stride, padding, dilation, groups)


def concatenate(a: Kernel, b: Kernel) -> Kernel | Refusal:
    """The kernel that gives the output channels of ``a``, then those of ``b``.

    Before:  y = cat([a(x), b(x)], channels)
    After:   y = concatenate(a, b)(x)

    Exact when: strides and input channels agree and both give the same output size, as in ``add``. Has one group.
    """
    refusal = _different_outputs(a, b)
    if refusal is not None:
        return refusal
    a, b = with_groups(a, 1), with_groups(b, 1)
    dilation, size, padding = _grid(a, b)
    weight = torch.cat([_on_grid(kernel, dilation, size, padding) for kernel in (a, b)])  # (n_a + n_b, m, *k)
    bias = None
    if a.bias is not None or b.bias is not None:
        held = [k.weight.new_zeros(k.out_channels) if k.bias is None else k.bias for k in (a, b)]
        bias = torch.cat(held)
    return Kernel(weight, bias, a.stride, padding, dilation)


def scaled(kernel: Kernel, factor: float) -> Kernel:
    """The kernel of ``factor * kernel``."""
    bias = None if kernel.bias is None else kernel.bias * factor
    return replace(kernel, weight=kernel.weight * factor, bias=bias)


def remainder(target: Kernel, branches: Sequence[Kernel]) -> list[Kernel] | Refusal:
    """``branches`` with another first one, such that their sum is ``target``.

    Identity: W₁ = W − Σ_{j>1} W_j. Exact when: the first branch has a tap wherever the others leave something.
    """
    first, *others = branches
    rest = target
    for other in others:
        less = add(rest, scaled(other, -1.0))
        if isinstance(less, Refusal):
            return less
        rest = less
    if (rest.weight.shape, rest.padding) != (first.weight.shape, first.padding):
        return Refusal(
            f"the first branch has a kernel of {first.kernel_size} with padding {first.padding}, and the others leave "
            f"one of {rest.kernel_size} with padding {rest.padding}"
        )
    return [first.over(rest.weight, rest.bias), *others]


def _mismatch(a: Kernel, b: Kernel) -> Refusal | None:
    if a.dims == b.dims and (a.in_channels, a.out_channels) != (b.in_channels, b.out_channels):
        return Refusal(
            f"one branch maps {a.in_channels} channels to {a.out_channels}, "
            f"the other {b.in_channels} to {b.out_channels}"
        )
    return _different_outputs(a, b)


def _different_outputs(a: Kernel, b: Kernel) -> Refusal | None:
    """Why the kernels do not read the same signals, or not for outputs of one size; or None."""
    if a.dims != b.dims:
        return Refusal(f"one branch has {a.dims} spatial axes, the other {b.dims}")
    if a.in_channels != b.in_channels:
        return Refusal(f"one branch takes {a.in_channels} channels, the other {b.in_channels}")
    if a.stride != b.stride:
        return Refusal(f"the branches have strides {a.stride} and {b.stride}")
    for axis in range(a.dims):
        extents = [sum(kernel.padding[axis]) - kernel.reach[axis] for kernel in (a, b)]
        if extents[0] != extents[1]:
            return Refusal(
                f"the branches give outputs of different size on axis {axis}: "
                f"padding less window is {extents[0]} in one and {extents[1]} in the other"
            )
    return None


def _grid(a: Kernel, b: Kernel) -> tuple[Ints, Ints, Sides]:
    """Dilation, number of taps and padding of the coarsest regular grid that holds the taps of both."""
    grid = [_common_grid(a, b, axis) for axis in range(a.dims)]
    return tuple(step for step, _, _ in grid), tuple(count for _, count, _ in grid), tuple(p for _, _, p in grid)


def _common_grid(a: Kernel, b: Kernel, axis: int) -> tuple[int, int, tuple[int, int]]:
    """(dilation, number of taps, padding) of the grid on one axis."""
    before = max(a.padding[axis][0], b.padding[axis][0])
    after = max(a.padding[axis][1], b.padding[axis][1])
    # Offsets δ·u − p of all taps, measured from the first one.
    starts = [before - kernel.padding[axis][0] for kernel in (a, b)]
    spacings = [kernel.dilation[axis] for kernel in (a, b) if kernel.kernel_size[axis] > 1]
    step = gcd(*starts, *spacings) or 1
    last = max(start + kernel.reach[axis] for start, kernel in zip(starts, (a, b), strict=True))
    return step, last // step + 1, (before, after)


def _on_grid(kernel: Kernel, dilation: Ints, size: Ints, padding: Sides) -> Tensor:
    """The weight of ``kernel`` laid out on the given grid, zero at the taps it does not have."""
    weight = kernel.weight
    for axis, step in enumerate(dilation):
        count = kernel.kernel_size[axis]
        if count == size[axis]:
            continue
        start = (padding[axis][0] - kernel.padding[axis][0]) // step
        taps = start + kernel.dilation[axis] // step * torch.arange(count, device=weight.device)
        shape = list(weight.shape)
        shape[axis + 2] = size[axis]
        weight = weight.new_zeros(shape).index_copy(axis + 2, taps, weight)
    return weight


def _sum_of_biases(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
