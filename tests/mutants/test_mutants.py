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
from fxexpand.algebra.composition import Composition
from fxexpand.algebra.kernel import with_groups
from fxexpand.algebra.order import compose_in
from fxexpand.testing import Case, assert_equivalent, check_model, expandable_layers, linear_chains
from fxexpand.testing.draw.drafts import ConvDraft
from fxexpand.testing.draw.sizes import PADDING_MODES, divisors
from mutating import Mutant, mutated

COMPOSE, COMBINE, KERNEL, AFFINE = "algebra.compose", "algebra.combine", "algebra.kernel", "algebra.affine"
PRODUCT = "algebra.product"
MUTANTS = [
    # Series
    Mutant("drops the first layer's bias", f"{COMPOSE}:_bias", "return through if", "return None if"),
    Mutant(
        "counts the first layer's bias twice",
        f"{COMPOSE}:_bias",
        "through + second.bias",
        "2 * through + second.bias",
    ),
    Mutant("forgets the second layer's bias", f"{COMPOSE}:_bias", "else through + second.bias", "else through"),
    Mutant(
        "sees the first layer's bias at one tap",
        f"{COMPOSE}:_bias",
        "second.weight.sum(taps)",
        "second.weight.mean(taps)",
    ),
    Mutant("has the stride of the second layer", f"{COMPOSE}:compose", "tuple(a * b for a, b", "tuple(b for a, b"),
    Mutant("has the stride of the first layer", f"{COMPOSE}:compose", "tuple(a * b for a, b", "tuple(a for a, b"),
    Mutant(
        "adds paddings without the stride",
        f"{COMPOSE}:compose",
        "(a[0] + s * b[0], a[1] + s * b[1])",
        "(a[0] + b[0], a[1] + b[1])",
    ),
    Mutant("forgets the second layer's padding", f"{COMPOSE}:compose", "(a[0] + s * b[0], a[1] + s * b[1])", "a"),
    Mutant(
        "swaps before and after",
        f"{COMPOSE}:compose",
        "(a[0] + s * b[0], a[1] + s * b[1])",
        "(a[1] + s * b[1], a[0] + s * b[0])",
    ),
    Mutant(
        "ignores the second layer's dilation",
        f"{PRODUCT}:Spread.of",
        "b * a // s if k > 1",
        "a // s if k > 1",
    ),
    Mutant(
        "ignores the first layer's dilation",
        f"{PRODUCT}:Spread.of",
        "[a // s if k > 1 else 1",
        "[1 if k > 1 else 1",
    ),
    Mutant(
        "spreads the taps without the stride",
        f"{PRODUCT}:Spread.of",
        "b * a // s if k > 1",
        "max(b // s, 1) if k > 1",
    ),
    Mutant("has the first layer's dilation", f"{PRODUCT}:tap_spacing", "gcd(*spacings)", "spacings[0]"),
    Mutant(
        "forgets the stride in the dilation",
        f"{PRODUCT}:tap_spacing",
        "first.stride[axis] * second.dilation[axis]",
        "second.dilation[axis]",
    ),
    Mutant("flips the kernel", f"{PRODUCT}:Spread.weight", "self._signal(second)", "self._signal(second).flip(-1)"),
    Mutant(
        "mixes the groups of a spread kernel",
        f"{PRODUCT}:Spread._turned",
        "signal.unflatten(1, (self.groups, -1)).transpose(0, 1)",
        "signal.unflatten(1, (self.groups, -1)).transpose(0, 1).flip(0)",
    ),
    Mutant(
        "transposes the taps of a pointwise chain",
        f"{PRODUCT}:PointwiseFirst.weight",
        "return product.reshape(",
        "return product.flip(-1).reshape(",
    ),
    Mutant("multiplies outer products by the wrong row", f"{PRODUCT}:_matmul", "return a * b", "return a * b.flip(0)"),
    Mutant(
        "drops the scale of a depthwise layer",
        f"{PRODUCT}:Scaled.weight",
        "* second.reshape(self.right)",
        "+ 0 * second.reshape(self.right)",
    ),
    Mutant(
        "scales the wrong axis",
        f"{PRODUCT}:Scaled.weight",
        "(first.reshape(self.left)",
        "(first.flip(0).reshape(self.left)",
    ),
    Mutant(
        "has the gradient of another group",
        f"{PRODUCT}:PointwiseLast.pull",
        "_matmul(b.mT, g).reshape(first.shape)",
        "_matmul(b.mT, g).flip(0).reshape(first.shape)",
    ),
    Mutant(
        "forgets the bias in the gradient of a weight",
        "algebra.composition:_pulled",
        "_sum(pulled[step.second], after)\n            if beside",
        "pulled[step.second]\n            if beside",
    ),
    Mutant(
        "drops the gradient of a bias in the middle",
        "algebra.composition:_pulled",
        "fallen[beside] = _sum(fallen[beside], gradient)",
        "fallen[beside] = fallen[beside]",
    ),
    Mutant("pads behind a bias", f"{COMPOSE}:padding_refusal", "if first.bias is not None:", "if False:"),
    Mutant(
        "asks for padding that is one too small",
        f"{COMPOSE}:padding_refusal",
        "found < least:",
        "found < least - 1:",
    ),
    Mutant(
        "looks at the padding after alone",
        f"{COMPOSE}:padding_refusal",
        '(("before", needed), ("after"',
        '(("after", needed), ("after"',
    ),
    Mutant(
        "rounds a scale without its shift",
        f"{COMPOSE}:compose_rounded",
        "first.bias.detach().double() * factors",
        "first.bias.detach().double()",
    ),
    Mutant(
        "forgets the weight of a scale", f"{COMPOSE}:compose_rounded", ".mul_(factor)", ".mul_(scales[: len(part)])"
    ),
    Mutant(
        "composes in the wrong order",
        "algebra.order:compose_in",
        "return compose(first, second)",
        "return compose(second, first)",
    ),
    # Parallel
    Mutant(
        "centres kernels by k // 2",
        f"{COMBINE}:_on_grid",
        "(padding[axis][0] - kernel.padding[axis][0]) // step",
        "size[axis] // 2 - count // 2",
    ),
    Mutant(
        "aligns kernels by their first taps",
        f"{COMBINE}:_on_grid",
        "(padding[axis][0] - kernel.padding[axis][0]) // step",
        "0",
    ),
    Mutant(
        "ignores the dilation of a branch",
        f"{COMBINE}:_on_grid",
        "kernel.dilation[axis] // step * torch",
        "torch",
    ),
    Mutant(
        "forgets the offsets in the gcd of the grid",
        f"{COMBINE}:_common_grid",
        "gcd(*starts, *spacings)",
        "gcd(*spacings)",
    ),
    Mutant("keeps one of two biases", f"{COMBINE}:_sum_of_biases", "return a + b", "return a"),
    Mutant(
        "adds branches of different strides",
        f"{COMBINE}:_different_outputs",
        "if a.stride != b.stride:",
        "if False:",
    ),
    Mutant(
        "adds branches of different sizes",
        f"{COMBINE}:_different_outputs",
        "if extents[0] != extents[1]:",
        "if False:",
    ),
    Mutant(
        "concatenates the other way round",
        f"{COMBINE}:concatenate",
        "for kernel in (a, b)])",
        "for kernel in (b, a)])",
    ),
    Mutant("concatenates without a bias", f"{COMBINE}:concatenate", "bias = torch.cat(held)", "bias = None"),
    Mutant("scales a weight without its bias", f"{COMBINE}:scaled", "kernel.bias * factor", "kernel.bias"),
    # Groups, padding, layers
    Mutant("lets groups see each other", f"{KERNEL}:with_groups", "torch.eye(fold,", "torch.ones(fold, fold,"),
    Mutant(
        "forgets the gcd of groups in a sum",
        f"{COMBINE}:add",
        "gcd(a.groups, b.groups)",
        "max(a.groups, b.groups)",
    ),
    Mutant(
        "forgets the gcd of groups in a series",
        f"{COMPOSE}:compose",
        "groups = gcd(first.groups, second.groups)",
        "groups = max(first.groups, second.groups)",
    ),
    Mutant(
        "pads the first axis as the last",
        f"{KERNEL}:pad_sides",
        "for i in reversed(range(0, len(amounts), 2))",
        "for i in range(0, len(amounts), 2)",
    ),
    Mutant(
        "takes any padding mode in the middle",
        f"{AFFINE}:in_series",
        "if second.border is not None:",
        "if False:",
    ),
    Mutant("forgets the padding mode", f"{AFFINE}:in_series", "Affine(whole, first.border)", "Affine(whole)"),
    Mutant(
        "sees a bias through a transposed convolution",
        f"{AFFINE}:_with_transposed",
        "if other is first and first.kernel.bias is not None:",
        "if False:",
    ),
    Mutant(
        "forgets the epsilon of batch norm",
        "regions.maps:normalizing",
        "(var + eps)",
        "var",
    ),
    # Factors
    Mutant(
        "leaves hidden biases as they were drawn",
        "algebra.factorize:_embed",
        "torch.zeros_like(kernel.bias)",
        "kernel.bias",
    ),
    Mutant(
        "shifts copies too far",
        "algebra.factorize:_shift_chain",
        "min(2, max(0, s - 2 * (layer - 2)))",
        "min(2, s)",
    ),
    Mutant(
        "forgets to make up for the gains",
        "algebra.factorize:_embed",
        "weights[solved] / made_up",
        "weights[solved]",
    ),
]

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
    how, whole = Composition.of(((0, 1), 2), chain), compose_in(((0, 1), 2), chain)
    if how is None or not isinstance(whole, Kernel):
        return
    leaves = [t.requires_grad_() for k in chain for t in (k.weight, k.bias) if t is not None]
    found, expected = how([k.weight for k in chain], [k.bias for k in chain]), compose_in(((0, 1), 2), chain)
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
