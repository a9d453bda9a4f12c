"""Defects that a reviewer found in expand and contract: each either right now, or refused with its reason."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, prune

import fxexpand
from fxexpand import CK, CL, FC, ContractionError, ExpansionError, Rule, layer
from fxexpand.testing import graph

DOUBLE = torch.float64


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def train(model: nn.Module, x: Tensor, lr: float = 0.5) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def expanded_unless_refused(model: nn.Module, rules: Any, *reasons: str) -> nn.Module | None:
    """The expanded model, or None where the error names one of ``reasons``: both are right, a wrong model is not."""
    try:
        return fxexpand.expand(model, rules)
    except ExpansionError as error:
        if any(reason in str(error).lower() for reason in reasons):
            return None
        raise


class Untraceable(nn.Module):
    """Control flow that depends on data, so that no graph stands for it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e9 else self.fc(x)


# Layers that a parent holds beside its modules.


class ListOfLayers(nn.Module):
    """Calls its layers through a plain list of them, which torch does not know about."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = []
        for i in range(2):
            self.add_module(f"l{i}", nn.Linear(4, 4))
            self.layers.append(self.get_submodule(f"l{i}"))

    def forward(self, x: Tensor) -> Tensor:
        for one in self.layers:
            if x.sum() > 1e9:
                return x
            x = one(x).tanh()
        return x


def test_a_parent_that_calls_its_layers_through_a_plain_list_trains_the_new_layers() -> None:
    model, x = ListOfLayers().double(), torch.randn(3, 4, dtype=DOUBLE)
    big = fxexpand.expand(model, FC(2))
    assert distance(big(x), model(x)) < 1e-12
    big(x).sum().backward()
    assert all(p.grad is not None for p in big.parameters())
    train(big, x)
    assert distance(fxexpand.contract(big)(x), big(x)) < 1e-12


# Parameters of functional calls that something else reads, too.


class SharedWithLayer(nn.Module):
    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.other = other
        self.w = nn.Parameter(torch.randn(4, 4))
        nn.init.normal_(self.other.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.other(x) + F.linear(x, self.w, self.other.bias)  # type: ignore[arg-type]
        return y


class Functional(nn.Module):
    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.bias = nn.Parameter(torch.randn(4)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class SharedWithCode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Functional()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return torch.relu(self.block(x)) + F.linear(x, self.w, self.block.bias)


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        picked = (x > 0).sum(-1).clamp(max=3)
        return F.linear(self.norm(self.embedding(picked)), self.embedding.weight)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SharedWithLayer(nn.Linear(4, 4)),
        lambda: SharedWithLayer(nn.LayerNorm(4)),
        SharedWithCode,
        TiedHead,
    ],
    ids=["bias of a linear layer", "bias of a layer norm", "bias read by a parent's code", "weight of an embedding"],
)
def test_a_functional_call_whose_parameters_another_module_reads_keeps_its_function(make: Any) -> None:
    model, x = make().double(), torch.randn(3, 4, dtype=DOUBLE)
    big = expanded_unless_refused(
        model, Rule(FC(2), where=lambda site: site.module is None), "read", "tied", "different"
    )
    assert big is None or distance(big(x), model(x)) < 1e-12


class Outer(nn.Module):
    """Holds a parameter under the name that the inner module's weight has."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.head = nn.Linear(4, 3)
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.inner(x))) * self.weight
        return y


@pytest.mark.parametrize("bias", [True, False])
def test_a_functional_call_that_was_expanded_before_its_parent_contracts(bias: bool) -> None:
    model, x = Outer(Functional(bias=bias)).double(), torch.randn(3, 4, dtype=DOUBLE)
    staged = copy.deepcopy(model)
    staged.inner = fxexpand.expand(staged.inner, FC(2))
    small = fxexpand.contract(fxexpand.expand(staged, FC(2)))
    assert list(small.state_dict()) == list(model.state_dict())
    assert distance(small(x), model(x)) < 1e-12
    model.load_state_dict(small.state_dict(), strict=True)


def test_a_functional_call_in_a_traced_model_inside_another_expands() -> None:
    model = nn.Sequential(fxexpand.trace(Functional()), nn.Tanh()).double()
    x = torch.randn(3, 4, dtype=DOUBLE)
    big = fxexpand.expand(model, FC(2))
    assert distance(big(x), model(x)) < 1e-12
    assert distance(fxexpand.contract(big)(x), model(x)) < 1e-12


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        F.linear(x, self.w)
        y: Tensor = self.fc(x)
        return y


def test_a_functional_call_that_is_dead_code_comes_back() -> None:
    model, x = Unused().double(), torch.randn(3, 4, dtype=DOUBLE)
    big = fxexpand.expand(model, FC(2))
    assert isinstance(big, fx.GraphModule)
    big.graph.eliminate_dead_code()
    big.recompile()
    small = fxexpand.contract(big)
    assert list(small.state_dict()) == list(model.state_dict())
    assert distance(small(x), model(x)) < 1e-12


# What users do to the new layers before contracting.


@pytest.mark.parametrize(
    "change",
    [
        lambda factor: factor.register_forward_hook(lambda m, args, y: 2 * y),
        lambda factor: prune.l1_unstructured(factor, "weight", 0.5),
        torch.nn.utils.weight_norm,
    ],
    ids=["forward hook", "pruned", "weight norm as a hook"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_contracting_layers_with_hooks_is_refused(change: Callable[[nn.Module], Any]) -> None:
    x = torch.randn(9, 6, dtype=DOUBLE)
    big = fxexpand.expand(nn.Sequential(nn.Linear(6, 5)).double(), FC(2))
    change(big.get_submodule("0.linear_0"))
    train(big, x)  # a weight that a hook computes is now one step behind
    with pytest.raises(ContractionError, match="hook"):
        fxexpand.contract(big)


def test_contracting_an_expansion_with_a_hook_of_its_own_is_refused() -> None:
    big = fxexpand.expand(Untraceable(), FC(2))
    big.get_submodule("fc").register_forward_hook(lambda m, args, y: 2 * y)
    with pytest.raises(ContractionError, match="hook"):
        fxexpand.contract(big)


@pytest.mark.parametrize("normed", [("linear_0", "linear_1"), ("linear_0",)])
def test_parametrized_layers_contract_with_their_flags_or_are_refused(normed: tuple[str, ...]) -> None:
    x = torch.randn(3, 6, dtype=DOUBLE)
    big = fxexpand.expand(nn.Sequential(nn.Linear(6, 5)).double(), FC(2))
    for name in ("linear_0", "linear_1"):
        factor = big.get_submodule(f"0.{name}")
        if name in normed:
            parametrizations.weight_norm(factor)
        else:
            factor.requires_grad_(False)
    try:
        small = fxexpand.contract(big)
    except ContractionError:
        return
    assert distance(small(x), big(x)) < 1e-12
    assert all(p.requires_grad for p in small.parameters())  # something of it was being trained


def test_padding_after_a_padding_module_is_refused() -> None:
    big = fxexpand.expand(nn.Sequential(nn.Conv2d(3, 4, 2, padding="same")), CL(2))
    first: Any = big.get_submodule("0.expand")
    first.padding = (1, 1)
    with pytest.raises(ContractionError, match="padding"):
        fxexpand.contract(big)


def test_a_graph_that_reads_a_new_parameter_is_refused() -> None:
    big = fxexpand.expand(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), FC(2))
    assert isinstance(big, fx.GraphModule)
    output = next(node for node in big.graph.nodes if node.op == "output")
    with big.graph.inserting_before(output):
        norm = big.graph.call_function(torch.sum, (big.graph.get_attr("0.linear_0.weight"),))
        output.args = (big.graph.call_function(torch.add, (output.args[0], norm)),)
    big.recompile()
    with pytest.raises(ContractionError, match="linear_0"):
        fxexpand.contract(big)


def test_layers_on_several_devices_are_refused() -> None:
    big = fxexpand.expand(nn.Sequential(nn.Linear(4, 4)), FC(2))
    big.get_submodule("0.linear_0").to("meta")
    with pytest.raises(ContractionError, match="device"):
        fxexpand.contract(big)


class HalfTraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.rest = Untraceable()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rest(torch.relu(self.first(x)))
        return y


def test_a_pass_that_loses_some_expansions_is_an_error_not_half_a_contraction() -> None:
    big = fxexpand.expand(HalfTraceable(), FC(2))
    assert isinstance(big, fx.GraphModule)
    retraced = fx.Transformer(big).transform()  # makes plain modules of the containers that its graph names
    try:
        small = fxexpand.contract(retraced)
    except ContractionError:
        return
    assert list(small.state_dict()) == list(HalfTraceable().state_dict())


# Compiling in place.


@pytest.mark.parametrize("journey", [copy.deepcopy, fxexpand.contract, lambda m: fxexpand.expand(m, CL(2))])
def test_a_copy_of_a_traced_model_that_was_compiled_in_place_runs_its_own_parameters(journey: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(3, 3, 3)).double()
    big = fxexpand.expand(model, Rule(FC(2), where=layer(name="0")))
    x = torch.randn(2, 3, 4, dtype=DOUBLE)
    big.compile(backend="eager")
    big(x)
    other = journey(big)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other(x).any()


def test_a_traced_model_that_was_compiled_in_place_pickles() -> None:
    big = fxexpand.expand(nn.Sequential(nn.Linear(4, 4)).double(), FC(2))
    x = torch.randn(2, 4, dtype=DOUBLE)
    big.compile(backend="eager")
    assert distance(pickle.loads(pickle.dumps(big))(x), big(x)) < 1e-12


def test_a_contracted_model_can_be_scripted() -> None:
    small = fxexpand.contract(fxexpand.expand(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), CL(2)))
    x = torch.randn(1, 3, 6, 6)
    assert torch.allclose(torch.jit.script(small)(x), small(x))


# Keeping the function: values.


@pytest.mark.parametrize(
    ("module", "strategy"),
    [(nn.Conv2d(3, 4, 3), CL(2)), (nn.Conv2d(3, 4, 5), CK(4)), (nn.Linear(8, 8), FC(2, depth=3))],
    ids=["CL", "CK", "FC"],
)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_a_layer_of_zeros_keeps_its_function(module: nn.Module, strategy: Any, dtype: torch.dtype) -> None:
    zeros = copy.deepcopy(module).to(dtype)
    for parameter in zeros.parameters():
        nn.init.zeros_(parameter)
    small = fxexpand.contract(fxexpand.expand(zeros, strategy))
    assert float(small.get_parameter("weight").detach().abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("dtype", "size", "rtol"),
    [
        (torch.float32, 1e-6, 1e-6),
        (torch.float32, 1e-4, 1e-6),
        (torch.bfloat16, 1e-3, 1e-2),
        (torch.float16, 1e-4, 5e-3),
    ],
)
@pytest.mark.parametrize(("module", "strategy"), [(nn.Conv2d(16, 16, 3), CL(2)), (nn.Linear(64, 64), FC(2, depth=3))])
def test_small_weights_keep_their_digits(
    module: nn.Module, strategy: Any, dtype: torch.dtype, size: float, rtol: float
) -> None:
    small = copy.deepcopy(module)
    nn.init.normal_(small.weight, std=size)  # type: ignore[arg-type]
    small = small.to(dtype)
    back: Any = fxexpand.contract(fxexpand.expand(small, strategy))
    original: Any = small
    assert distance(back.weight.double(), original.weight.double()) < rtol


def test_factors_that_overflow_their_dtype_are_an_error() -> None:
    module = nn.Conv2d(8, 8, 9)
    nn.init.normal_(module.weight, std=1e4)
    module = module.half()
    try:
        back: Any = fxexpand.contract(fxexpand.expand(module, CK(4)))
    except ExpansionError:
        return
    assert distance(back.weight.double(), module.weight.double()) < 1e-2


def test_a_nan_in_the_weight_is_an_error_when_the_function_is_to_be_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).double()
    x = torch.randn(3, 4, dtype=DOUBLE)
    with torch.no_grad():
        model.get_parameter("0.weight")[0, 0] = float("nan")
    big = expanded_unless_refused(model, FC(2), "nan", "finite")
    assert big is None or torch.equal(big(x).isnan(), model(x).isnan())


@pytest.mark.parametrize("module", [nn.Linear(4, 0), nn.Conv2d(2, 0, 3)], ids=["linear", "convolution"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_outputs_expands_or_is_refused(module: nn.Module) -> None:
    try:
        small = fxexpand.contract(fxexpand.expand(module, [CL(2), FC(2)]))
    except ExpansionError:
        return
    assert list(small.state_dict()) == list(module.state_dict())


def test_a_default_device_does_not_reach_into_the_factors() -> None:
    module = nn.Conv2d(2, 2, 7)
    with torch.device("meta"):
        big = fxexpand.expand(module, CK(4))
    assert {p.device.type for p in big.parameters()} == {"cpu"}


# The composed weight that an expansion answers with.


def test_the_weight_of_an_expansion_inside_an_expansion_is_the_old_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).double()
    big = fxexpand.expand(fxexpand.expand(model, CL(2)), Rule(CL(2), where=layer(name="0.expand")))
    weight: Any = big.get_submodule("0").weight
    assert distance(weight, model.get_parameter("0.weight")) < 1e-12


def test_the_weight_of_an_expansion_has_the_dtype_of_the_layers_under_autocast() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    big = fxexpand.expand(model, FC(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight: Any = big.get_submodule("0").weight
    assert weight.dtype == torch.float32
    assert distance(weight, model.get_parameter("0.weight")) < 1e-6


# Rules, rates and strategies.


def test_a_condition_is_asked_once_about_each_layer() -> None:
    asked: list[str] = []

    def first_two(site: Any) -> bool:
        asked.append(site.path)
        return len(asked) <= 2

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    big = fxexpand.expand(model, Rule(FC(2), where=first_two))
    assert asked == ["0", "1", "2"]
    assert isinstance(big.get_submodule("1"), nn.Sequential)


def test_any_positive_number_is_a_rate() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    assert fxexpand.expand(model, FC(Fraction(3, 2))).get_parameter("0.linear_0.weight").shape == (6, 4)  # type: ignore[arg-type]


def test_keep_input_holds_for_a_layer_that_is_given_the_input_by_name() -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(input=x)
            return y

    big = fxexpand.expand(ByName(), CL(2, keep_input=True))
    assert big.get_parameter("conv.expand.weight").shape[0] == 3


class Twice(FC):
    def layers(self, site: Any) -> Mapping[str, nn.Module]:
        one = site.layer(4, 4)
        return {"a": one, "b": one}


class Dotted(FC):
    def layers(self, site: Any) -> Mapping[str, nn.Module]:
        return {"a.b": site.layer(4, 8), "c": site.layer(8, 4)}


class Reserved(FC):
    def layers(self, site: Any) -> Mapping[str, nn.Module]:
        return {"weight": site.layer(4, 8), "bias": site.layer(8, 4)}


@pytest.mark.parametrize("strategy", [Twice(2), Dotted(2), Reserved(2)], ids=lambda s: type(s).__name__)
def test_layers_that_cannot_stand_in_an_expansion_are_an_error_when_expanding(strategy: Any) -> None:
    with pytest.raises(ExpansionError, match="layers"):
        fxexpand.expand(nn.Sequential(nn.Linear(4, 4)), strategy, init="standard")


# Flags and hooks of the old layer.


def test_a_layer_with_state_dict_hooks_is_refused_or_survives() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_load_state_dict_pre_hook(lambda *args: None)
    big = expanded_unless_refused(model, FC(2), "hook")
    assert big is None or list(fxexpand.contract(copy.deepcopy(big)).state_dict()) == list(model.state_dict())


def test_a_layer_under_two_names_of_a_graph_module_stays_under_both() -> None:
    """copy.deepcopy of a GraphModule keeps the first name alone, and an empty module under the second."""
    source = "def forward(self, x): return self.one(x) + self.two(torch.relu(x))"
    gm = graph(source, one=nn.Linear(3, 4), two="one").double()
    x = torch.randn(2, 3, dtype=DOUBLE)
    big = fxexpand.expand(gm, FC(2))
    for rewritten in (big, fxexpand.collapse(big), fxexpand.contract(big), fxexpand.contract(fxexpand.collapse(big))):
        assert rewritten.get_submodule("two") is rewritten.get_submodule("one")
        assert fxexpand.verify(gm, rewritten, x) < 1e-12
    gm.load_state_dict(fxexpand.contract(big).state_dict(), strict=True)
