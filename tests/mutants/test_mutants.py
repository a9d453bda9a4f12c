"""The properties of the kit kill every mutant of the algebra that we could think of, in the `ci` profile.

Each mutant is one mistake that somebody has made, or could make. A property kills it by failing for one of the 50
examples that `ci` draws, the same ones in every run; unmutated code passes them all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import nn

import drawing
import fxexpand
from fxexpand import CK, CL, FC
from fxexpand.algebra import Kernel, add, compose, concatenate, scaled
from fxexpand.algebra.compose import compose_rounded
from fxexpand.algebra.kernel import with_groups
from fxexpand.algebra.order import compose_in
from fxexpand.graph.composer import Composer
from fxexpand.testing import Case, assert_equivalent, check_model, expandable_layers, linear_chains
from fxexpand.testing.draw.drafts import ConvDraft
from fxexpand.testing.draw.sizes import PADDING_MODES, divisors
from mistakes import MUTANTS
from mutating import Mutant, mutated

CI = settings(
    max_examples=50,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],  # a kill is a kill, however large
    suppress_health_check=list(HealthCheck),
)
Pair = tuple[Kernel, Kernel]


def series(pair: Pair) -> None:
    """One kernel for two in series is the product of their matrices, wherever it is given."""
    whole = compose(*pair)
    if isinstance(whole, Kernel):
        for size in drawing.sizes(*pair)[::2]:
            drawing.assert_equal(drawing.dense(whole, size), drawing.dense_chain(list(pair), size))


def in_any_order(pair: Pair) -> None:
    """Three kernels multiply out to the same from the left and from the right."""
    n = pair[1].out_channels
    last = Kernel(drawing.random(2, n, *(1,) * pair[1].dims))
    for order in ((0, (1, 2)), ((0, 1), 2)):
        whole = compose_in(order, [*pair, last])
        if isinstance(whole, Kernel):
            size = drawing.sizes(*pair)[0]
            drawing.assert_equal(drawing.dense(whole, size), drawing.dense_chain([*pair, last], size))


def trained(pair: Pair) -> None:
    """The derivatives written out are those that autograd finds for composing pair by pair, biases included."""
    last = Kernel(drawing.random(3, pair[1].out_channels, *(1,) * pair[1].dims), drawing.random(3))
    chain = [replace(kernel, padding=((0, 0),) * kernel.dims) for kernel in (*pair, last)]
    how, whole = Composer.of(((0, 1), 2), chain), compose_in(((0, 1), 2), chain)
    if how is None or not isinstance(whole, Kernel):
        return
    leaves = [t.requires_grad_() for k in chain for t in (k.weight, k.bias) if t is not None]
    found, expected = how.numbers([k.weight for k in chain], [k.bias for k in chain]), compose_in(((0, 1), 2), chain)
    assert found is not None
    assert isinstance(expected, Kernel)
    assert found[1] is not None
    assert expected.bias is not None
    upstream = drawing.random(*expected.weight.shape), drawing.random(*expected.bias.shape)
    ours = torch.autograd.grad((found[0], found[1]), leaves, upstream)
    theirs = torch.autograd.grad((expected.weight, expected.bias), leaves, upstream)
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in zip(ours, theirs, strict=True))


def rounded(kernel: Kernel) -> None:
    """Scaling in blocks is composing, also where a block holds a part of the channels."""
    n = kernel.out_channels
    scale = Kernel(drawing.random(n, 1, *(1,) * kernel.dims), drawing.random(n), groups=n)
    module = sys.modules[compose_rounded.__module__]
    whole_block = vars(module)["_BLOCK"]
    vars(module)["_BLOCK"] = 1
    try:
        whole = compose_rounded(kernel, scale, torch.float64)
    finally:
        vars(module)["_BLOCK"] = whole_block
    size = drawing.sizes(kernel)[0]
    drawing.assert_equal(drawing.dense(whole, size), drawing.dense_chain([kernel, scale], size))


def parallel(pair: Pair) -> None:
    """One kernel for two branches is the sum of their matrices, or one above the other, wherever it is given."""
    total, stacked = add(*pair), concatenate(*pair)
    for size in drawing.sizes(*pair[:1])[::2]:
        if isinstance(total, Kernel) or isinstance(stacked, Kernel):
            (M, b), (N, c) = (drawing.dense(kernel, size) for kernel in pair)
        if isinstance(total, Kernel):
            drawing.assert_equal(drawing.dense(total, size), (M + N, b + c))
        if isinstance(stacked, Kernel):
            drawing.assert_equal(drawing.dense(stacked, size), (torch.cat([M, N]), torch.cat([b, c])))


def alone(kernel: Kernel) -> None:
    """Twice a kernel, and a kernel in fewer groups, are what they say."""
    size = drawing.sizes(kernel)[0]
    M, b = drawing.dense(kernel, size)
    drawing.assert_equal(drawing.dense(scaled(kernel, 2.0), size), (2 * M, 2 * b))
    for groups in divisors(kernel.groups, kernel.groups):
        drawing.assert_equal(drawing.dense(with_groups(kernel, groups), size), (M, b))


def fuse_keeps(case: Case) -> None:
    assert_equivalent(case.module, fxexpand.fuse(case.module, *case.inputs, when="always"), *case.inputs)


def battery_holds(case: Case) -> None:
    report = check_model(nn.Sequential(case.module), *case.inputs, rules=[CK(4), CL(2), FC(2)], backend=None)
    reason = report.skipped.get("expand preserves", "")
    assert "differ from the layer" not in reason, reason  # these strategies are right


@st.composite
def mismatched(draw: st.DrawFn) -> Pair:
    """Branches that differ in stride or padding, and so have no sum."""
    a, b = draw(drawing.branches(draw(drawing.dims(1, 2))))
    if draw(st.booleans()):
        return a, replace(b, stride=draw(drawing.strides(a.dims)))
    return a, replace(b, padding=tuple((before + 1, after) for before, after in b.padding))


@st.composite
def barely_padded(draw: st.DrawFn) -> Pair:
    """Two kernels on one axis, the second of which pads: the first pads just enough for that, or just not."""
    taps, padding = draw(st.integers(2, 3)), draw(st.integers(1, 2))
    first = Kernel(drawing.random(2, 1, taps), None, padding=((draw(st.integers(taps - 2, taps)), taps - 1),))
    if draw(st.booleans()):
        first = replace(first, padding=(first.padding[0][::-1],))
    return first, Kernel(drawing.random(1, 2, 3), padding=((padding, padding),))


@st.composite
def grouped(draw: st.DrawFn) -> Pair:
    """Two kernels of the same groups, of one or two channels each; one of them has one tap."""
    g = draw(st.integers(2, 3))
    m, c, n = (draw(st.integers(1, 2)) for _ in range(3))
    taps = draw(st.permutations((1, draw(st.sampled_from((2, 17))))))
    first = Kernel(drawing.random(g * c, m, taps[0]), drawing.random(g * c), groups=g)
    return first, Kernel(drawing.random(g * n, c, taps[1]), drawing.random(g * n), groups=g)


@st.composite
def bordered(draw: st.DrawFn) -> Case:
    """A convolution that pads with what is not zero, that is transposed or that stands behind padding, with another."""
    d, mode = draw(st.integers(1, 2)), draw(st.sampled_from(PADDING_MODES[1:]))
    point = ConvDraft(bias=draw(st.booleans())).build(d, 2)
    wide = ConvDraft(taps=(3, 2, 1), padding=(1, 2, 0), mode=mode).build(d, 2)
    spread = ConvDraft(taps=(3, 2, 1), stride=(2, 1, 1), transposed=True).build(d, 2)
    amounts = draw(st.permutations((0, 1, 2)))[:d]
    pads: Any = (nn.ZeroPad1d, nn.ZeroPad2d)
    pad = pads[d - 1](tuple(side for amount in amounts for side in (amount, amount)))
    plain = ConvDraft(taps=(3, 2, 1), bias=False).build(d, 2)
    chain = draw(st.sampled_from(((wide, point), (point, wide), (point, spread), (spread, point), (pad, plain))))
    return Case(nn.Sequential(*chain), [(2, 2, *(9,) * d)])


PROPERTIES: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None]]] = {
    "series": (drawing.pairs(), series),
    "series on one axis": (drawing.pairs(1), series),
    "series that pad just enough": (barely_padded(), series),
    "series beside a depthwise kernel": (drawing.with_depthwise(), series),
    "series of groups": (grouped(), series),
    "derivatives of groups": (grouped(), trained),
    "any order": (drawing.pairs(), in_any_order),
    "derivatives": (drawing.pairs(), trained),
    "derivatives beside a depthwise kernel": (drawing.with_depthwise(), trained),
    "scaling and rounding": (drawing.kernels(), rounded),
    "parallel": (drawing.branches(), parallel),
    "parallel, or refused": (mismatched(), parallel),
    "alone": (drawing.kernels(), alone),
    "fusing layers with borders": (bordered(), fuse_keeps),
    "fusing chains": (linear_chains(), fuse_keeps),
    "the battery on layers": (
        expandable_layers((7,)) | expandable_layers((11,)) | expandable_layers(()),
        battery_holds,
    ),
}


def ask(name: str) -> None:
    """Hold the property against its 50 examples."""
    drawn, holds = PROPERTIES[name]
    CI(given(drawn)(holds))()


@pytest.mark.parametrize("name", PROPERTIES)
def test_the_code_as_it_is_passes(name: str) -> None:
    ask(name)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_a_mutant_is_killed(mutant: Mutant) -> None:
    with mutated(mutant):
        killed = any(_fails(name) for name in PROPERTIES)
    assert killed, f"{mutant.what}: every property of the kit holds for it"


def _fails(name: str) -> bool:
    try:
        ask(name)
    except Exception:  # noqa: BLE001 -- an example that raises is one that the code is wrong about
        return True
    return False


def test_afterwards_the_code_is_as_it_was() -> None:
    before = [mutant.function.__code__ for mutant in MUTANTS]
    for mutant, code in zip(MUTANTS, before, strict=True):
        with mutated(mutant):
            assert mutant.function.__code__ is not code
        assert mutant.function.__code__ is code


def test_there_are_enough_and_each_is_another() -> None:
    assert len({(mutant.where, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS) >= 20
