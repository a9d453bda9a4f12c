"""A factorised kernel is the kernel, in layers that look freshly initialised and are all in use."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import drawing
from fxexpand.algebra import Kernel, Refusal, compose_all
from fxexpand.algebra.factorize import around_kernel, matrices, shift_copies, shift_taps, shifts
from fxexpand.algebra.kernel import Ints


def _layers(
    target: Kernel, widths: Sequence[int], taps: Sequence[Ints], *, strided: int, dilated: Sequence[int]
) -> list[Kernel]:
    """Fresh layers of these hidden widths, counted inside each group; the padding of ``target`` is on the first."""
    g, d = target.groups, target.dims
    inside = [target.in_channels // g, *widths, target.out_channels // g]
    return [
        Kernel(
            weight=0.1 * drawing.random(g * inside[i + 1], inside[i], *size),
            bias=None if target.bias is None else drawing.random(g * inside[i + 1]),
            stride=target.stride if i == strided else (),
            padding=target.padding if i == 0 else (),
            dilation=target.dilation if i in dilated else (1,) * d,
            groups=g,
        )
        for i, size in enumerate(taps)
    ]


def _pointwise_around(target: Kernel, p: int, q: int) -> list[Kernel]:
    one = (1,) * target.dims
    return _layers(target, [p, q], [one, target.kernel_size, one], strided=1, dilated=[1])


def _small_windows(target: Kernel, first: int, others: int) -> list[Kernel]:
    taps = shift_taps(target.kernel_size)
    last = len(taps) - 1
    return _layers(target, [first, *[others] * (last - 1)], taps, strided=last, dilated=range(last + 1))


def _found(chain: list[Kernel] | Refusal) -> list[Kernel]:
    assert not isinstance(chain, Refusal), chain
    return chain


def _assert_reproduces(chain: list[Kernel], target: Kernel) -> None:
    size = drawing.sizes(target)[0]
    drawing.assert_equal(drawing.dense_chain(chain, size), drawing.dense(target, size))
    whole = compose_all(chain)
    assert isinstance(whole, Kernel)
    assert (whole.stride, whole.padding, whole.reach) == (target.stride, target.padding, target.reach)
    assert whole.groups == target.groups
    torch.testing.assert_close(whole.weight, target.weight, rtol=0, atol=1e-12 * float(target.weight.abs().max()))
    assert (whole.bias is None) == (target.bias is None)
    if whole.bias is not None and target.bias is not None:
        assert torch.equal(whole.bias, target.bias)


def _assert_looks_fresh(chain: list[Kernel], fresh: list[Kernel], solved: int) -> None:
    """Shapes and settings are the fresh ones; so is the size of the weights, but for the layer that makes up for it.

    The part that carries the signal has the root mean square of the fresh weight; where there are directions free, what
    the fresh weight has along them comes on top.
    """
    for j, (found, drawn) in enumerate(zip(chain, fresh, strict=True)):
        assert found.weight.shape == drawn.weight.shape
        assert found.weight.is_contiguous()
        settings = (found.stride, found.padding, found.dilation, found.groups)
        assert settings == (drawn.stride, drawn.padding, drawn.dilation, drawn.groups)
        assert (found.bias is None) == (drawn.bias is None)
        ratio = float(found.weight.square().mean().sqrt() / drawn.weight.square().mean().sqrt())
        if j == solved:
            continue
        if j == 0:
            assert ratio == pytest.approx(1, rel=1e-9)
        else:
            assert 1 - 1e-9 <= ratio <= sqrt(2) + 1e-9


def _assert_all_in_use(chain: list[Kernel], target: Kernel) -> None:
    """Every weight and bias makes a difference to the output, so that all of them learn."""
    smallest = drawing.sizes(target)[0]
    size = tuple(length + 2 * reach for length, reach in zip(smallest, target.reach, strict=True))
    parameters = [t.requires_grad_() for kernel in chain for t in (kernel.weight, kernel.bias) if t is not None]
    y = drawing.signal(target, size, batch=3)
    for kernel in chain:
        y = kernel.apply(y)
    for gradient in torch.autograd.grad((y * torch.randn_like(y)).sum(), parameters):
        assert float(gradient.abs().min()) > 0


# CL


@given(drawing.kernels(), st.integers(0, 3), st.integers(0, 3))
def test_around_kernel(target: Kernel, more: int, more_out: int) -> None:
    g = target.groups
    fresh = _pointwise_around(target, target.in_channels // g + more, target.out_channels // g + more_out)
    chain = _found(around_kernel(target, fresh))
    _assert_reproduces(chain, target)
    _assert_looks_fresh(chain, fresh, solved=1)


@given(drawing.kernels(padding=()), st.integers(0, 2))
def test_around_kernel_uses_all_of_its_layers(target: Kernel, more: int) -> None:
    g = target.groups
    fresh = _pointwise_around(target, target.in_channels // g + more, target.out_channels // g + more)
    _assert_all_in_use(_found(around_kernel(target, fresh)), target)


@given(drawing.kernels(), st.data())
def test_around_kernel_refuses_what_is_too_narrow(target: Kernel, data: st.DataObject) -> None:
    m, n = target.in_channels // target.groups, target.out_channels // target.groups
    p, q = data.draw(st.integers(1, m + 1)), data.draw(st.integers(1, n + 1))
    answer = around_kernel(target, _pointwise_around(target, p, q))
    assert isinstance(answer, Refusal) == (p < m or q < n)
    if isinstance(answer, Refusal):
        inside = f" in each of the {target.groups} groups" if target.groups > 1 else ""
        assert answer.reason == f"hidden layers need at least {m}, {n} channels{inside}, found {p}, {q}"


# FC


def _linear(m: int, n: int, bias: bool) -> Kernel:
    return Kernel(drawing.random(n, m), drawing.random(n) if bias else None)


def _fresh_matrices(target: Kernel, widths: list[int]) -> list[Kernel]:
    return _layers(target, widths, [()] * (len(widths) + 1), strided=-1, dilated=[])


@given(st.integers(1, 7), st.integers(1, 7), st.booleans(), st.data())
def test_matrices(m: int, n: int, bias: bool, data: st.DataObject) -> None:
    target = _linear(m, n, bias)
    widths = data.draw(st.lists(st.integers(min(m, n), 9), max_size=3))
    fresh = _fresh_matrices(target, widths)
    chain = _found(matrices(target, fresh))
    _assert_reproduces(chain, target)
    solvable = [j for j in range(len(fresh)) if all(w >= m for w in widths[:j]) and all(w >= n for w in widths[j:])]
    # Of the layers that can hold the target the one nearest the middle does.
    middle = min(solvable, key=lambda j: abs(2 * j - len(widths)))
    _assert_looks_fresh(chain, fresh, solved=middle)
    _assert_all_in_use(chain, target)


@given(st.integers(2, 7), st.integers(2, 7), st.data())
def test_matrices_refuse_what_is_too_narrow(m: int, n: int, data: st.DataObject) -> None:
    target = _linear(m, n, bias=True)
    widths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    answer = matrices(target, _fresh_matrices(target, widths))
    # A product of matrices has at most the rank of its narrowest: no other weights would do.
    rank = int(torch.linalg.matrix_rank(target.weight))
    assert isinstance(answer, Refusal) == (min(widths) < rank)
    if isinstance(answer, Refusal):
        found = ", ".join(map(str, widths))
        assert answer.reason == f"hidden layers need at least {min(m, n)} features each, found {found}"


@pytest.mark.parametrize("width", [64, 65, 129, 600])
def test_matrices_of_any_width(width: int) -> None:
    """Wide layers are mixed in blocks."""
    target = _linear(20, 10, bias=True)
    fresh = _fresh_matrices(target, [width, width])
    chain = _found(matrices(target, fresh))
    _assert_reproduces(chain, target)
    _assert_looks_fresh(chain, fresh, solved=1)
    _assert_all_in_use(chain, target)
    # The signal is spread over the hidden features; no few of them carry it.
    carried = chain[0].weight.detach().square().sum(1)
    assert float(carried.max()) < 12 * float(carried.mean())


# CK


ODD: dict[int, list[Ints]] = {
    1: [(3,), (5,), (7,), (9,), (11,), (13,)],
    2: [(5, 5), (7, 7), (9, 9), (3, 5), (7, 3), (1, 7), (9, 1), (5, 9), (11, 3), (1, 1), (3, 3)],
    3: [(5, 5, 5), (1, 3, 5), (7, 1, 3), (1, 1, 9), (3, 3, 3)],
}


@st.composite
def _odd_kernels(draw: st.DrawFn) -> Kernel:
    d = draw(drawing.dims(1))
    m, n = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    g = draw(st.integers(1, 2))
    return Kernel(
        weight=drawing.random(n * g, m, *draw(st.sampled_from(ODD[d]))),
        bias=drawing.random(n * g) if draw(st.booleans()) else None,
        stride=draw(drawing.strides(d)),
        padding=draw(drawing.paddings(d)),
        dilation=(draw(st.integers(1, 2)), *(1,) * (d - 1)),
        groups=g,
    )


def _needed(target: Kernel) -> tuple[int, int]:
    copies_in, copies_out = shift_copies(target.kernel_size)
    return copies_in * target.in_channels // target.groups, copies_out * target.out_channels // target.groups


@given(_odd_kernels(), st.integers(0, 2), st.integers(0, 2))
def test_shifts(target: Kernel, more: int, more_out: int) -> None:
    first, others = _needed(target)
    fresh = _small_windows(target, first + more, others + more_out)
    chain = _found(shifts(target, fresh))
    _assert_reproduces(chain, target)
    _assert_looks_fresh(chain, fresh, solved=1)


@pytest.mark.parametrize("taps", [taps for sizes in ODD.values() for taps in sizes], ids=str)
def test_shifts_reach_every_tap(taps: Ints) -> None:
    target = Kernel(drawing.random(2, 2, *taps), drawing.random(2))
    _assert_reproduces(_found(shifts(target, _small_windows(target, *_needed(target)))), target)


@pytest.mark.parametrize("taps", [(5,), (7,), (13,), (3, 7), (5, 5)], ids=str)
def test_shifts_use_all_of_their_layers(taps: Ints) -> None:
    target = Kernel(drawing.random(4, 2, *taps), drawing.random(4), groups=2)
    first, others = _needed(target)
    _assert_all_in_use(_found(shifts(target, _small_windows(target, first + 1, others + 1))), target)


@given(_odd_kernels(), st.data())
def test_shifts_refuse_what_is_too_narrow(target: Kernel, data: st.DataObject) -> None:
    first, others = _needed(target)
    p, q = data.draw(st.integers(max(1, first - 2), first)), data.draw(st.integers(max(1, others - 2), others))
    fresh = _small_windows(target, p, q)
    answer = shifts(target, fresh)
    hidden = len(fresh) - 2
    assert isinstance(answer, Refusal) == (p < first or (hidden > 0 and q < others))
    if isinstance(answer, Refusal):
        inside = f" in each of the {target.groups} groups" if target.groups > 1 else ""
        needed, found = ", ".join(map(str, [first, *[others] * hidden])), ", ".join(map(str, [p, *[q] * hidden]))
        assert answer.reason == f"hidden layers need at least {needed} channels{inside}, found {found}"


@given(st.lists(st.integers(0, 10).map(lambda half: 2 * half + 1), min_size=1, max_size=3))
def test_shift_taps_add_up(kernel_size: list[int]) -> None:
    taps = shift_taps(tuple(kernel_size))
    assert len(taps) == max(2, *((k - 1) // 2 for k in kernel_size), 2)
    for axis, k in enumerate(kernel_size):
        counts = [layer[axis] for layer in taps]
        assert set(counts) <= {1, 3}
        assert 1 + sum(count - 1 for count in counts) == k


def test_shift_copies() -> None:
    """Rate 4 is enough for square kernels of 5, 7 and 9."""
    assert [shift_copies((k,))[0] for k in (1, 3, 5, 7, 9, 11, 13)] == [1, 1, 2, 2, 2, 2, 2]
    assert [shift_copies((k,))[1] for k in (1, 3, 5, 7, 9, 11, 13)] == [1, 1, 1, 2, 2, 3, 3]
    assert [shift_copies((k, k)) for k in (3, 5, 7, 9)] == [(1, 1), (4, 1), (4, 4), (4, 4)]
    for taps in ([5, 7], [3, 9, 5]):
        copies = [shift_copies((k,)) for k in taps]
        assert shift_copies(tuple(taps)) == (prod(a for a, _ in copies), prod(b for _, b in copies))


# All of them


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e9])
def test_targets_of_any_size(scale: float) -> None:
    weight, bias = scale * drawing.random(3, 2, 5), drawing.random(3)
    target = Kernel(weight, bias)
    linear = Kernel(scale * drawing.random(3, 2), bias)
    chains = [
        (target, around_kernel(target, _pointwise_around(target, 4, 5))),
        (target, shifts(target, _small_windows(target, 8, 8))),
        (linear, matrices(linear, _fresh_matrices(linear, [4, 4]))),
    ]
    for whole, chain in chains:
        size = drawing.sizes(whole)[0]
        M, b = drawing.dense_chain(_found(chain), size)
        expected, offset = drawing.dense(whole, size)
        # What is free is cancelled, to the precision of the fresh weights.
        torch.testing.assert_close(M, expected, rtol=0, atol=1e-15 + 1e-12 * scale)
        torch.testing.assert_close(b, offset, rtol=0, atol=0)


def test_fresh_weights_of_zero_leave_the_target() -> None:
    """Layers that a user has set to zero say nothing about how large weights should be."""
    target = Kernel(drawing.random(3, 2, 3), drawing.random(3))
    fresh = _pointwise_around(target, 4, 5)
    zeros = [Kernel(torch.zeros_like(k.weight), k.bias, k.stride, k.padding, k.dilation) for k in fresh]
    _assert_reproduces(_found(around_kernel(target, zeros)), target)


def test_free_directions_keep_the_fresh_weights() -> None:
    """2 of 6 and 3 of 8 hidden directions carry the signal; along the others the layers read what they did."""
    target = Kernel(drawing.random(3, 2, 5))
    fresh = _pointwise_around(target, 6, 8)
    chain = _found(around_kernel(target, fresh))
    for j, carrying in ((1, 2), (2, 3)):
        change = chain[j].weight - fresh[j].weight  # (q, p, *k)
        assert int(torch.linalg.matrix_rank(change.transpose(0, 1).flatten(1))) == carrying


def test_two_calls_differ() -> None:
    """Hidden directions are drawn at random."""
    target = Kernel(drawing.random(3, 2, 3))
    fresh = _pointwise_around(target, 4, 5)
    one, other = _found(around_kernel(target, fresh)), _found(around_kernel(target, fresh))
    assert not torch.allclose(one[0].weight, other[0].weight)
