"""What rules written as text mean, and errors that point at the character. What is printed is read back the same."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

import fxexpand
from fxexpand import CK, CL, FC, Rule, RuleError, layer, parse_rules
from fxexpand.algebra.kernel import Kernel
from fxexpand.filters import Filter
from fxexpand.graph.site import Site
from fxexpand.strategies import ACNet, DiverseBranch, LowRank, RepVGG, Strategy, Then


class Own(nn.Conv2d):
    pass


@dataclass(frozen=True)
class Pair(Strategy):
    """A strategy of the user's that holds two others, and other values."""

    first: Strategy
    second: Strategy
    sizes: tuple[int, ...] = (1, 2)
    mode: str | None = None

    def layers(self, site: Site) -> Mapping[str, nn.Module]:
        raise NotImplementedError

    def factorize(self, target: Kernel, fresh: Sequence[Kernel]) -> Sequence[Kernel]:
        raise NotImplementedError


@dataclass(frozen=True)
class First(CL):
    """A strategy that combines with others; ``rate`` has a default."""

    rate: float = 2

    def then(self, second: Strategy, *, mode: str | None = None) -> Pair:
        if mode == "bad":
            raise ValueError("mode must not be bad")
        return Pair(self, second, mode=mode)


class Mine(FC):
    """A strategy of the user's."""


@dataclass(frozen=True)
class Half(Strategy):
    """Not all of a strategy is there."""


OWN = (Pair, First, Mine, Own)


# What it means.


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("CL(4)", [Rule(CL(4))]),
        ("CL(4)+FC(2)", [Rule(CL(4)), Rule(FC(2))]),
        ("CL(rate=4); FC(0.5, depth=3);", [Rule(CL(4)), Rule(FC(0.5, depth=3))]),
        ("CK( rate = 4 ,\n  keep_input = True , )", [Rule(CK(4, keep_input=True))]),
        ("CL(4) on features.*", [Rule(CL(4), layer("features.*"))]),
        ("CL(rate\u00a0\r\n= 4)", [Rule(CL(4))]),
        ("CL(4)on 'features.*'", [Rule(CL(4), layer("features.*"))]),
        (
            "CK(4)+FC(2) on classifier.*; CL(4) on features.*",
            [Rule(CK(4), layer("classifier.*")), Rule(FC(2), layer("classifier.*")), Rule(CL(4), layer("features.*"))],
        ),
        (
            "CL(2) on a, b.?,c[!0-9], étage",
            [Rule(CL(2), layer("a") | layer("b.?") | layer("c[!0-9]") | layer("étage"))],
        ),
        ("CL(2) on layer1.*, on, layer", [Rule(CL(2), layer("layer1.*") | layer("on") | layer("layer"))]),
        (r"CL(2) on 'a b', ''", [Rule(CL(2), layer("a b") | layer(""))]),
        (r"CL(2) on 'a\'\\\u00e9', " + r'"b\'"', [Rule(CL(2), layer("a'\\é") | layer("b'"))]),
        ("CL(2) on layer(name='a', kernel_size=3)", [Rule(CL(2), layer("a", kernel_size=3))]),
        ("CL(2) on layer('a', stride=(1, 2), bias=False)", [Rule(CL(2), layer("a", stride=(1, 2), bias=False))]),
        ("CL(2) on layer(stride=[1, 2], dilation=(3,))", [Rule(CL(2), layer(stride=(1, 2), dilation=(3,)))]),
        ("CL(2) on layer(kind=nn.Conv2d)", [Rule(CL(2), layer(kind=nn.Conv2d))]),
        ("CL(2) on layer(kind=(nn . Conv2d, Own))", [Rule(CL(2), layer(kind=(nn.Conv2d, Own)))]),
        ("CL(2) on layer(kind=(Own))", [Rule(CL(2), layer(kind=Own))]),
        ("CL(2) on layer(name=None)", [Rule(CL(2), layer())]),
        ("CL(2) on ~a", [Rule(CL(2), ~layer("a"))]),
        ("CL(2) on a & ~b | c, d", [Rule(CL(2), (layer("a") & ~layer("b")) | layer("c") | layer("d"))]),
        ("CL(2) on a & (b, c)", [Rule(CL(2), layer("a") & (layer("b") | layer("c")))]),
        ("CL(2) on ~(layer(groups=1) & a)", [Rule(CL(2), ~(layer(groups=1) & layer("a")))]),
        ("First", [Rule(First())]),
        ("First+FC(2) on *", [Rule(First(), layer("*")), Rule(FC(2), layer("*"))]),
        ("First(rate=1e-1)", [Rule(First(0.1))]),
        ("CL(4).then(ACNet())", [Rule(CL(4).then(ACNet()))]),
        ("CL(4).then(ACNet).then(FC(2))", [Rule(CL(4).then(ACNet()).then(FC(2)))]),
        ("CL(4).then(ACNet.then(FC(2))) on a", [Rule(CL(4).then(ACNet().then(FC(2))), layer("a"))]),
        ("RepVGG(batch_norm=True)", [Rule(RepVGG(batch_norm=True))]),
        ("First(3).then(FC(2))", [Rule(Pair(First(3), FC(2)))]),
        ("First . then( CL(2), mode='x' ) on a", [Rule(Pair(First(), CL(2), mode="x"), layer("a"))]),
        ("Pair(First, First(2).then(FC(2)), sizes=())", [Rule(Pair(First(), Pair(First(2), FC(2)), sizes=()))]),
    ],
)
def test_a_text_means_the_rules_that_python_would_write(text: str, rules: list[Rule]) -> None:
    found = parse_rules(text, classes=OWN)
    assert found == rules
    assert all(isinstance(rule.strategy, Strategy) for rule in found)


def test_a_strategy_of_the_users_goes_before_the_librarys_of_its_name() -> None:
    own = type("CL", (First,), {})
    (rule,) = parse_rules("CL(3)", classes=[own])
    assert type(rule.strategy) is own


def test_the_notation_of_the_paper_expands_a_network() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))
            self.classifier = nn.Sequential(nn.ReLU(), nn.Linear(4, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.classifier(self.features(x).mean((-2, -1)))
            return y

    net = Net().double()
    big = fxexpand.expand(net, parse_rules("CK(4)+FC(2) on classifier.*; CL(4) on features.*"))
    layers = [path for path, module in big.named_modules() if not any(module.children()) and "_" not in path]
    assert [path for path in layers if path.startswith("features")] == [
        "features.0.expand", "features.0.kernel", "features.0.reduce", "features.1",
        "features.2.expand", "features.2.kernel", "features.2.reduce",
    ]  # fmt: skip
    assert "classifier.1.linear_1.weight" in big.state_dict()
    fxexpand.verify(net, big, torch.randn(2, 3, 5, 5).double())


# What it cannot mean. The sign ▸ stands before the place that the caret points at.


def raises(marked: str, *parts: str, **options: Any) -> None:
    text, at = marked.replace("▸", ""), marked.index("▸")
    start = text.rfind("\n", 0, at) + 1
    with pytest.raises(RuleError) as caught:
        parse_rules(text, **options)
    message, shown, caret = str(caught.value).rsplit("\n", 2)
    assert shown == "    " + text[start:].split("\n")[0]
    # In the same column, however wide a tab is.
    assert caret == re.sub(r"[^\t]", " ", shown[: len("    ") + at - start]).ljust(len("    ") + at - start) + "^"
    assert f"column {at - start + 1}: " in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("▸", ("expected a strategy, found the end", "Write 'CL(4) on features.*'")),
        ("  ▸;", ("expected a strategy, found ';'",)),
        ("CL(4);▸;", ("expected a strategy, found ';'",)),
        ("CL(4)+▸", ("expected a strategy, found the end",)),
        ("FC(2); ▸CLL(4) on a", ("expected a strategy, found 'CLL'", "Did you mean 'CL'?", "Known are ACNet, CK")),
        ("▸cl(4)", ("Did you mean 'CL'?",)),
        ("▸4", ("expected a strategy, found '4'",)),
        ("▸Rule(CL(4))", ("expected a strategy, found 'Rule'", "classes=[...]")),
        ("▸CK", ("CK needs rate", "Write CK(rate=4)")),
        ("FC(2)+▸CK on a", ("CK needs rate",)),
        ("▸FC(depth=3)", ("FC needs rate",)),
        ("CL(4)▸, FC(2)", ("expected ';' or the end, found ','", "joined by '+'", "after ';'")),
        ("CL(4) ▸FC(2)", ("expected ';' or the end, found 'FC'", "Write 'on' before a glob, '+' or ';'")),
        ("CL(4) ▸features.*", ("found 'features'", "Write 'on' before a glob")),
        ("CL(4) ▸onto a", ("found 'onto'",)),
        ("CL(4) on a ▸FC(2)", ("expected ';' or the end, found 'FC'",)),
        ("CL(4) on a▸)", ("found ')'", "No parenthesis is open")),
        ("CL(4) on a ▸+ FC(2)", ("found '+'", "before it; other rules come after ';'")),
        ("CL(4)▸.5", ("expected .then(strategy)",)),
        ("CL(4)▸.features", ("expected .then(strategy)", "A glob stands after 'on'")),
        ("CL(4)▸.later(FC(2))", ("expected .then(strategy), found '.later'",)),
        # Arguments.
        ("CL▸(4", ("expected ')', found the end", "never closed")),
        ("CL▸(", ("expected ')', found the end",)),
        ("CL(rate=▸)", ("expected a value, found ')'",)),
        ("CL(▸,4)", ("expected a value, found ','",)),
        ("CL(4 ▸5)", ("expected ',' or ')', found '5'",)),
        ("CL(4, True, ▸3)", ("expected at most 2 without a name", "CL takes rate, keep_input")),
        ("CL(▸rat=4)", ("CL has no argument 'rat'", "Did you mean 'rate'?", "takes rate, keep_input")),
        ("CL(rate=4, ▸depth=2)", ("CL has no argument 'depth'",)),
        ("CL(rate=4, ▸rate=5)", ("expected each argument once, found rate again",)),
        ("CL(4, rate=▸5)", ("expected each argument once, found rate a second time",)),
        ("CL(rate=4, ▸True)", ("expected name=value",)),
        ("CL(▸0)", ("rate must be a positive number, found 0",)),
        ("CL(rate= ▸'x')", ("rate must be a positive number, found 'x'",)),
        ("CL(▸1e999)", ("rate must be a positive number, found inf",)),
        ("CL(▸[4])", ("rate must be a positive number, found [4]",)),
        ("CL([4, 5 ▸6])", ("expected ',' or ']', found '6'",)),
        ("CL(▸(4", ("expected ')', found the end",)),
        ("FC(4, depth=▸1)", ("depth must be an integer of at least 2, found 1",)),
        ("CL(▸1__0)", ("expected a number, found '1__0'",)),
        ("CL(▸4x)", ("expected a value, found '4x'",)),
        ("CL(▸4.5.6)", ("expected a value",)),
        ("CL(▸true)", ("expected a value, found 'true'", "Did you mean 'True'?")),
        ("CL(▸__import__('os'))", ("expected a value, found '__import__'",)),
        ("CL(▸CL(4))", ("rate must be a positive number, found CL(rate=4",)),
        # Which layers.
        ("CL(4) on▸", ("expected a glob, such as features.*, or layer(...), found the end",)),
        ("CL(4) on ▸;", ("expected a glob", "found ';'")),
        ("CL(4) on a,▸", ("expected a glob", "found the end")),
        ("CL(4) on a & ▸& b", ("expected a glob", "found '&'")),
        ("CL(4) on ▸(a, b", ("expected ')', found the end",)),
        ("CL(4) on (a ▸b)", ("expected ')', found 'b'",)),
        ("CL(4) on a.▸{0,1}", ("expected a glob of *, ?, [abc] and [!abc], found '{'", "commas", "quotes")),
        ("CL(4) on ▸^a", ("found '^'",)),
        ("CL(4) on a▸\\.0", ("found '\\\\'",)),
        ("CL(4) on a.▸[0", ("found '['",)),
        ("CL(4) on a.0▸]", ("found ']'",)),
        ("CL(4) on a▸+FC(2)", ("found '+'", "rules by ';'")),
        ("CL(4) on name▸=a", ("found '='",)),
        ("CL(4) on ▸<lambda>", ("found a function as a rule prints it", "Rule(strategy, where=function)")),
        ("CL(4) on layer(groups=1) & ▸<width>", ("found a function",)),
        ("CL(4) on ▸'a", ("this quote is never closed",)),
        ("CL(4) on ▸'a\n'", ("this quote is never closed",)),
        ("CL(4) on 'a▸\\.b'", ("expected an escape of Python's, found \\.",)),
        ("CL(4) on ▸'\\xZZ'", ("an escape that is no character",)),
        ("CL(4) on layer(▸kernal_size=3)", ("layer has no argument 'kernal_size'", "Did you mean 'kernel_size'?")),
        ("CL(4) on layer('a', ▸3)", ("expected at most 1 without a name", "layer takes name, kind")),
        ("CL(4) on layer(name=▸a.*)", ("expected a value, found 'a'", "globs stand in quotes")),
        ("CL(4) on layer(groups=▸1.5)", ("layer(groups=...): expected an integer, found 1.5",)),
        ("CL(4) on layer('a', kernel_size=▸'3')", ("layer(kernel_size=...)",)),
        ("CL(4) on layer(kind=▸Conv2d)", ("Did you mean nn.Conv2d?",)),
        ("CL(4) on layer(kind=nn.▸Conv2D)", ("expected a class of torch.nn, found 'Conv2D'", "Did you mean 'Conv2d'?")),
        ("CL(4) on layer(kind=nn.▸functional)", ("expected a class of torch.nn",)),
        ("CL(4) on layer(kind=▸'Conv2d')", ("layer(kind=...): expected a module class",)),
        ("CL(4)+▸CK(4) on a", ("found CK", "a clause of its own")),
        ("FC(4)+CL(4)+▸FC(2) on a", ("found FC",)),
        ("CL(4) on " + "~" * 49 + "▸~~a", ("expected at most 50 levels",)),
        # Where.
        ("CL(4) on a;\n FC(2) on b;\n\tCL(4) ▸onn c", ("rules, line 3, column 8",)),
        ("\n\nCL(4) on a▸)\n", ("line 3",)),
    ],
)  # fmt: skip
def test_an_error_points_at_the_character(text: str, parts: tuple[str, ...]) -> None:
    raises(text, *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("▸Half", ("abstract",)),
        ("First.then(FC(2), mode=▸'bad')", ("mode must not be bad",)),
        ("First▸.then()", ("then needs second",)),
        ("First▸.then", ("then needs second",)),
        ("CL(2).then(second=▸FC)", ("FC needs rate",)),
        ("First(1).then▸(FC(2)", ("expected ')', found the end",)),
        ("First(1).then(▸fc(2))", ("Did you mean 'FC'?",)),
        ("CL(2).then(▸3)", ("then: expected a strategy",)),
    ],
)
def test_an_error_of_a_strategy_of_the_users_points_at_the_character(text: str, parts: tuple[str, ...]) -> None:
    raises(text, *parts, classes=(*OWN, Half))


@pytest.mark.parametrize("text", [None, 4, b"CL(4)", CL(4), ["CL(4)"]])
def test_rules_are_text(text: Any) -> None:
    with pytest.raises(RuleError, match=r"parse_rules: expected text, such as 'CL.*, found"):
        parse_rules(text)


@pytest.mark.parametrize("classes", [[3], ["CL"], [int], [CL(2)]])
def test_classes_are_strategies_or_modules(classes: Any) -> None:
    with pytest.raises(RuleError, match="classes must be strategies or kinds of layer, found"):
        parse_rules("CL(4)", classes=classes)


@pytest.mark.parametrize(
    ("text", "what"), [("CL(4); " * 40 + "CX(4)" + "; CL(4)" * 40, "'CX'"), (f"CL({'9' * 5000})", "a number")]
)
def test_of_a_long_line_an_error_shows_the_part_around_the_character(text: str, what: str) -> None:
    with pytest.raises(RuleError, match=what) as caught:
        parse_rules(text)
    _, shown, caret = str(caught.value).rsplit("\n", 2)
    assert shown.strip() in text
    assert len(shown) <= 124
    assert shown[len(caret) - 1 :].startswith(("CX(4)", "999"))


# What is printed is read back the same.

NAMES = st.one_of(
    st.sampled_from(("features.*", "0", "layer1.[0-2].conv?", "[!a]*", "on", "layer", "classifier", "*", "", "a b")),
    st.text(st.characters(codec="utf-8"), max_size=6),
    st.text("ab.*?[]!-{}<>\\^$+=`'\"(),;&|~ \t\n", max_size=8),
)
SIZES = st.integers(1, 9) | st.tuples(st.integers(1, 9), st.integers(1, 9)) | st.tuples(st.integers(1, 9))
KINDS: list[type[nn.Module]] = [nn.Conv1d, nn.Conv2d, nn.Linear, Own]
RATES = st.integers(1, 99) | st.floats(1e-9, 1e9, allow_nan=False)


def given_or_not(**values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=values)


LAYERS = given_or_not(
    name=NAMES,
    kind=st.sampled_from(KINDS) | st.lists(st.sampled_from(KINDS), min_size=1, max_size=3).map(tuple),
    kernel_size=SIZES,
    stride=SIZES,
    dilation=SIZES,
    groups=st.integers(1, 9),
    depthwise=st.booleans(),
    in_channels=st.integers(0, 999),
    out_channels=st.integers(0, 999),
    bias=st.booleans(),
).map(lambda given: layer(**given))
GLOBS = st.lists(NAMES, min_size=1, max_size=3).map(lambda names: any_of([layer(name) for name in names]))


def any_of(filters: list[Filter]) -> Filter:
    first, *others = filters
    for other in others:
        first |= other
    return first


FILTERS = GLOBS | st.recursive(
    LAYERS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] & pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1]),
        inner.map(lambda one: ~one),
    ),
    max_leaves=6,
)
STRATEGIES = st.recursive(
    st.one_of(
        st.builds(CL, RATES, keep_input=st.booleans()),
        st.builds(CK, RATES, keep_input=st.booleans()),
        st.builds(FC, RATES, depth=st.integers(2, 9)),
        st.builds(Mine, RATES),
        st.builds(DiverseBranch, batch_norm=st.booleans()),
        st.builds(RepVGG, identity=st.none() | st.booleans()),
        st.builds(LowRank, st.integers(1, 9)),
    ),
    lambda inner: st.one_of(
        st.builds(
            Pair, inner, inner, sizes=st.lists(st.integers(-9, 9), max_size=3).map(tuple), mode=st.none() | NAMES
        ),
        st.builds(Then, inner, inner),
    ),
    max_leaves=4,
)


@given(st.lists(st.builds(Rule, STRATEGIES, st.none() | FILTERS), min_size=1, max_size=4))
def test_rules_print_as_they_parse(rules: list[Rule]) -> None:
    text = "; ".join(map(str, rules))
    assert parse_rules(text, classes=OWN) == rules
    assert [str(rule) for rule in parse_rules(text, classes=OWN)] == list(map(str, rules))


@given(st.text() | st.text("CLFK()4,.+;on *[]{}'\"~&|=layer \n<>\\", max_size=30))
def test_any_other_text_is_a_rule_error_and_nothing_else(text: str) -> None:
    failure: RuleError | None = None
    rules: list[Rule] = []
    try:
        rules = parse_rules(text)
    except RuleError as error:
        failure = error
    if failure is None:
        assert parse_rules("; ".join(map(str, rules))) == rules
    else:
        assert re.search(r"column \d+: .+\n.*\n\s*\^$", str(failure), re.DOTALL)


@pytest.mark.parametrize("where", [lambda site: True, layer("a") & (lambda site: True), ~(layer() | max)])
def test_a_rule_that_asks_a_function_prints_it_and_is_not_read_back(where: Any) -> None:
    with pytest.raises(RuleError, match="found a function as a rule prints it"):
        parse_rules(str(Rule(CL(2), where)))
