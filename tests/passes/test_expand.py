"""expand keeps the function, puts the new layers where it says, and touches nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import example, given
from torch import Tensor, fx, nn

import fxexpand
from drawing import assert_equal
from expansions import Expansion, chain_expansions, expansions
from fxexpand import CK, CL, FC, ExpansionError, Rule, RuleError, layer
from fxexpand.testing import Case, Functional, Picky, Residual, chain_matrix, matrix, networks


def children(model: nn.Module) -> list[nn.Module]:
    return list(model.children())


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


@given(chain_expansions())
def test_the_new_layers_are_the_same_matrix_as_the_old_one(case: Expansion) -> None:
    expanded = fxexpand.expand(case.layer, case.strategy)
    found = chain_matrix(children(expanded), case.size, channels=case.channels)
    assert len(children(expanded)) > 1
    assert_equal(found, matrix(case.layer, case.size), tolerance=1e-11)


@given(expansions())
def test_a_module_computes_what_its_matrix_says(case: Expansion) -> None:
    x = case.signal()
    assert relative(fxexpand.expand(case.layer, case.strategy)(x), case.layer(x)) < 1e-11


DEAD = Case(
    nn.Sequential(
        nn.Sequential(nn.Conv2d(4, 4, (3, 3), padding="same"), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Conv2d(4, 4, (5, 5), padding="same", groups=4, bias=False),
        Residual(nn.Conv2d(4, 4, (3, 3), padding="same"), times=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ),
    [(3, 4, 9, 9)],
)


@given(networks())
@example(DEAD)
def test_random_networks_keep_their_function_and_every_new_parameter_learns(case: Case) -> None:
    model, (x,) = case.module.train(), case.inputs
    before = {name: value.clone() for name, value in model.state_dict().items()}
    original = copy.deepcopy(model)
    expected = original(x)
    expected.square().sum().backward()
    # Beside a ReLU that gives nothing but zeros, the layer itself learns nothing.
    still = [n for n, p in original.named_parameters() if p.grad is not None and not p.grad.any()]
    dead = tuple(f"{n}." if n == "weight" else f"{n.removesuffix('.weight')}." for n in still)
    big = fxexpand.expand(model, [CK(4), CL(2), FC(2)])
    y = big(x)
    assert relative(y, expected) < 1e-10
    y.square().sum().backward()
    for name, parameter in big.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert bool(parameter.grad.any()) or name.startswith(dead), name
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} of the given model has changed"


def test_new_layers_live_under_the_old_path() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 7), nn.Flatten(), nn.Linear(4, 2))
    big = fxexpand.expand(model, [CK(4), CL(2), FC(2, depth=3)])
    layers = {name.rpartition(".")[0]: None for name in big.state_dict()}
    assert list(layers) == [
        *("0.expand", "0.kernel", "0.reduce"),
        *("2.kernel_0", "2.kernel_1", "2.kernel_2"),
        *("4.linear_0", "4.linear_1", "4.linear_2"),
    ]


def test_the_graph_calls_the_new_layers_one_after_another() -> None:
    big = fxexpand.expand(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), CL(2))
    assert isinstance(big, fx.GraphModule)
    called = [str(node.target) for node in big.graph.nodes if node.op == "call_module"]
    assert called == ["0.expand", "0.kernel", "0.reduce", "1"]


def test_a_layer_called_at_two_places_is_expanded_once_and_called_at_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.again = self.conv

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.again(torch.relu(self.conv(x)))
            return y

    model = Twice().double()
    big = fxexpand.expand(model, CL(2))
    assert isinstance(big, fx.GraphModule)
    assert sum(node.op == "call_module" for node in big.graph.nodes) == 2 * 3
    assert len(list(big.parameters())) == 3 * 2
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert fxexpand.verify(model, big, x) < 1e-12
    model.load_state_dict(fxexpand.contract(big).state_dict(), strict=True)


def test_dtype_device_flags_and_memory_format_carry_over() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, bias=True)).to(torch.bfloat16)
    model.to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    model[1].eval()
    big = fxexpand.expand(model, CL(2))
    assert {p.dtype for p in big.parameters()} == {torch.bfloat16}
    frozen = {name for name, p in big.named_parameters() if not p.requires_grad}
    assert frozen == {"0.expand.weight", "0.kernel.weight", "0.reduce.weight"}
    modes = {name: module.training for name, module in big.named_modules() if name.count(".")}
    assert modes == {f"{i}.{name}": i == 0 for i in (0, 1) for name in ("expand", "kernel", "reduce")}
    assert big.get_parameter("1.kernel.weight").is_contiguous(memory_format=torch.channels_last)


def test_a_model_on_the_meta_device_expands_without_values() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    big = fxexpand.expand(model, CL(4))
    assert {p.device.type for p in big.parameters()} == {"meta"}
    assert fxexpand.summary(big).parameters == 3 * 12 + 12 + 9 * 12 * 32 + 32 + 32 * 8 + 8


def test_standard_initialisation_is_that_of_the_classes() -> None:
    torch.manual_seed(1)
    big = fxexpand.expand(nn.Conv2d(4, 6, 3), CL(2), init="standard")
    torch.manual_seed(1)
    nn.Conv2d(4, 6, 3)
    fresh = [nn.Conv2d(4, 8, 1), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 6, 1)]
    for found, expected in zip(children(big), fresh, strict=True):
        assert torch.equal(found.get_parameter("weight"), expected.weight)
        assert torch.equal(found.get_parameter("bias"), torch.as_tensor(expected.bias))


def test_a_callable_initialises_as_it_likes() -> None:
    seen: dict[str, list[str]] = {}

    def zero(site: Any, layers: Any) -> None:
        seen[site.path] = list(layers)
        for module in layers.values():
            nn.init.zeros_(module.weight)

    big = fxexpand.expand(nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.Linear(4, 4)), [CL(2), FC(2)], init=zero)
    assert seen == {"0": ["expand", "kernel", "reduce"], "1": ["linear_0", "linear_1"]}
    assert not any(bool(p.any()) for name, p in big.named_parameters() if name.endswith("weight"))


def test_padding_that_no_layer_expresses_becomes_a_module_before_the_layers() -> None:
    conv = nn.Conv2d(3, 4, (2, 4), padding="same", padding_mode="replicate", dtype=torch.float64)
    big = fxexpand.expand(conv, CL(2))
    assert [type(child) for child in children(big)] == [nn.ReplicationPad2d, nn.Conv2d, nn.Conv2d, nn.Conv2d]
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    assert fxexpand.verify(conv, big, x) < 1e-12


def test_keep_input_holds_for_a_layer_that_reads_the_input_and_no_other() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    big = fxexpand.expand(model, CL(2, keep_input=True))
    assert big.get_parameter("0.expand.weight").shape == (3, 3, 1, 1)
    assert big.get_parameter("2.expand.weight").shape == (8, 4, 1, 1)


def test_the_first_rule_that_matches_wins() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 7), nn.Conv2d(4, 4, 7))
    big = fxexpand.expand(model, [Rule(CL(2), where=layer(name="1")), CK(4)])
    assert [name for name, _ in big.named_modules() if name.count(".")] == [
        *("0.kernel_0", "0.kernel_1", "0.kernel_2"),
        *("1.expand", "1.kernel", "1.reduce"),
    ]


def test_an_expansion_can_be_expanded_again_by_name_but_not_by_accident() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 5, padding=2), nn.ReLU()).double()
    once = fxexpand.expand(model, CL(2))
    with pytest.raises(RuleError, match="expanded already"):
        fxexpand.expand(once, CL(2))
    twice = fxexpand.expand(once, Rule(CK(4), where=layer(name="*.kernel")))
    assert "0.kernel.kernel_1.weight" in twice.state_dict()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert fxexpand.verify(model, twice, x) < 1e-12
    model.load_state_dict(fxexpand.contract(twice).state_dict(), strict=True)


def test_the_layers_of_a_model_whose_root_cannot_be_traced_expand() -> None:
    model = Picky(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))).double()
    big = fxexpand.expand(model, CL(2))
    assert type(big) is Picky
    assert isinstance(big.inner, fx.GraphModule)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert fxexpand.verify(model, big, x) < 1e-12
    assert fxexpand.verify(model, big, -x) < 1e-12


def test_a_parent_that_reads_the_weight_instead_of_calling_the_layer_keeps_its_function() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:  # no graph can stand for this
                x = x * 2
            assert self.proj.in_features == 4
            return torch.nn.functional.linear(x, self.proj.weight, self.proj.bias)

    model = Reader().double()
    big = fxexpand.expand(model, FC(2))
    x = torch.randn(3, 4, dtype=torch.float64)
    assert fxexpand.verify(model, big, x) < 1e-12
    big(x).sum().backward()
    assert all(p.grad is not None for p in big.parameters())


def test_functional_calls_expand_and_contract() -> None:
    model = Functional(4, bias=True, stride=2).double()
    big = fxexpand.expand(model, CL(2))
    assert list(dict(big.named_parameters())) == [
        f"weight.{name}.{kind}" for name in ("expand", "kernel", "reduce") for kind in ("weight", "bias")
    ]
    small = fxexpand.contract(big)
    assert list(small.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    assert fxexpand.verify(model, big, x) < 1e-12
    assert fxexpand.verify(model, small, x) < 1e-12


def test_in_place_a_graph_module_is_itself_rewritten() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(6, 6)))
    linear = gm.get_parameter("2.weight")
    big = fxexpand.expand(gm, CL(2), inplace=True)
    assert big is gm
    assert big.get_parameter("2.weight") is linear
    assert "0.expand.weight" in gm.state_dict()
    gm.graph.lint()
    assert gm(torch.randn(1, 3, 8, 8)).shape == (1, 4, 6, 6)


def test_in_place_other_models_share_the_parameters_that_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(6, 6))
    big = fxexpand.expand(model, CL(2), inplace=True)
    assert big.get_parameter("1.weight") is model[1].weight
    assert type(model[0]) is nn.Conv2d


def test_a_failure_in_place_leaves_the_graph_module_as_it_was() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)))
    code, keys = gm.code, list(gm.state_dict())
    with pytest.raises(ExpansionError):
        fxexpand.expand(gm, [Rule(CL(2), where=layer(name="0")), Rule(CK(4), where=layer(name="1"))], inplace=True)
    assert gm.code == code
    assert list(gm.state_dict()) == keys


def test_a_wrong_factorisation_is_not_taken_on_trust() -> None:
    class Wrong(CL):
        def factorize(self, target: Any, fresh: Any) -> Any:
            return fresh

    with pytest.raises(ExpansionError, match=r"0 \(Conv2d 3×3.*differ from the layer by"):
        fxexpand.expand(nn.Sequential(nn.Conv2d(3, 4, 3)), Wrong(2))


def test_layers_that_make_up_another_layer_are_an_error_also_without_preserving() -> None:
    class Wrong(CL):
        def layers(self, site: Any) -> Any:
            return {**super().layers(site), "expand": site.layer(site.in_channels, 6, padding=2)}

    with pytest.raises(ExpansionError, match=r"0 \(Conv2d 3×3.*padding"):
        fxexpand.expand(nn.Sequential(nn.Conv2d(3, 4, 3)), Wrong(2), init="standard")


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_expanded_model_compiles_whole(mode: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).double()
    big = getattr(fxexpand.expand(model, [CL(2), FC(2)]), mode)()
    compiled: Any = torch.compile(big, backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert relative(compiled(x), getattr(model, mode)()(x)) < 1e-12
