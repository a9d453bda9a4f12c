"""A kernel applies the map that its docstring writes down, and can be written with fewer groups."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

import drawing
from fxexpand.algebra import Kernel
from fxexpand.algebra.kernel import with_groups


@given(drawing.kernels())
def test_apply_is_the_matrix(kernel: Kernel) -> None:
    for size in drawing.sizes(kernel):
        x = drawing.signal(kernel, size)
        M, b = drawing.dense(kernel, size)
        torch.testing.assert_close(kernel.apply(x).flatten(1), x.flatten(1) @ M.T + b, rtol=1e-12, atol=1e-12)


@given(drawing.kernels())
def test_output_size_is_that_of_the_output(kernel: Kernel) -> None:
    for size in drawing.sizes(kernel):
        assert kernel.apply(drawing.signal(kernel, size)).shape[2:] == kernel.output_size(size)


@given(drawing.kernels(), st.data())
def test_no_output_where_output_size_is_not_positive(kernel: Kernel, data: st.DataObject) -> None:
    size = data.draw(st.tuples(*[st.integers(1, 6)] * kernel.dims))
    if min(kernel.output_size(size), default=1) < 1:
        with pytest.raises(ValueError, match="does not fit"):
            drawing.dense(kernel, size)
        with pytest.raises(RuntimeError):
            kernel.apply(drawing.signal(kernel, size))


def test_crop_beyond_the_signal_leaves_the_padding() -> None:
    kernel = Kernel(torch.ones(1, 1, 1), torch.tensor([5.0]), padding=((-4, 6),))
    assert kernel.apply(torch.ones(1, 1, 2)).tolist() == [[[5.0, 5.0, 5.0, 5.0]]]


@given(drawing.kernels(d=0), st.lists(st.integers(1, 3), max_size=3))
def test_a_linear_kernel_takes_the_last_axis(kernel: Kernel, batch: list[int]) -> None:
    x = drawing.random(*batch, kernel.in_channels)
    M, b = drawing.dense(kernel, ())
    torch.testing.assert_close(kernel.apply(x), x @ M.T + b, rtol=1e-12, atol=1e-12)


def test_empty_settings_are_neutral() -> None:
    kernel = Kernel(torch.zeros(4, 3, 5, 6))
    assert (kernel.stride, kernel.padding, kernel.dilation) == ((1, 1), ((0, 0), (0, 0)), (1, 1))
    assert (kernel.dims, kernel.out_channels, kernel.in_channels, kernel.kernel_size) == (2, 4, 3, (5, 6))
    assert replace(kernel, groups=2).in_channels == 6
    assert replace(kernel, dilation=(2, 3)).reach == (8, 15)


@pytest.mark.parametrize(
    ("weight", "settings", "message"),
    [
        ((3,), {}, r"2 to 5 axes, found shape \(3,\)"),
        ((1, 1, 1, 1, 1, 1), {}, "2 to 5 axes"),
        ((2, 2, 3), {"stride": (1, 1)}, "one entry for each of the 1 spatial axes"),
        ((2, 2, 3), {"dilation": (1, 1)}, "one entry for each of the 1 spatial axes"),
        ((2, 2, 3, 3), {"padding": ((0, 0),)}, "one entry for each of the 2 spatial axes"),
        ((2, 2), {"stride": (1,)}, "one entry for each of the 0 spatial axes"),
        ((2, 2, 3), {"stride": (0,)}, r"stride \(0,\) and dilation \(1,\) must be at least 1"),
        ((2, 2, 3), {"dilation": (0,)}, "must be at least 1"),
        ((4, 2, 3), {"groups": 3}, "groups=3 does not divide 4 output channels"),
        ((4, 2, 3), {"groups": 0}, "groups=0 does not divide"),
        ((4, 2, 3), {"bias": torch.zeros(3)}, r"bias must have shape \(4,\), found \(3,\)"),
        ((4, 2, 3), {"bias": torch.zeros(4, 1)}, r"bias must have shape \(4,\), found \(4, 1\)"),
    ],
)
def test_settings_that_disagree(
    weight: tuple[int, ...], settings: dict[str, Tensor | tuple[int, ...] | int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Kernel(torch.zeros(weight), **settings)  # type: ignore[arg-type]  # that is the point


def test_output_size_of_another_number_of_axes() -> None:
    with pytest.raises(ValueError, match="argument"):
        Kernel(torch.zeros(1, 1, 3)).output_size((5, 5))


@given(drawing.kernels())
def test_dtype_and_autograd(kernel: Kernel) -> None:
    kernel.weight.requires_grad_()
    half = kernel.to(dtype=torch.float16)
    assert half.weight.dtype == torch.float16
    assert half.weight.requires_grad
    assert half.bias is None or half.bias.dtype == torch.float16
    assert not kernel.detach().weight.requires_grad
    assert torch.equal(half.detach().weight, kernel.weight.detach().to(torch.float16))
    settings = (kernel.stride, kernel.padding, kernel.dilation, kernel.groups)
    for other in (half, kernel.detach()):
        assert (other.stride, other.padding, other.dilation, other.groups) == settings


@given(drawing.kernels(), st.data())
def test_fewer_groups_are_the_same_map(kernel: Kernel, data: st.DataObject) -> None:
    fewer = data.draw(st.sampled_from([g for g in range(1, kernel.groups + 1) if kernel.groups % g == 0]))
    regrouped = with_groups(kernel, fewer)
    assert regrouped.groups == fewer
    size = drawing.sizes(kernel)[0]
    drawing.assert_equal(drawing.dense(regrouped, size), drawing.dense(kernel, size), tolerance=0.0)


def test_groups_that_do_not_divide() -> None:
    kernel = Kernel(torch.zeros(6, 1, 3), groups=6)
    for groups in (0, 4, 12):
        with pytest.raises(ValueError, match=f"6 groups cannot be written as {groups}"):
            with_groups(kernel, groups)


def test_even_and_rectangular_kernels_and_every_side() -> None:
    """The 2-D window with all options at once, position by position."""
    weight, x = drawing.random(1, 1, 2, 3), drawing.random(1, 1, 5, 6)
    kernel = Kernel(weight, None, (2, 1), ((1, 0), (-1, 2)), (3, 2))
    y = kernel.apply(x)
    assert y.shape == (1, 1, 2, 3)
    for i, j in product(range(2), range(3)):
        expected = 0.0
        for u, v in product(range(2), range(3)):
            row, column = 2 * i + 3 * u - 1, j + 2 * v + 1
            if 0 <= row < 5 and column < 6:
                expected += float(weight[0, 0, u, v] * x[0, 0, row, column])
        assert float(y[0, 0, i, j]) == pytest.approx(expected, rel=1e-12)


def test_a_grouped_linear_kernel_takes_its_own_number_of_features_only() -> None:
    kernel = Kernel(drawing.random(2, 1), groups=2)
    with pytest.raises(RuntimeError, match="multiply up to"):
        kernel.apply(drawing.random(3, 4))
