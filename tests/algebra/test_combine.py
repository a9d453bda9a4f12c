"""Sums and concatenations of kernels are exact where they are given, and refused only where there is none."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given

import drawing
from fxexpand.algebra import Kernel, Refusal, add, concatenate, scaled

Pair = tuple[Kernel, Kernel]


def _added(a: Kernel, b: Kernel) -> Kernel:
    whole = add(a, b)
    assert isinstance(whole, Kernel), whole
    return whole


def _refused(a: Kernel, b: Kernel) -> str:
    """The reason, which has to be the same whichever branch comes first, but for their order."""
    forth, back = add(a, b), add(b, a)
    assert isinstance(forth, Refusal)
    assert isinstance(back, Refusal)
    return forth.reason


@given(drawing.branches())
def test_the_matrix_is_the_sum_of_the_matrices(pair: Pair) -> None:
    a, b = pair
    whole = _added(a, b)
    for size in drawing.sizes(a):
        (M_a, b_a), (M_b, b_b) = drawing.dense(a, size), drawing.dense(b, size)
        drawing.assert_equal(drawing.dense(whole, size), (M_a + M_b, b_a + b_b))


@given(drawing.branches(), st.data())
def test_output_size_for_every_input_size(pair: Pair, data: st.DataObject) -> None:
    a, b = pair
    size = data.draw(st.tuples(*[st.integers(1, 60)] * a.dims))
    assert _added(a, b).output_size(size) == a.output_size(size) == b.output_size(size)


@given(drawing.branches())
def test_commutative(pair: Pair) -> None:
    a, b = pair
    forth, back = _added(a, b), _added(b, a)
    settings = (forth.stride, forth.padding, forth.dilation, forth.groups)
    assert settings == (back.stride, back.padding, back.dilation, back.groups)
    assert torch.equal(forth.weight, back.weight)
    assert (forth.bias is None) == (back.bias is None)
    if forth.bias is not None and back.bias is not None:
        assert torch.equal(forth.bias, back.bias)


@given(drawing.branches())
def test_taps_are_aligned_by_their_offset(pair: Pair) -> None:
    """The sum has a tap where one branch has one, at offset δ·u − p, and its grid could not be coarser."""
    a, b = pair
    whole = _added(a, b)
    for axis in range(a.dims):
        wanted = {offset for kernel in (a, b) for offset in _offsets(kernel, axis)}
        others = [other for other in range(2, whole.weight.dim()) if other != axis + 2]
        used = whole.weight.abs().sum([0, 1, *others]).nonzero().flatten().tolist()
        offsets = _offsets(whole, axis)
        assert {offsets[tap] for tap in used} == wanted
        assert (offsets[0], offsets[-1]) == (min(wanted), max(wanted))


def _offsets(kernel: Kernel, axis: int) -> list[int]:
    return [kernel.dilation[axis] * u - kernel.padding[axis][0] for u in range(kernel.kernel_size[axis])]


@given(drawing.branches())
def test_gradients_are_those_of_the_two_branches(pair: Pair) -> None:
    a, b = pair
    x = drawing.signal(a, drawing.sizes(a)[-1])
    parameters = [t.requires_grad_() for t in (a.weight, a.bias, b.weight, b.bias) if t is not None]
    y = a.apply(x) + b.apply(x)
    towards = torch.randn_like(y)
    expected = torch.autograd.grad(y, parameters, towards)
    for found, gradient in zip(torch.autograd.grad(_added(a, b).apply(x), parameters, towards), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-10)


@given(drawing.kernels())
def test_twice_a_kernel(kernel: Kernel) -> None:
    whole = _added(kernel, kernel)
    assert torch.equal(whole.weight, 2 * kernel.weight)
    assert whole.groups == kernel.groups
    assert (whole.stride, whole.padding, whole.reach) == (kernel.stride, kernel.padding, kernel.reach)


def test_acnet_joins_its_three_branches_in_the_square() -> None:
    """k×k, 1×k and k×1 with padding that keeps them centred add up on the k×k grid."""
    square, row, column = (drawing.random(4, 3, *taps) for taps in ((3, 3), (1, 3), (3, 1)))
    whole = _added(
        _added(Kernel(square, padding=((1, 1), (1, 1))), Kernel(row, padding=((0, 0), (1, 1)))),
        Kernel(column, padding=((1, 1), (0, 0))),
    )
    expected = square.clone()
    expected[:, :, 1:2, :] += row
    expected[:, :, :, 1:2] += column
    torch.testing.assert_close(whole.weight, expected, rtol=0, atol=1e-15)
    assert whole.padding == ((1, 1), (1, 1))


# What is refused


@given(drawing.kernels(), drawing.kernels())
def test_another_number_of_axes(a: Kernel, b: Kernel) -> None:
    assume(a.dims != b.dims)
    assert _refused(a, b) == f"one branch has {a.dims} spatial axes, the other {b.dims}"


@given(drawing.branches(), st.data())
def test_other_channels(pair: Pair, data: st.DataObject) -> None:
    a, b = pair
    m, n = data.draw(drawing.channels(a.dims)), data.draw(drawing.channels(a.dims))
    assume((m, n) != (b.in_channels, b.out_channels))
    b = replace(b, weight=drawing.random(n, m, *b.kernel_size), bias=None, groups=1)
    assert f"{a.in_channels} channels to {a.out_channels}, the other {m} to {n}" in _refused(a, b)
    size = drawing.sizes(a)[0]
    M_a, M_b = drawing.dense(a, size)[0], drawing.dense(b, size)[0]
    assert M_a.shape != M_b.shape  # there is no sum


@given(drawing.branches(), st.data())
def test_other_strides(pair: Pair, data: st.DataObject) -> None:
    a, b = pair
    assume(a.dims > 0)
    b = replace(b, stride=data.draw(drawing.strides(a.dims)))
    assume(a.stride != b.stride)
    assert _refused(a, b) == f"the branches have strides {a.stride} and {b.stride}"
    assert _sizes_differ(a, b)


@given(drawing.branches(), st.data())
def test_other_extents(pair: Pair, data: st.DataObject) -> None:
    a, b = pair
    assume(a.dims > 0)
    axis = data.draw(st.integers(0, a.dims - 1))
    excess = data.draw(st.sampled_from([1, -1, 2, -2, 3]))
    side = data.draw(st.integers(0, 1))
    padding = [list(sides) for sides in b.padding]
    padding[axis][side] += excess
    b = replace(b, padding=tuple((before, after) for before, after in padding))
    assert f"outputs of different size on axis {axis}" in _refused(a, b)
    assert _sizes_differ(a, b)


def _sizes_differ(a: Kernel, b: Kernel) -> bool:
    """Whether some signal, the same length on every axis, leaves outputs of two sizes."""
    return any(a.output_size((length,) * a.dims) != b.output_size((length,) * a.dims) for length in range(20, 80))


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
def test_bias(biases: tuple[bool, bool]) -> None:
    a, b = (Kernel(drawing.random(3, 2), drawing.random(3) if there else None) for there in biases)
    present = [kernel.bias for kernel in (a, b) if kernel.bias is not None]
    bias = _added(a, b).bias
    if not present:
        assert bias is None
    else:
        assert bias is not None
        assert torch.equal(bias, torch.stack(present).sum(0))


@given(drawing.branches(), st.integers(1, 3))
def test_the_matrix_of_a_concatenation_is_one_above_the_other(pair: Pair, n: int) -> None:
    a, b = pair
    b = replace(b, weight=drawing.random(n, b.in_channels, *b.kernel_size), bias=None, groups=1)
    whole = concatenate(a, b)
    assert isinstance(whole, Kernel)
    for size in drawing.sizes(a):
        (M_a, b_a), (M_b, b_b) = drawing.dense(a, size), drawing.dense(b, size)
        drawing.assert_equal(drawing.dense(whole, size), (torch.cat([M_a, M_b]), torch.cat([b_a, b_b])))


@given(drawing.branches())
def test_a_concatenation_is_refused_where_a_sum_is_for_the_sizes(pair: Pair) -> None:
    a, b = pair
    d = a.dims
    assume(d > 0)
    for other, word in [
        (replace(b, stride=tuple(s + 1 for s in b.stride)), "strides"),
        (replace(b, padding=tuple((p + 1, q) for p, q in b.padding)), "size"),
        (Kernel(drawing.random(2, a.in_channels + 1, *b.kernel_size), None, b.stride, b.padding), "channels"),
        (Kernel(drawing.random(2, a.in_channels)), "axes"),
    ]:
        refusal = concatenate(a, other)
        assert isinstance(refusal, Refusal)
        assert word in refusal.reason


@given(drawing.kernels(), st.sampled_from((-1.0, 0.5, 3.0)))
def test_the_matrix_of_a_multiple_is_the_multiple(kernel: Kernel, factor: float) -> None:
    for size in drawing.sizes(kernel)[:2]:
        M, b = drawing.dense(kernel, size)
        drawing.assert_equal(drawing.dense(scaled(kernel, factor), size), (factor * M, factor * b))
