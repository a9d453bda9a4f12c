"""A padding is refused if and only if there is a signal for which one kernel would be wrong.

Both ways: for every refusal there is an input size at which the kernel that ignores the reason, ``_regardless``,
differs from the two layers in turn, and where nothing is refused there is none.
"""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

import drawing
from fxexpand.algebra import Kernel, Refusal, compose
from fxexpand.algebra.compose import padding_refusal
from fxexpand.algebra.kernel import Ints

Pair = tuple[Kernel, Kernel]


def _regardless(first: Kernel, second: Kernel) -> Kernel:
    """The same formulas without the condition on padding."""
    padding = tuple(
        (a[0] + s * b[0], a[1] + s * b[1]) for a, s, b in zip(first.padding, first.stride, second.padding, strict=True)
    )
    whole = compose(first, replace(second, padding=()))
    assert isinstance(whole, Kernel)
    return replace(whole, padding=padding)


def _on_one_axis(side: int, d: int) -> st.SearchStrategy[Pair]:
    """Pairs that on one side of the first axis, and nowhere else, may have a padding that rules out one kernel."""

    @st.composite
    def draw_pair(draw: st.DrawFn) -> Pair:
        second = draw(drawing.kernels(d, padding=((0, 0),) * d))
        first = draw(drawing.kernels(d, n=second.in_channels, bias=False))
        amounts = [draw(st.integers(drawing.CROP, 0))] * 2
        amounts[side] = draw(st.integers(1, 3))
        padding = ((amounts[0], amounts[1]), *[(draw(st.integers(drawing.CROP, 0)), 0) for _ in range(1, d)])
        return first, replace(second, padding=padding)

    return draw_pair()


def _differs_at(first: Kernel, second: Kernel) -> Ints | None:
    """A signal size at which ``_regardless`` is wrong; None when there is none among all the residues of the strides.

    Only the first axis varies: the others are long, so that there is an output.
    """
    whole = _regardless(first, second)
    period = first.stride[0] * second.stride[0]
    # Long enough that windows at one end are free of the other, in both layers.
    start = drawing.smallest((first, second), 0) + whole.reach[0] + sum(map(abs, whole.padding[0]))
    for length in range(start, start + 2 * period):
        size = (length, *(drawing.smallest((first, second), axis) + 4 for axis in range(1, first.dims)))
        x = drawing.signal(first, size, batch=1)
        expected = second.apply(first.apply(x))
        error = float((whole.apply(x) - expected).abs().max())
        if error > 1e-6 * float(expected.abs().max()):
            return size
    return None


@pytest.mark.parametrize("side", [0, 1], ids=["before", "after"])
@pytest.mark.parametrize("d", [1, 2])
@given(data=st.data())
def test_a_bias_under_padding_is_refused_for_good_reason(data: st.DataObject, side: int, d: int) -> None:
    first, second = data.draw(_on_one_axis(side, d))
    first = replace(first, bias=drawing.random(first.out_channels), padding=tuple((r, r) for r in first.reach))
    refusal = compose(first, second)
    assert isinstance(refusal, Refusal)
    assert "bias" in refusal.reason
    assert _differs_at(first, second) is not None
    assert isinstance(compose(replace(first, bias=None), second), Kernel)  # the remedy it names


@pytest.mark.parametrize("side", [0, 1], ids=["before", "after"])
@pytest.mark.parametrize("d", [1, 2])
@given(data=st.data())
def test_a_window_over_the_border_is_refused_for_good_reason(data: st.DataObject, side: int, d: int) -> None:
    first, second = data.draw(_on_one_axis(side, d))
    reach = first.reach[0]
    found = data.draw(st.integers(reach - 3, reach - 1))
    amounts = (found, first.padding[0][1]) if side == 0 else (first.padding[0][0], found)
    first = replace(first, padding=(amounts, *first.padding[1:]))
    refusal = padding_refusal(first, second)
    if refusal is None:  # as strides let the windows before the signal begin far enough from it
        assert side == 0
        assert _differs_at(first, second) is None
        return
    assert f"{('before', 'after')[side]} the signal" in refusal.reason
    assert refusal.reason.endswith(f"found {found}")
    assert _differs_at(first, second) is not None
    # The number it names is enough, and one less is not.
    needed = int(refusal.reason.split("at least ")[1].split()[0])
    for amount, enough in ((needed, True), (needed - 1, False)):
        amounts = (amount, first.padding[0][1]) if side == 0 else (first.padding[0][0], amount)
        mended = replace(first, padding=(amounts, *first.padding[1:]))
        assert isinstance(compose(mended, second), Kernel) == enough


@given(drawing.pairs(d=1))
def test_refused_if_and_only_if_wrong_for_some_size(pair: Pair) -> None:
    refused = padding_refusal(*pair) is not None
    assert isinstance(compose(*pair), Refusal) == refused
    assert (_differs_at(*pair) is not None) == refused


def _all_settings(side: int) -> list[Pair]:
    """Every pair in small ranges with one tap pattern a layer, one channel, and padding that matters on one side."""
    weights = {(layer, k): drawing.random(1, 1, k) for layer in (1, 2) for k in (1, 2, 3)}
    taps = [(1, 1), (2, 1), (3, 1), (2, 2), (3, 2)]
    wide = 4  # on the other side the first layer's window never leaves its padding
    found = []
    for (k1, d1), (k2, d2) in ((a, b) for a in taps for b in taps):
        for s1, s2 in ((a, b) for a in (1, 2, 3) for b in (1, 2, 3)):
            for p1, p2 in ((a, b) for a in range(-1, 5) for b in range(1, 5)):
                padding = [((p1, wide), (p2, 0)), ((wide, p1), (0, p2))][side]
                first = Kernel(weights[1, k1], None, (s1,), padding[:1], (d1,))
                found.append((first, Kernel(weights[2, k2], None, (s2,), padding[1:], (d2,))))
    return found


class _EverySize:
    """Signals of every size from 1 to ``longest`` as one batch, so that thousands of pairs take seconds.

    Row L − 1 holds a signal of L samples, and zeros beside it. A layer is run over positions that reach beyond its
    output, and what lies beyond is set to zero, as the padding of the layer after it would.
    """

    longest = 40

    def __init__(self) -> None:
        self.lengths = torch.arange(1, self.longest + 1)
        self.signals = self._cut(drawing.random(self.longest, 1, self.longest), self.lengths)

    @staticmethod
    def _cut(x: Tensor, lengths: Tensor) -> Tensor:
        return x * (torch.arange(x.shape[-1]) < lengths[:, None, None])

    def run(self, *chain: Kernel) -> tuple[Tensor, Tensor]:
        """(every size, 1, positions) and the length of each output, some of which are below 1: no output."""
        x, lengths = self.signals, self.lengths
        for kernel in chain:
            before, after = kernel.padding[0]
            places = self.longest + 20
            room = kernel.stride[0] * (places - 1) + kernel.reach[0] + 1 - before - x.shape[-1]
            wide = torch.nn.functional.pad(x, (before, room))
            lengths = (lengths + before + after - kernel.reach[0] - 1).div(kernel.stride[0], rounding_mode="floor") + 1
            x = self._cut(replace(kernel, padding=()).apply(wide), lengths)
        return x, lengths


@given(drawing.pairs(d=1))
def test_running_every_size_at_once_is_running_each(pair: Pair) -> None:
    first = replace(pair[0], weight=drawing.random(1, 1, *pair[0].kernel_size), bias=None, groups=1)
    second = replace(pair[1], weight=drawing.random(1, 1, *pair[1].kernel_size), bias=None, groups=1)
    every = _EverySize()
    outputs, lengths = every.run(first, second)
    for size in drawing.sizes(first, second):
        row = size[0] - 1
        if row >= every.longest:
            break
        M, _ = drawing.dense_chain([first, second], size)
        expected = M @ every.signals[row, 0, : size[0]]
        assert int(lengths[row]) == len(expected)
        torch.testing.assert_close(outputs[row, 0, : len(expected)], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", [0, 1], ids=["before", "after"])
def test_refused_if_and_only_if_wrong_in_all_small_settings(side: int) -> None:
    every = _EverySize()
    settings = _all_settings(side)
    refused, wrong = 0, []
    for first, second in settings:
        whole = _regardless(first, second)
        expected, lengths = every.run(first, second)
        there = (lengths > 0) & (every.run(first)[1] > 0)
        error = float((every.run(whole)[0] - expected)[there].abs().max())
        refusal = padding_refusal(first, second)
        refused += refusal is not None
        if error > 1e-6 if refusal is None else error < 1e-6:
            wrong.append((first, second, refusal, error))
    assert not wrong, f"{len(wrong)} of {len(settings)}, the first: {wrong[0]}"
    assert 0.1 * len(settings) < refused < 0.9 * len(settings)  # both directions were tested
