"""Which layers a rule is for, how conditions combine and read, and what rules that cannot be meant are told."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxexpand
from fxexpand import CK, CL, FC, Rule, RuleError, layer, trace
from fxexpand.filters import Filter
from fxexpand.graph.find import find_sites
from fxexpand.graph.site import Site
from fxexpand.rules import as_rules, match


class Own(nn.Conv2d):
    pass


class Net(nn.Module):
    """Layers of many kinds, and a functional call."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 7, stride=2, padding=3),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8, bias=False),
            nn.Conv2d(8, 4, (1, 3), groups=4, dilation=(1, 2)),
            Own(4, 4, 1, stride=(1, 2)),
        )
        self.sequence = nn.Conv1d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)
        self.weight = nn.Parameter(torch.randn(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.sequence(self.features(x).flatten(2)).mean(-1)
        return F.linear(self.head(y), self.weight)


def sites() -> list[Site]:
    return find_sites(trace(Net()))


def matching(where: Callable[[Site], Any]) -> str:
    """The paths of the layers for which ``where`` holds, without the common beginning."""
    return " ".join(site.path.removeprefix("features.") for site in sites() if where(site))


def width(site: Site) -> bool:
    return site.out_channels > 4


ALL = "0 2 3 4 sequence head weight"


# Filters.


@pytest.mark.parametrize(
    ("where", "paths"),
    [
        (layer(), ALL),
        (layer("features.*"), "0 2 3 4"),
        (layer(name="*e*"), ALL),
        (layer("feature?.[02]"), "0 2"),
        (layer("features"), ""),
        (layer("HEAD"), ""),
        (layer(kind=nn.Conv2d), "0 2 3 4"),
        (layer(kind=Own), "4"),
        (layer(kind=(nn.Linear, nn.Conv1d)), "sequence head"),
        (layer(kind=nn.Module), "0 2 3 4 sequence head"),
        (layer(kernel_size=3), "2 sequence"),
        (layer(kernel_size=(1, 3)), "3"),
        (layer(kernel_size=[1, 3]), "3"),  # type: ignore[arg-type]
        (layer(kernel_size=(3,)), "sequence"),
        (layer(stride=1), "2 3 sequence"),
        (layer(stride=(1, 2)), "4"),
        (layer(dilation=1), "0 2 4 sequence"),
        (layer(dilation=(1, 2)), "3"),
        (layer(groups=1), "0 4 sequence head weight"),
        (layer(groups=4), "3"),
        (layer(depthwise=True), "2"),
        (layer(depthwise=False), "0 3 4 sequence head weight"),
        (layer(in_channels=8), "2 3"),
        (layer(out_channels=2), "head weight"),
        (layer(bias=False), "2 weight"),
        (layer(bias=True), "0 3 4 sequence head"),
        (layer("features.*", kind=nn.Conv2d, in_channels=8, groups=8, bias=False, stride=1), "2"),
        (layer("features.*", in_channels=8, bias=True, groups=8), ""),
    ],
    ids=str,
)
def test_a_filter_holds_where_everything_given_does(where: Filter, paths: str) -> None:
    assert matching(where) == paths


@pytest.mark.parametrize(
    ("where", "paths"),
    [
        (layer(groups=1) & layer(kind=nn.Conv2d), "0 4"),
        (layer(groups=1) & width, "0"),
        (width & layer(groups=1), "0"),
        (layer(groups=8) | layer(kind=nn.Linear), "2 head"),
        (layer(kind=nn.Linear) | width, "0 2 head"),
        (width | layer(kind=nn.Linear), "0 2 head"),
        (~layer("features.*"), "sequence head weight"),
        (~(layer("features.*") | layer(kind=nn.Linear)), "sequence weight"),
        (~(layer("features.*") & width), "3 4 sequence head weight"),
        (~(layer() & width) & layer(kind=nn.Conv2d), "3 4"),
        (layer("features.*") & (layer(groups=8) | layer(groups=4)), "2 3"),
        (~~layer(groups=8), "2"),
        (layer() & (lambda site: site.module is None), "weight"),
        ((lambda site: site.module is None) | layer(groups=8), "2 weight"),
        (layer() & (lambda site: [] if site.dims else [site]), "head weight"),
    ],
    ids=str,
)
def test_conditions_combine_with_each_other_and_with_plain_functions(where: Filter, paths: str) -> None:
    assert isinstance(where, Filter)
    assert matching(where) == paths
    assert isinstance(where(sites()[0]), bool)


@pytest.mark.parametrize(
    ("where", "text"),
    [
        (layer(), "layer()"),
        (layer("a.*", kernel_size=3), "layer(name='a.*', kernel_size=3)"),
        (layer(kind=nn.Conv2d, depthwise=False), "layer(kind=nn.Conv2d, depthwise=False)"),
        (layer(kind=(nn.Conv2d, nn.Linear)), "layer(kind=(nn.Conv2d, nn.Linear))"),
        (layer(kind=(Own,)), "layer(kind=(Own,))"),
        (layer(stride=(1, 2)), "layer(stride=(1, 2))"),
        (layer(groups=1) & width, "layer(groups=1) & <width>"),
        (width & layer(groups=1), "<width> & layer(groups=1)"),
        (width | layer(groups=1), "(<width> | layer(groups=1))"),
        (layer(groups=1) & (layer("a") | layer("b")), "layer(groups=1) & (layer(name='a') | layer(name='b'))"),
        (~layer("a"), "~layer(name='a')"),
        (~(layer("a") & layer("b")), "~(layer(name='a') & layer(name='b'))"),
        (~(layer("a") | layer("b")), "~(layer(name='a') | layer(name='b'))"),
        (~layer("a") & layer("b"), "~layer(name='a') & layer(name='b')"),
        (layer("a") & (layer("b") & layer("c")), "layer(name='a') & layer(name='b') & layer(name='c')"),
        ((layer("a") | layer("b")) | layer("c"), "(layer(name='a') | layer(name='b') | layer(name='c'))"),
        (layer("a") & (lambda site: True), "layer(name='a') & <lambda>"),
    ],
)
def test_a_filter_reads_as_it_was_written(where: Filter, text: str) -> None:
    assert str(where) == repr(where) == text


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (Rule(CL(2)), "CL(rate=2, keep_input=False)"),
        (Rule(FC(2, depth=3), where=layer("head")), "FC(rate=2, depth=3) on head"),
        (Rule(FC(2), where=layer("a.*") | layer("b[!1-3]")), "FC(rate=2, depth=2) on a.*, b[!1-3]"),
        (Rule(FC(2), where=layer("a b") | layer("")), "FC(rate=2, depth=2) on 'a b', ''"),
        (Rule(FC(2), where=layer("a{0,1}") | layer("[")), "FC(rate=2, depth=2) on 'a{0,1}', '['"),
        (
            Rule(FC(2), where=layer("a") & ~layer(bias=True)),
            "FC(rate=2, depth=2) on layer(name='a') & ~layer(bias=True)",
        ),
        (Rule(FC(2), where=layer("a", groups=1)), "FC(rate=2, depth=2) on layer(name='a', groups=1)"),
        (Rule(FC(2), where=layer()), "FC(rate=2, depth=2) on layer()"),
        (Rule(FC(2), where=width), "FC(rate=2, depth=2) on <width>"),
        (Rule(FC(2), where=lambda site: True), "FC(rate=2, depth=2) on <lambda>"),
        (Rule(FC(2), where=partial(max)), "FC(rate=2, depth=2) on <partial>"),
        (Rule(FC(Fraction(1, 2))), "FC(rate=0.5, depth=2)"),  # type: ignore[arg-type]
        (Rule(FC(Fraction(1, 3))), "FC(rate=Fraction(1, 3), depth=2)"),  # type: ignore[arg-type]
    ],
)
def test_a_rule_prints_as_it_is_parsed(rule: Rule, text: str) -> None:
    assert str(rule) == text


# Rules.


def chosen(*rules: Any) -> dict[str, str]:
    return {
        site.path.removeprefix("features."): type(rule.strategy).__name__
        for site, rule in match(sites(), as_rules(rules))
    }


def test_a_bare_strategy_is_for_what_it_reaches() -> None:
    assert chosen(CL(2)) == dict.fromkeys(["0", "2", "3", "sequence"], "CL")
    assert chosen(CK(4)) == {"0": "CK"}
    assert chosen(FC(2)) == dict.fromkeys(["head", "weight"], "FC")


def test_a_where_may_ask_for_layers_that_the_bare_strategy_does_not_reach() -> None:
    assert chosen(Rule(CL(2), where=layer(kernel_size=1))) == {"4": "CL"}


def test_the_first_rule_that_matches_wins_and_the_sites_keep_their_order() -> None:
    everything = Rule(CL(2), where=layer(kind=(nn.Conv2d, nn.Conv1d)))
    assert chosen(CK(4), FC(2), everything) == {
        "0": "CK", "2": "CL", "3": "CL", "4": "CL", "sequence": "CL", "head": "FC", "weight": "FC",
    }  # fmt: skip
    assert chosen(everything, CK(4)) == dict.fromkeys(["0", "2", "3", "4", "sequence"], "CL")
    first, second = Rule(CL(2), where=layer(groups=8)), Rule(CL(3), where=layer(groups=8))
    assert [rule for _, rule in match(sites(), [first, second])] == [first]
    assert list(chosen(FC(2), CK(4))) == ["0", "head", "weight"]


def test_a_rule_is_only_for_layers_of_the_kind_that_its_strategy_is_about() -> None:
    assert chosen(Rule(FC(2), where=layer())) == dict.fromkeys(["head", "weight"], "FC")
    assert chosen(Rule(CK(4), where=lambda site: site.in_channels == 3)) == {"0": "CK"}


def test_a_condition_is_asked_once_about_each_layer() -> None:
    asked: list[str] = []

    def where(site: Site) -> bool:
        asked.append(site.path)
        return True

    found = sites()
    match(found, [Rule(CL(2), where=where), Rule(FC(2))])
    assert asked == [site.path for site in found if site.dims]


def test_the_layers_of_an_expansion_are_only_for_rules_with_a_where() -> None:
    big = fxexpand.expand(Net(), Rule(CL(2), where=layer("features.0")))
    assert "features.0.kernel.expand.weight" not in fxexpand.expand(big, CL(2)).state_dict()
    again = fxexpand.expand(big, Rule(CL(2), where=layer("features.0.kernel")))
    assert "features.0.kernel.expand.weight" in again.state_dict()
    done = fxexpand.expand(nn.Sequential(nn.Linear(2, 2)), FC(2))
    with pytest.raises(RuleError, match="expanded already"):
        fxexpand.expand(done, FC(2))


def test_rules_are_values() -> None:
    where = layer("a")
    assert Rule(CL(2), where=where) == Rule(CL(2), where=where)
    assert hash(Rule(CL(2))) == hash(Rule(CL(2)))
    assert Rule(CL(2)) != Rule(CL(3))
    assert Rule(CL(2), where=layer("a")) == Rule(CL(2), where=layer("a")) != Rule(CL(2), where=layer("b"))
    assert layer("a") & width == layer("a") & width != layer("a") & (lambda site: site.out_channels > 4)
    assert hash(layer(kernel_size=[1, 3]) | ~layer()) == hash(layer(kernel_size=(1, 3)) | ~layer())  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        Rule(CL(2)).where = where  # type: ignore[misc]


@pytest.mark.parametrize(
    ("rules", "count"), [(CL(2), 1), (Rule(CL(2)), 1), ([CL(2), Rule(FC(2))], 2), ((CL(2),), 1), (iter([CL(2)]), 1)]
)
def test_rules_may_be_one_or_several(rules: Any, count: int) -> None:
    found = as_rules(rules)
    assert len(found) == count
    assert all(isinstance(rule, Rule) for rule in found)


# What cannot be meant. Each message says where, what was expected, what was found and what to do.


def told(*parts: str) -> Any:
    return pytest.raises(RuleError, match="".join(f"(?=.*{part})" for part in parts))


@pytest.mark.parametrize(
    ("rules", "parts"),
    [
        ([], ("rules: expected at least one", "found none", r"Use CL\(rate=4\)")),
        (None, ("rules: expected a Rule or a strategy", "found None")),
        (3, ("expected a Rule or a strategy", "found 3")),
        ("CL(4)", ("expected a Rule or a strategy", r"found 'CL\(4\)'", r"Use parse_rules\('CL\(4\)'\)")),
        ([CL(2), "FC"], ("expected a Rule or a strategy", "found 'FC'", r"Use parse_rules\('FC'\)")),
        (CL, ("expected a Rule or a strategy", "found <class", r"Use CL\(rate=4\)")),
        ([CL(2), FC], (r"Use FC\(rate=4\)",)),
    ],
)
def test_what_is_no_rule_is_told_what_is(rules: Any, parts: tuple[str, ...]) -> None:
    with told(*parts):
        fxexpand.expand(Net(), rules)


@pytest.mark.parametrize("strategy", [CL, "CL", None, Rule(CL(2))])
def test_a_rule_needs_a_strategy(strategy: Any) -> None:
    with told("Rule: expected a strategy, such as", "found"):
        Rule(strategy)


@pytest.mark.parametrize("where", ["features.*", 3, {"name": "a"}])
def test_a_condition_is_a_filter_or_a_function(where: Any) -> None:
    with told("Rule: where must be layer", "found"):
        Rule(CL(2), where=where)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"kind": nn.Linear(2, 2)}, (r"layer\(kind", "expected a module class, such as nn.Conv2d", "found Linear")),
        ({"kind": "Conv2d"}, (r"layer\(kind", "'Conv2d'")),
        ({"kind": (nn.Conv2d, "Linear")}, (r"layer\(kind",)),
        ({"name": nn.Conv2d}, (r"layer\(name", "expected a glob", "found <class")),
        ({"kernel_size": "3"}, (r"layer\(kernel_size", "an integer, or one for each axis", "found '3'")),
        ({"kernel_size": 3.0}, (r"layer\(kernel_size", "found 3.0")),
        ({"stride": (1, "2")}, (r"layer\(stride", "found")),
        ({"dilation": True}, (r"layer\(dilation", "found True")),
        ({"groups": 1.5}, (r"layer\(groups", "expected an integer", "found 1.5")),
        ({"in_channels": (3,)}, (r"layer\(in_channels", "expected an integer")),
        ({"out_channels": "64"}, (r"layer\(out_channels", "expected an integer")),
        ({"depthwise": 1}, (r"layer\(depthwise", "expected True or False", "found 1")),
        ({"bias": "no"}, (r"layer\(bias", "expected True or False")),
    ],
)
def test_an_argument_that_no_layer_could_have_is_an_error(given: dict[str, Any], parts: tuple[str, ...]) -> None:
    with told(*parts):
        layer(**given)


def test_a_misspelt_argument_is_an_error() -> None:
    with pytest.raises(TypeError, match="kernel"):
        layer(kernel=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "combine",
    [
        lambda a, b: a and b,
        lambda a, b: a or b,
        lambda a, b: not a,
        lambda a, b: b if a else a,
    ],
)
def test_filters_do_not_combine_by_words(combine: Callable[[Filter, Filter], Any]) -> None:
    with told(r"layer\(groups=1\)", r"Combine filters with &, \| and ~"):
        combine(layer(groups=1), layer("a"))


def test_filters_combine_with_functions_only() -> None:
    combinations: list[Callable[[Any], Any]] = [lambda f: f & 3, lambda f: 3 & f, lambda f: f | "a", lambda f: "a" | f]
    for combine in combinations:
        with pytest.raises(TypeError, match="unsupported operand"):
            combine(layer())


def test_a_rule_with_a_where_that_matches_nothing_is_an_error_that_shows_the_layers() -> None:
    rule = r"CL\(rate=2, keep_input=False\) on nothing matches no layer"
    with told(rule, r"features\.0 \(Conv2d 7×7, 3 -> 8\)", "and 3 more", r"Choose others with Rule\(strategy, where="):
        fxexpand.expand(Net(), [FC(2), Rule(CL(2), where=layer("nothing"))])


def test_a_path_that_is_nearly_right_is_suggested() -> None:
    with told(r"Did you mean 'features\.0'\?"):
        fxexpand.expand(Net(), Rule(CL(2), where=layer("feature.0")))


def test_a_condition_that_holds_for_layers_of_another_kind_is_told_so() -> None:
    with told(r"Its where holds for head \(Linear, 4 -> 2\), but CL takes convolutions"):
        fxexpand.expand(Net(), Rule(CL(2), where=layer("head")))
    with told(r"Its where holds for sequence \(Conv1d 3, 4 -> 4\), but FC takes linear layers"):
        fxexpand.expand(Net(), Rule(FC(2), where=layer("sequence")))


def test_bare_strategies_that_match_nothing_at_all_are_an_error() -> None:
    with told(r"no rule matches any layer: CK\(rate=4.*\); FC\(rate=2", r"0 \(Conv2d 3×3, 2 -> 2\)"):
        fxexpand.expand(nn.Sequential(nn.Conv2d(2, 2, 3)), [CK(4), FC(2)])
    with told("no rule matches any layer", "The model has no convolution or linear layer"):
        fxexpand.expand(nn.Sequential(nn.ReLU()), CL(2))


def test_a_bare_strategy_beside_others_may_match_nothing() -> None:
    big = fxexpand.expand(nn.Sequential(nn.Linear(2, 2)), [CK(4), CL(2), FC(2)])
    assert "0.linear_0.weight" in big.state_dict()


def test_rules_that_share_a_condition_answer_for_it_together() -> None:
    """As in "CK(4)+FC(2) on classifier.*": whichever of them takes what is there."""
    where = layer("head") | layer("sequence")
    assert chosen(Rule(CK(4), where=layer("head")), Rule(FC(2), where=layer("head"))) == {"head": "FC"}
    assert chosen(Rule(FC(2), where=where), Rule(CL(2), where=where)) == {"sequence": "CL", "head": "FC"}
    with told(r"CL\(rate=2, keep_input=False\) on head matches no layer"):
        chosen(Rule(CL(2), where=layer("head")), Rule(CK(2), where=layer("head")), FC(2))
    with told("on <lambda> matches no layer"):
        chosen(Rule(CL(2), where=lambda site: not site.dims), Rule(FC(2), where=lambda site: not site.dims))


def test_an_error_of_a_condition_is_its_own() -> None:
    with pytest.raises(ZeroDivisionError):
        fxexpand.expand(Net(), Rule(CL(2), where=lambda site: site.in_channels / 0 > 1))
