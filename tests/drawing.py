"""Hypothesis strategies for kernels, and the dense matrices to hold them against.

Only shapes and options are drawn, so that failures shrink; weights are random numbers in float64, as generic as they
come, which conftest.py makes the same at every replay.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import hypothesis.strategies as st
import torch
from torch import Tensor, nn

from fxexpand.algebra import Kernel
from fxexpand.algebra.kernel import Ints, Sides
from fxexpand.testing import conv_matrix
from fxexpand.testing.draw.sizes import divisors, tuples

CONVOLUTIONS: tuple[type[nn.Conv1d], type[nn.Conv2d], type[nn.Conv3d]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# By number of axes: the most taps, the largest stride and dilation, and the most padding, so that matrices stay small.
_LARGEST = {0: (1, 1, 1, 0), 1: (4, 3, 3, 4), 2: (3, 2, 2, 3), 3: (2, 2, 2, 2)}
_CHANNELS = {0: (1, 2, 3, 4, 6), 1: (1, 2, 3, 4, 6), 2: (1, 2, 3, 4), 3: (1, 2)}
CROP = -2


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def dims(least: int = 0, most: int = 3) -> st.SearchStrategy[int]:
    return st.integers(least, most)


def channels(d: int) -> st.SearchStrategy[int]:
    return st.sampled_from(_CHANNELS[d])


def groups(m: int, n: int) -> st.SearchStrategy[int]:
    """The numbers of groups that ``m`` input and ``n`` output channels can have."""
    return st.sampled_from(divisors(m, n))


def strides(d: int) -> st.SearchStrategy[Ints]:
    return tuples(d, st.integers(1, _LARGEST[d][1]))


def paddings(d: int) -> st.SearchStrategy[Sides]:
    """A pair (before, after) for each axis, some of which crop."""
    amounts = st.integers(CROP, _LARGEST[d][3])
    return tuples(d, st.tuples(amounts, amounts))


@st.composite
def kernels(
    draw: st.DrawFn,
    d: int | None = None,
    m: int | None = None,
    n: int | None = None,
    *,
    bias: bool | None = None,
    padding: Sides | None = None,
    stride: Ints | None = None,
) -> Kernel:
    """Any kernel of ``d`` axes, ``m`` input and ``n`` output channels; what is not given is drawn."""
    d = draw(dims()) if d is None else d
    m = draw(channels(d)) if m is None else m
    n = draw(channels(d)) if n is None else n
    g = draw(groups(m, n))
    taps, _, dilation, _ = _LARGEST[d]
    with_bias = draw(st.booleans()) if bias is None else bias
    return Kernel(
        weight=random(n, m // g, *draw(tuples(d, st.integers(1, taps)))),
        bias=random(n) if with_bias else None,
        stride=draw(strides(d)) if stride is None else stride,
        padding=draw(paddings(d)) if padding is None else padding,
        dilation=draw(tuples(d, st.integers(1, dilation))),
        groups=g,
    )


@st.composite
def pairs(draw: st.DrawFn, d: int | None = None) -> tuple[Kernel, Kernel]:
    """Two kernels in series. About half of them have an exact composition, many of them only just."""
    d = draw(dims()) if d is None else d
    second = draw(kernels(d))
    padded = any(amount > 0 for sides in second.padding for amount in sides)
    has_bias = draw(st.booleans()) if not padded else draw(st.integers(0, 3)) == 3
    first = draw(kernels(d, n=second.in_channels, bias=has_bias, padding=((0, 0),) * d))
    padding = tuple(
        (draw(_first_padding(before, reach)), draw(_first_padding(after, reach)))
        for (before, after), reach in zip(second.padding, first.reach, strict=True)
    )
    return replace(first, padding=padding), second


def _first_padding(second: int, reach: int) -> st.SearchStrategy[int]:
    return st.integers(reach - 1, reach + 1) if second > 0 else st.integers(CROP, 3)


@st.composite
def with_depthwise(draw: st.DrawFn) -> tuple[Kernel, Kernel]:
    """Two kernels of which one is depthwise and one pointwise, in either order."""
    other = draw(kernels(padding=None))
    d, first = other.dims, draw(st.booleans())
    c = other.out_channels if first else other.in_channels
    taps = (1,) * d
    if all(k == 1 for k in other.kernel_size):
        taps = tuple(draw(st.integers(1, 3)) for _ in range(d))
    bias = random(c) if draw(st.booleans()) else None
    depthwise = Kernel(random(c, 1, *taps), bias, draw(strides(d)), groups=c)
    return (other, depthwise) if first else (depthwise, replace(other, padding=((0, 0),) * d))


@st.composite
def branches(draw: st.DrawFn, d: int | None = None) -> tuple[Kernel, Kernel]:
    """Two kernels that read the same signal and give outputs of the same shape."""
    d = draw(dims()) if d is None else d
    a = draw(kernels(d))
    b = draw(kernels(d, a.in_channels, a.out_channels, stride=a.stride))
    padding = []
    for axis in range(d):
        total = sum(a.padding[axis]) - a.reach[axis] + b.reach[axis]
        before = draw(st.integers(CROP, _LARGEST[d][3]))
        padding.append((before, total - before))
    return a, replace(b, padding=tuple(padding))


def sizes(*chain: Kernel) -> list[Ints]:
    """Signal sizes for kernels called in turn: from the smallest that gives an output, and then each of the next few.

    They are as many as show every residue of the strides on each axis, fewer where the matrices would get large.
    """
    d = chain[0].dims
    first = [smallest(chain, axis) for axis in range(d)]
    more = {0: 1, 1: 12, 2: 3, 3: 2}[d]
    return list(product(*(range(length, length + more) for length in first)))


def smallest(chain: tuple[Kernel, ...], axis: int) -> int:
    """The least extent on ``axis`` of a signal that leaves an output."""
    length = 1
    for kernel in reversed(chain):
        spanned = kernel.stride[axis] * (length - 1) + kernel.reach[axis] + 1
        length = max(spanned - sum(kernel.padding[axis]), 1)
    return length


def signal(kernel: Kernel, size: Ints, batch: int = 2) -> Tensor:
    """A random input for ``kernel``, (batch, m, *size)."""
    return random(batch, kernel.in_channels, *size)


def dense(kernel: Kernel, size: Ints) -> tuple[Tensor, Tensor]:
    """M and b of ``kernel``, from the oracle."""
    return conv_matrix(
        kernel.weight,
        kernel.bias,
        size=size,
        stride=kernel.stride,
        padding=kernel.padding,
        dilation=kernel.dilation,
        groups=kernel.groups,
    )


def dense_chain(chain: list[Kernel], size: Ints) -> tuple[Tensor, Tensor]:
    """M and b of kernels called in turn: the product of their matrices."""
    M, b = dense(chain[0], size)
    for before, kernel in pairwise(chain):
        size = before.output_size(size)
        step, offset = dense(kernel, size)
        M, b = step @ M, step @ b + offset
    return M, b


def assert_equal(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 1e-12) -> None:
    """That two affine maps agree, relative to the largest entry of the expected one."""
    for what, x, y in zip(("matrix", "bias"), found, expected, strict=True):
        assert x.shape == y.shape, f"{what}: expected shape {tuple(y.shape)}, found {tuple(x.shape)}"
        scale = max(float(y.abs().max()), 1.0)
        error = float((x - y).abs().max()) / scale
        assert error <= tolerance, f"{what}: largest error {error:.1e}, expected at most {tolerance:.0e}"
