"""Every mistake gets the contract's error: where, expected, found, remedy. The model is as it was."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, prune

import fxexpand
from fxexpand import CK, CL, FC, ContractionError, ExpansionError, FxExpandError, Rule, RuleError, layer
from fxexpand.graph.expanded import Expanded


def snapshot(model: nn.Module) -> Any:
    known = {name: value for name, value in model.state_dict().items() if not is_lazy(value)}
    state = {name: value.clone() for name, value in known.items() if isinstance(value, Tensor)}
    return str(model), [id(m) for m in model.modules()], state


def assert_refused(model: nn.Module, rules: Any, error: type[FxExpandError], *parts: str, **options: Any) -> None:
    """That expanding raises ``error`` with a message of all ``parts``, and leaves the model alone, also in place."""
    text, modules, state = snapshot(model)
    for inplace in (False, True):
        with pytest.raises(error) as caught:
            fxexpand.expand(model, rules, inplace=inplace, **options)
        for part in parts:
            assert part in str(caught.value)
    found_text, found_modules, found_state = snapshot(model)
    assert (found_text, found_modules) == (text, modules)
    assert all(torch.equal(found_state[name], value) for name, value in state.items())


def net(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*(layers or (nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.Linear(6, 2))))


@pytest.mark.parametrize("strategy", [CL, CK, FC])
@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), "4", None, True])
def test_a_rate_must_be_a_positive_number(strategy: Any, rate: Any) -> None:
    with pytest.raises(
        RuleError,
        match=rf"{strategy.__name__}: rate must be a positive number, found .*Use {strategy.__name__}\(rate=4\)",
    ):
        strategy(rate)


@pytest.mark.parametrize("depth", [1, 0, 2.5, True])
def test_fc_needs_two_layers_at_least(depth: Any) -> None:
    with pytest.raises(RuleError, match="depth must be an integer of at least 2"):
        FC(2, depth=depth)


def test_no_rules() -> None:
    assert_refused(net(), [], RuleError, "expected at least one rule", "CL(rate=4)")


def test_what_is_no_rule() -> None:
    assert_refused(net(), ["CL(4)"], RuleError, "expected a Rule or a strategy", "parse_rules('CL(4)')")
    assert_refused(net(), CL, RuleError, "Use CL(rate=4)")


def test_a_strategy_that_reaches_nothing() -> None:
    assert_refused(net(nn.Linear(3, 3)), CL(2), RuleError, "no rule matches any layer: CL(rate=2", "0 (Linear, 3 -> 3)")
    assert_refused(net(nn.ReLU()), CL(2), RuleError, "The model has no convolution or linear layer")
    assert_refused(net(), CK(4), RuleError, "no rule matches any layer", "0 (Conv2d 3×3, 4 -> 6)")


def test_a_rule_whose_where_matches_nothing_beside_one_that_does() -> None:
    rule = Rule(CL(2), where=layer(name="nothing.*"))
    assert_refused(net(), [FC(2), rule], RuleError, "on nothing.* matches no layer", "0 (Conv2d 3×3")


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(RuleError, match="Did you mean 'stem'"):
        fxexpand.expand(net_of(nn.Conv2d(3, 4, 3)), Rule(CL(2), where=layer(name="stm")))


def net_of(stem: nn.Module) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = stem

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.stem(x)
            return y

    return Net()


def test_a_where_that_holds_for_layers_of_another_kind() -> None:
    rule = Rule(FC(2), where=layer(name="0"))
    assert_refused(net(), rule, RuleError, "Its where holds for 0 (Conv2d 3×3, 4 -> 6)", "FC takes linear layers")


@pytest.mark.parametrize(
    ("kernel_size", "found"), [(3, "a kernel larger than 3, found 3×3"), (6, "an odd kernel, found 6×6")]
)
def test_ck_on_a_kernel_it_cannot_expand(kernel_size: int, found: str) -> None:
    model = net(nn.Conv2d(4, 8, kernel_size, groups=4))
    parts = ("0 (Conv2d", "groups=4", f"CK needs {found}", "CL(rate=4)", 'where=~layer(name="0")')
    assert_refused(model, Rule(CK(4), where=layer(name="0")), ExpansionError, *parts)


@pytest.mark.parametrize(
    ("module", "strategy", "remedy"),
    [
        (nn.Conv2d(8, 8, 3), CL(0.5), "rate=1 is enough"),
        (nn.Conv2d(8, 8, 7), CK(2), "rate=4 is enough"),
        (nn.Conv1d(8, 8, 7), CK(1.5), "rate=2 is enough"),
        (nn.Conv2d(8, 8, 11), CK(4), "rate=9 is enough"),
        (nn.Linear(8, 4), FC(0.25), "rate=0.5 is enough"),
        (nn.Linear(8, 4), FC(0.6, depth=3), "rate=1 is enough"),
        (nn.Conv2d(3, 8, 7), CK(4, keep_input=True), "keep_input=False with rate=4 is enough"),
    ],
)
def test_a_rate_too_small_to_keep_the_function_names_the_rate_that_is_enough(
    module: nn.Module, strategy: Any, remedy: str
) -> None:
    model = net(module)
    assert_refused(model, strategy, ExpansionError, f"0 ({type(module).__name__}", "cannot keep the function", remedy)
    fxexpand.expand(model, strategy, init="standard")  # as the message says


@pytest.mark.parametrize(
    ("module", "strategy"),
    [
        (nn.Conv2d(8, 8, 3), CL(1)),
        (nn.Conv2d(8, 8, 7), CK(4)),
        (nn.Conv1d(8, 8, 7), CK(2)),
        (nn.Conv2d(2, 2, 11), CK(9)),
        (nn.Linear(8, 4), FC(0.5)),
        (nn.Linear(8, 4), FC(1, depth=3)),
        (nn.Linear(7, 3), FC(0.429)),
    ],
)
def test_the_rate_that_is_said_to_be_enough_is(module: nn.Module, strategy: Any) -> None:
    assert isinstance(fxexpand.expand(module, strategy), Expanded)


def test_an_unknown_init() -> None:
    assert_refused(net(), CL(2), ExpansionError, "init: expected 'preserve', 'standard'", "'zeros'", init="zeros")


def weight_norm() -> nn.Module:
    module: nn.Module = parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
    return module


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(nn.Conv2d(4, 4, 3))


def pruned() -> nn.Module:
    module: nn.Module = prune.random_unstructured(nn.Conv2d(4, 4, 3), "weight", amount=0.5)
    return module


def hooked() -> nn.Module:
    module = nn.Conv2d(4, 4, 3)
    module.register_forward_hook(lambda module, args, output: output * 2)
    return module


def backward_hooked() -> nn.Module:
    module = nn.Conv2d(4, 4, 3)
    module.register_full_backward_hook(lambda module, before, after: None)
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (weight_norm, "remove_parametrizations"),
        (old_weight_norm, "computed by a hook"),
        (pruned, "computed by a hook"),
        (hooked, "which would be lost"),
        (backward_hooked, "which would be lost"),
        (lambda: nn.LazyConv2d(4, 3), "run the model once"),
        (lambda: nn.Conv2d(4, 4, 3, dtype=torch.complex64), "its weight is complex; expected a floating-point weight"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_layer_that_is_more_than_weight_and_bias(make: Any, reason: str) -> None:
    assert_refused(net(make()), CL(2), ExpansionError, "0 (", reason, 'where=~layer(name="0")')


def test_such_a_layer_is_left_alone_when_it_is_excluded() -> None:
    model = net(weight_norm(), nn.Conv2d(4, 4, 3)).double()
    big = fxexpand.expand(model, Rule(CL(2), where=~layer(name="0")))
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    assert fxexpand.verify(model, big, x) < 1e-12
    assert "0.parametrizations.weight.original0" in fxexpand.contract(big).state_dict()


class Quantized(nn.Module):
    """One quantized linear layer, made as torch makes them."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            converted = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})
        self.linear = converted[0]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


def test_a_quantized_layer() -> None:
    model = Quantized()
    with pytest.raises(
        ExpansionError, match=r"linear \(Linear, 4 -> 4\): its weight is quantized; expand the floating"
    ):
        fxexpand.expand(model, FC(2))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(self.embedding(tokens))
        return y


def test_a_tied_weight() -> None:
    assert_refused(Tied(), FC(2), ExpansionError, "head (Linear, 4 -> 5)", "tied to Embedding.weight", "untie")


class ReadElsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.conv(x), self.conv.weight.transpose(0, 1))


def test_a_weight_that_the_model_reads_too() -> None:
    assert_refused(ReadElsewhere(), CL(2), ExpansionError, "conv (Conv2d", "also read by transpose")


class Settings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1) + F.conv2d(x, self.weight, padding=2, dilation=2)


def test_one_weight_called_with_two_settings() -> None:
    assert_refused(Settings(), CL(2), ExpansionError, "weight (conv2d()", "differ in their settings")


@pytest.mark.parametrize("thing", [42, None, "resnet18", nn.Conv2d, {"conv": nn.Conv2d(1, 1, 3)}])
def test_an_object_that_is_no_module(thing: Any) -> None:
    with pytest.raises(ExpansionError, match=r"expected a torch\.nn\.Module, found"):
        fxexpand.expand(thing, CL(2))


def test_models_that_are_wrapped_already() -> None:
    with pytest.raises(ExpansionError, match="_orig_mod"):
        fxexpand.expand(torch.compile(net()), CL(2))  # type: ignore[arg-type]
    with pytest.raises(ExpansionError, match=r"model\.module"):
        fxexpand.expand(nn.DataParallel(net()), CL(2))


def test_contracting_what_was_never_expanded() -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(ContractionError, match=r"expected a model that fxexpand.expand has made, found no expanded"):
        fxexpand.contract(model)
    assert snapshot(model)[:2] == before[:2]
