"""A manifest is JSON, rebuilds what it lists in any process, and says where it does not fit."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, fx, nn

import fxexpand
import resuming
from fxexpand import CK, CL, FC, ExpansionError, Rule, RuleError, expand, layer, manifest, parse_rules
from fxexpand.algebra.kernel import Kernel
from fxexpand.graph.expanded import Expanded
from fxexpand.graph.site import Site
from fxexpand.strategies import ACNet, DiverseBranch, Orepa, RepVGG, Strategy
from fxexpand.testing import Case, Functional, Residual, UserConv, networks
from fxexpand.version import library_version


@dataclass(frozen=True)
class Inner(CL):
    """CL, as a class of the user's."""


@dataclass(frozen=True)
class Around(Strategy):
    """A strategy that holds another one."""

    inner: Strategy
    names: tuple[str, ...] = ()

    def layers(self, site: Site) -> Any:
        return self.inner.layers(site)

    def factorize(self, target: Kernel, fresh: Sequence[Kernel]) -> Any:
        return self.inner.factorize(target, fresh)


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 5, padding=(2, 1)), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2, bias=False, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(48, 5),
    )  # fmt: skip


def nested() -> nn.Module:
    """``net()``, expanded, with expansions inside of one."""
    big = expand(net(), [CL(2), FC(2, depth=3)])
    return expand(expand(big, Rule(CL(1), layer("0.kernel"))), Rule(FC(1), layer("5.linear_2")))


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def structure(model: nn.Module) -> Any:
    """The module tree, and the tensors, but for their values."""
    state = [(name, t.shape, t.dtype, t.stride()) for name, t in model.state_dict(keep_vars=True).items()]
    parameters = [(name, p.requires_grad) for name, p in model.named_parameters()]
    modules = [(path, type(m).__name__ if path else "", m.training) for path, m in model.named_modules()]
    return modules, state, parameters


def assert_rebuilt(found: nn.Module, expected: nn.Module) -> None:
    assert structure(found) == structure(expected)
    assert manifest(found) == manifest(expected)
    found.load_state_dict(expected.state_dict(), strict=True)


# What it says.


def test_it_lists_the_layers_that_were_there_and_what_became_of_them() -> None:
    found = through_json(manifest(nested()))
    assert found == manifest(nested())
    cl, fc = "CL(rate=2, keep_input=False)", "FC(rate=2, depth=3)"
    inner, last = "CL(rate=1, keep_input=False)", "FC(rate=1, depth=2)"
    assert {**found, "sites": ...} == {
        "format": 1,
        "fxexpand": library_version(),
        "rules": [f"{cl} on 0, 2; {fc} on 5", f"{inner} on 0.kernel; {last} on 5.linear_2"],
        "classes": {},
        "sites": ...,
    }
    sites = {site.pop("path"): site for site in found["sites"]}
    assert [(path, site["strategy"]) for path, site in sites.items()] == [
        ("0", cl), ("0.kernel", inner), ("2", cl), ("5", fc), ("5.linear_2", last),
    ]  # fmt: skip
    assert sites["2"] == {
        "layer": "Conv2d", "in_channels": 4, "out_channels": 4, "bias": False, "kernel_size": [3, 3], "stride": [2, 2],
        "padding": [[0, 0], [0, 0]], "dilation": [1, 1], "groups": 2, "padding_mode": "zeros", "strategy": cl,
    }  # fmt: skip
    assert sites["5"] == {"layer": "Linear", "in_channels": 48, "out_channels": 5, "bias": True, "strategy": fc}
    assert sites["0"]["padding"] == [[2, 2], [1, 1]]


def test_its_rules_one_after_another_make_the_same() -> None:
    big = nested()
    again: nn.Module = net()
    for text in manifest(big)["rules"]:
        again = expand(again, parse_rules(text))
    assert_rebuilt(again, big)


def test_the_model_is_untouched() -> None:
    big = nested()
    before = structure(big)
    found = manifest(big)
    model = net()
    plain = structure(model)
    expand(model, found)
    assert (structure(big), structure(model)) == (before, plain)


# What it rebuilds.


class Odd(nn.Module):
    """Layers under names that globs could misread, functional calls in another order than their parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a[0] *": nn.Linear(4, 4), "b, c": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        self.last = nn.Parameter(torch.randn(4, 4))
        self.first = nn.Parameter(torch.randn(4, 4))
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts.values():
            x = torch.relu(part(x))
        return F.linear(torch.relu(F.linear(x, self.first)), self.last, self.shift)


class Tied(nn.Module):
    """One weight in two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(F.linear(x, self.weight)), self.weight)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module]]] = {
    "several": (net, lambda m: expand(m, [CL(2), FC(2)])),
    "nested": (net, lambda m: nested()),
    "a layer by itself": (lambda: nn.Linear(4, 4), lambda m: expand(m, FC(2))),
    "nested in a layer by itself": (
        lambda: nn.Linear(4, 4),
        lambda m: expand(expand(m, FC(2)), Rule(FC(1), layer("linear_1"))),
    ),
    "keep_input": (net, lambda m: expand(m, [CL(2, keep_input=True), Rule(FC(2), layer("5"))])),
    "eval": (lambda: net().eval(), lambda m: expand(m, CL(2))),
    "half": (lambda: net().bfloat16(), lambda m: expand(m, CL(2))),
    "channels_last": (lambda: net().to(memory_format=torch.channels_last), lambda m: expand(m, CL(2))),
    "frozen": (lambda: net().requires_grad_(False), lambda m: expand(m, FC(2))),
    "padding of its own": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 4, padding="same", padding_mode="reflect")),
        lambda m: expand(expand(m, CL(2)), Rule(CL(1), layer("0.kernel"))),
    ),
    "a class of the user's": (lambda: nn.Sequential(UserConv(4, 4, 3, bias=False)), lambda m: expand(m, CL(2))),
    "strategies of the user's": (net, lambda m: expand(m, [Around(Around(Inner(2)), ("a'", "b")), Inner(3), FC(2)])),
    "branches": (net, lambda m: expand(m, [ACNet(), FC(2)])),
    "branches with batch norm": (net, lambda m: expand(m, Rule(RepVGG(batch_norm=True, identity=False), layer("0")))),
    "branches of branches": (net, lambda m: expand(m, DiverseBranch().then(ACNet()))),
    "learnt scales": (net, lambda m: expand(m, Orepa())),
    "one after another": (net, lambda m: expand(m, [CL(4).then(ACNet()).then(CL(1)), FC(2).then(FC(1))])),
    "one after another, keep_input": (
        net,
        lambda m: expand(m, CK(4).then(CL(2, keep_input=True))),
    ),
    "branches, then keep_input": (net, lambda m: expand(m, ACNet().then(CL(2, keep_input=True)))),
    "padding, then branches": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 4, padding="same", padding_mode="reflect")),
        lambda m: expand(m, ACNet().then(CL(2, keep_input=True))),
    ),
    "under two names": (lambda: Residual(nn.Conv2d(4, 4, 3, padding=1), times=2), lambda m: expand(m, CL(2))),
    "odd names": (Odd, lambda m: expand(m, FC(2))),
    "calls, expanded one by one": (
        Odd,
        lambda m: expand(expand(expand(m, Rule(FC(2), layer("last"))), Rule(FC(3), layer("first"))), FC(1)),
    ),
    "calls, the other way round": (Odd, lambda m: expand(expand(m, Rule(FC(2), layer("first"))), FC(3))),
    "nested in a call": (
        lambda: Functional(4),
        lambda m: expand(expand(m, CL(2)), Rule(CL(1), layer("weight.kernel"))),
    ),
    "a weight in two calls": (Tied, lambda m: expand(m, FC(2))),
    "a graph": (lambda: fx.symbolic_trace(net()), lambda m: expand(m, CL(2))),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_rebuilds(name: str) -> None:
    plain, grow = MODELS[name]
    torch.manual_seed(3)
    big = grow(plain())
    for inplace in (False, True):
        assert_rebuilt(expand(plain(), through_json(manifest(big)), inplace=inplace), big)
    by_rules = plain()
    for text in manifest(big)["rules"]:
        by_rules = expand(by_rules, parse_rules(text, classes=[Inner, Around]))
    # Calls that were expanded one by one have their layers in that order.
    assert sorted(by_rules.state_dict()) == sorted(big.state_dict())
    assert manifest(by_rules)["rules"][-1:] == manifest(big)["rules"][-1:] or name.startswith("calls")


@given(
    networks(),
    st.sampled_from([CL(2), CK(4), CL(1.5, keep_input=True), ACNet().then(CL(2, keep_input=True))]),
    st.booleans(),
)
def test_it_rebuilds_any_network(case: Case, strategy: Strategy, twice: bool) -> None:
    model = case.module
    big = expand(model, [strategy, FC(2)], init="standard")
    if twice:
        big = expand(big, Rule(FC(1), layer("*linear_0")), init="standard")
    found = through_json(manifest(big))
    for rebuilt in (expand(model, found, init="standard"), expand(copy.deepcopy(model), found, init="standard")):
        assert_rebuilt(rebuilt, big)
    by_rules = model
    for text in found["rules"]:
        by_rules = expand(by_rules, parse_rules(text), init="standard")
    assert_rebuilt(by_rules, big)


def test_a_collapsed_model_has_the_manifest_of_the_expanded_one() -> None:
    big = nested()
    fast = fxexpand.collapse(big)
    assert manifest(fast) == manifest(big) == manifest(fxexpand.uncollapse(fast)) == manifest(copy.deepcopy(fast))


def test_init_is_as_with_rules() -> None:
    model, images = net().double(), torch.randn(2, 3, 9, 9).double()
    found = manifest(expand(model, [CL(2), FC(2)]))
    fxexpand.verify(model, expand(model, found), images)
    seen: list[str] = []
    expand(model, found, init=lambda site, layers: seen.append(site.path))
    assert seen == ["0", "2", "5"]
    narrow = manifest(expand(model, CL(0.25), init="standard"))
    assert_rebuilt(expand(model, narrow, init="standard"), expand(model, CL(0.25), init="standard"))
    with pytest.raises(ExpansionError, match="cannot keep the function"):
        expand(model, narrow)


class Composed(CL):
    """Expands its middle layer again."""

    def layers(self, site: Site) -> Any:
        layers = dict(super().layers(site))
        inner: Any = expand(layers["kernel"], CL(1))
        return {**layers, "kernel": inner}


def test_what_a_strategy_has_expanded_by_itself_is_not_expanded_again() -> None:
    big = expand(net(), [Rule(Composed(2), layer("0")), CL(2)], init="standard")
    found = manifest(big)
    assert [site["path"] for site in found["sites"]] == ["0", "0.kernel", "2"]
    assert_rebuilt(expand(net(), found, init="standard"), big)
    found["sites"][1]["strategy"] = "CL(rate=3, keep_input=False)"
    found["rules"][1] = "CL(rate=3, keep_input=False) on 0.kernel"
    with pytest.raises(RuleError, match=r"0\.kernel: expected Conv2d, found an expansion by CL\(rate=1"):
        expand(net(), found, init="standard")


# Resuming.


@pytest.fixture(scope="module")
def resumed(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[str, str], tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The weights after three epochs, and after one, two more in another process."""
    folder = tmp_path_factory.mktemp("resumed")
    straight: dict[tuple[str, str], dict[str, Tensor]] = {}
    files: dict[tuple[str, str], Path] = {}
    for form in resuming.FORMS:
        for optimizer in resuming.OPTIMIZERS:
            case = form, optimizer
            straight[case] = resuming.start(form, optimizer, resuming.EPOCHS, folder / "unused")
            files[case] = folder / f"{form}-{optimizer}"
            after_one = resuming.start(form, optimizer, 1, files[case])
            assert any(not torch.equal(t, straight[case][name]) for name, t in after_one.items())
    command = [sys.executable, resuming.__file__, *map(str, files.values())]
    run = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    return {case: (straight[case], torch.load(files[case], weights_only=True)) for case in straight}


@pytest.mark.parametrize("form", resuming.FORMS)
@pytest.mark.parametrize("optimizer", resuming.OPTIMIZERS)
def test_training_resumed_in_another_process_gives_the_same_weights(form: str, optimizer: str, resumed: Any) -> None:
    straight, found = resumed[form, optimizer]
    assert list(found) == list(straight)
    for name, value in straight.items():
        assert torch.equal(found[name], value), name


# What does not fit. The model is as it was.


def told(given: Any, *parts: str, model: nn.Module | None = None, error: Any = RuleError) -> None:
    for inplace in (False, True):
        plain: nn.Module = fxexpand.trace(net()) if model is None else copy.deepcopy(model)
        before = structure(plain), [id(module) for module in plain.modules()]
        with pytest.raises(error) as caught:
            expand(plain, given, inplace=inplace)
        for part in parts:
            assert part in str(caught.value)
        assert (structure(plain), [id(module) for module in plain.modules()]) == before


def changed(**facts: Any) -> dict[str, Any]:
    """A manifest in which one layer, the convolution ``0``, had other facts."""
    found = through_json(manifest(expand(net(), [CL(2), FC(2)])))
    found["sites"][0].update(facts)
    if "path" in facts:
        found["rules"] = [found["rules"][0].replace("on 0, 2", f"on {facts['path']}, 2")]
    return dict(found)


@pytest.mark.parametrize(
    ("facts", "parts"),
    [
        ({"path": "7"}, ("7: expected Conv2d, found nothing there",)),
        ({"path": "0.kernel"}, ("0.kernel: expected Conv2d, found nothing there",)),
        ({"path": "1"}, ("1: expected Conv2d, found ReLU, which is no layer that the model uses",)),
        ({"layer": "Conv1d"}, ("0: expected Conv1d, found Conv2d",)),
        ({"layer": "conv2d()"}, ("0: expected conv2d(), found Conv2d",)),
        ({"in_channels": 5}, ("0: expected in_channels=5, found in_channels=3",)),
        ({"in_channels": "3"}, ('expected in_channels="3", found in_channels=3',)),
        ({"groups": True}, ("expected groups=true, found groups=1",)),
        ({"bias": None}, ("expected bias=null, found bias=true",)),
        ({"bias": False, "stride": [1, 2]}, ("bias=false, stride=[1, 2], found bias=true, stride=[1, 1]",)),
        ({"padding": [[2, 2], [2, 2]]}, ("expected padding=[[2, 2], [2, 2]], found padding=[[2, 2], [1, 1]]",)),
        ({"padding_mode": "circular"}, ('expected padding_mode="circular", found padding_mode="zeros"',)),
    ],
)
def test_a_layer_that_is_another_is_named_with_what_differs(facts: dict[str, Any], parts: tuple[str, ...]) -> None:
    told(changed(**facts), "does not fit the model, at 1 of 3 sites", "Build the model as it was", *parts)


def test_all_differences_are_listed() -> None:
    found = manifest(expand(nn.Sequential(*[nn.Linear(4, 4) for _ in range(12)]), FC(2)))
    other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5), nn.Linear(5, 5), nn.ReLU())
    parts = ("1: expected out_channels=4, found out_channels=5", "3: expected Linear, found ReLU", "8: expected Linear")
    told(found, "at 11 of 12 sites", *parts, "and 3 more", model=other)


def test_a_path_that_is_nearly_right_is_suggested() -> None:
    found = manifest(expand(nn.ModuleDict({"features": nn.Linear(4, 4)}), FC(2)))
    told(found, "Did you mean 'feature'?", model=nn.ModuleDict({"feature": nn.Linear(4, 4)}))


def test_a_strategy_for_another_kind_of_layer_does_not_fit() -> None:
    found = changed(strategy="FC(rate=2, depth=2)")
    found["rules"] = ["FC(rate=2, depth=2) on 0, 5; CL(rate=2, keep_input=False) on 2"]
    told(found, "0: expected a layer that FC(rate=2, depth=2) takes, found Conv2d")


def test_an_expansion_inside_another_that_the_strategy_does_not_make_differs() -> None:
    found = manifest(nested())
    found["sites"][1]["in_channels"] = 9
    told(found, "0.kernel: expected in_channels=9, found in_channels=6")


def test_an_expansion_that_the_manifest_does_not_list_differs() -> None:
    found = manifest(expand(net(), Rule(Composed(2), layer("0")), init="standard"))
    del found["sites"][1]
    del found["rules"][1]
    with pytest.raises(RuleError, match=r"0\.kernel: expected no expansion, made CL"):
        expand(net(), found, init="standard")


def test_the_model_must_be_the_plain_one() -> None:
    big = expand(net(), [CL(2), FC(2)])
    told(manifest(big), "expected the model before it was expanded, found an expansion at '0' and 2 more", model=big)
    told(manifest(big), "found an expansion at '2'", model=expand(net(), Rule(CL(3), layer("2"))))


def test_a_layer_that_cannot_be_expanded_now_is_an_expansion_error() -> None:
    model = net()
    model[0].register_forward_hook(lambda *_: None)
    told(manifest(expand(net(), CL(2))), "0 (Conv2d 5×5", "hooks", model=model, error=ExpansionError)


# What is no manifest.


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (dict.clear, ("expected 'format', a number, found None", "Give what manifest(model) gave, or rules")),
        (lambda m: m.update(format="1"), ("expected 'format', a number, found '1'",)),
        (lambda m: m.update(format=True), ("expected 'format', a number, found True",)),
        (lambda m: m.update(format=0), ("expected 'format', a number, found 0",)),
        (
            lambda m: m.update(format=2, fxexpand="3.0", sites={}),
            ("expected format 1, found 2, written by fxexpand 3.0; this is fxexpand", "Install that version"),
        ),
        (lambda m: m.pop("sites"), ("it has no 'sites'",)),
        (lambda m: m.update(weights=1), ("it has an unknown 'weights'",)),
        (lambda m: m.update(sites=[]), ("expected a list of sites, found []",)),
        (lambda m: m.update(sites={"0": "CL"}), ("expected a list of sites",)),
        (lambda m: m["sites"].append(3), ("expected a list of sites",)),
        (lambda m: m["sites"].append(m["sites"][0]), ("expected each path once",)),
        (lambda m: m["sites"].pop(), ("expected the rules that its sites make, found others",)),
        (lambda m: m.update(rules=["CL(rate=2, keep_input=False) on 0"]), ("expected the rules that its sites make",)),
        (lambda m: m["sites"][1].pop("stride"), ("site 1 has no 'stride'",)),
        (lambda m: m["sites"][1].pop("path"), ("site 1 has no 'path'",)),
        (lambda m: m["sites"][2].update(stride=[1]), ("site 2 has an unknown 'stride'",)),
        (lambda m: m["sites"][0].update(path=0), ("site 0 has the path 0, expected text",)),
        (lambda m: m["sites"][0].update(strategy=None), ("site 0 has the strategy None",)),
        (lambda m: m["sites"][1].update(strategy="CX(2)"), ("site 1 (2): rules, column 1: expected a strategy",)),
        (lambda m: m["sites"][1].update(strategy="CL(2) on a"), ("site 1 (2): expected one strategy",)),
        (lambda m: m["sites"][1].update(strategy="CL(2)+FC(2)"), ("site 1 (2): expected one strategy",)),
        (lambda m: m["sites"][1].update(strategy="CL(-1)"), ("site 1 (2)", "rate must be a positive number")),
        (lambda m: m.update(classes=["Own"]), ("expected the names of classes, found ['Own']",)),
        (lambda m: m.update(classes={"Own": 3}), ("expected the names of classes",)),
        (lambda m: m.update(classes={"Own": "os.system"}), ("os.system is not defined in this process", "Import")),
        (lambda m: m.update(fxexpand=object()), ("expected values of JSON",)),
        (lambda m: m["sites"][0].update(groups=float("nan")), ("expected values of JSON",)),
        (lambda m: m["sites"][0].update(groups=m), ("expected values of JSON",)),
    ],
)
def test_what_is_no_manifest_is_told_why(change: Callable[[Any], object], parts: tuple[str, ...]) -> None:
    found = changed()
    change(found)
    told(found, *parts)


def test_the_text_of_a_manifest_is_to_be_read_first() -> None:
    text = json.dumps(changed())
    told(text, "expected a Rule or a strategy", "Use json.loads(...)")
    with pytest.raises(json.JSONDecodeError):
        expand(net(), json.loads(text[:-9]))


@given(st.data())
def test_a_manifest_that_was_changed_anywhere_is_a_rule_error_or_makes_a_network(data: st.DataObject) -> None:
    found = changed()
    place: Any = found
    while isinstance(place, (dict, list)) and place:
        outer, key = place, data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        place = outer[key]
        if data.draw(st.integers(0, 3)) == 0:
            break
    json_values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    )
    outer[key] = data.draw(json_values)
    try:
        big = expand(net(), found, init="standard")
    except RuleError:
        return
    assert [path for path, module in big.named_modules() if isinstance(module, Expanded)] == ["0", "2", "5"]


# What has no manifest.


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (net(), ("expected a model that fxexpand.expand has made", "before it is contracted")),
        (fxexpand.contract(expand(net(), CL(2))), ("found no expanded layer",)),
        (fx.symbolic_trace(expand(net(), CL(2))), ("a layer of an expansion, found outside of one",)),
        (nn.DataParallel(expand(net(), CL(2))), ("Pass model.module",)),
        ("model", ("expected a torch.nn.Module, found str",)),
        (changed(), ("expected a torch.nn.Module, found dict",)),
    ],
)
def test_what_has_no_expansions_has_no_manifest(model: Any, parts: tuple[str, ...]) -> None:
    with pytest.raises(ExpansionError) as caught:
        manifest(model)
    for part in parts:
        assert part in str(caught.value)


class Careless(CL):
    """Holds what its text does not say."""

    def __init__(self, rate: float, keep_input: bool = False, extra: int = 0) -> None:
        super().__init__(rate, keep_input=keep_input)
        object.__setattr__(self, "extra", extra)


@dataclass(frozen=True)
class Holding(CL):
    held: Any = None


def other_inner() -> type[CL]:
    return type("Inner", (CL,), {})


@pytest.mark.parametrize(
    ("strategies", "parts"),
    [
        (
            [Careless(2, extra=5)],
            ("0: its strategy is not the one that is read from its text, Careless(rate=2", "Make it a"),
        ),
        ([Holding(2, held=max)], ("0: its strategy cannot be written as text", "frozen dataclass", "held=<built-in")),
        ([Holding(2, held=float("inf"))], ("cannot be written as text", "found 'inf'")),
        ([Rule(Inner(2), layer("0")), other_inner()(2)], ("two strategies are called Inner", "Rename one")),
        ([Rule(type("CL", (CL,), {})(2), layer("0")), CL(2)], ("two strategies are called CL",)),
    ],
)
def test_a_strategy_that_text_cannot_say_is_an_error(strategies: Any, parts: tuple[str, ...]) -> None:
    with pytest.raises(ExpansionError) as caught:
        manifest(expand(net(), strategies))
    for part in parts:
        assert part in str(caught.value)


def test_a_strategy_of_the_users_is_found_by_its_full_name() -> None:
    found = manifest(expand(net(), Around(Inner(2))))
    assert found["classes"] == {"Around": f"{__name__}.Around", "Inner": f"{__name__}.Inner"}
    assert found["sites"][0]["strategy"] == "Around(inner=Inner(rate=2, keep_input=False), names=())"

    @dataclass(frozen=True)
    class Local(CL):
        pass

    big = expand(net(), Local(2))
    assert_rebuilt(expand(net(), manifest(big)), big)
