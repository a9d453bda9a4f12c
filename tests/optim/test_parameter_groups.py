"""parameter_groups: each trainable parameter in the group that its kind calls for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

from fxexpand import (
    CL,
    FC,
    ExpansionError,
    FxExpandError,
    Rule,
    collapse,
    contract,
    effective_decay,
    expand,
    layer,
    parameter_groups,
)

NORMS = (
    *(nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.InstanceNorm2d(4, affine=True)),
    *(nn.LayerNorm((4, 4)), nn.GroupNorm(2, 4), nn.RMSNorm((4, 4))),
)


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)),
        *(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2, bias=False)),
    )


def expanded() -> nn.Module:
    return expand(network(), [CL(2), Rule(FC(2), where=layer(name="5"))])


def names(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The names of the parameters by group."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: [known[id(parameter)] for parameter in group["params"]] for group in groups}


def decays(groups: list[dict[str, Any]]) -> dict[str, float]:
    return {group["name"]: group["weight_decay"] for group in groups}


def test_the_groups_of_an_expanded_network() -> None:
    model = expanded()
    assert names(model, parameter_groups(model, 0.1)) == {
        "weights": ["3.weight", "7.weight"],
        "factors": [f"0.{part}.weight" for part in ("expand", "kernel", "reduce")]
        + [f"5.linear_{i}.weight" for i in range(2)],
        "exempt": [
            *(f"0.{part}.bias" for part in ("expand", "kernel", "reduce")),
            *("1.weight", "1.bias", "3.bias", "5.linear_0.bias", "5.linear_1.bias"),
        ],
    }


@pytest.mark.parametrize(("mode", "factors"), [("factors", 0.1), ("effective", 0.0), ("none", 0.0)])
def test_the_decay_of_each_mode(mode: str, factors: float) -> None:
    found = decays(parameter_groups(expanded(), 0.1, mode=mode))
    assert found == {"weights": 0.1, "factors": factors, "exempt": 0.0}
    assert decays(parameter_groups(network(), weight_decay=0.1, mode=mode)) == {"weights": 0.1, "exempt": 0.0}


def test_every_trainable_parameter_is_in_one_group() -> None:
    for model in (network(), expanded(), collapse(expanded()), contract(expanded())):
        found = [id(parameter) for group in parameter_groups(model, 0.1) for parameter in group["params"]]
        assert sorted(found) == sorted(id(parameter) for parameter in model.parameters())


def test_the_order_is_that_of_the_model() -> None:
    model = expanded()
    order = [name for name, _ in model.named_parameters()]
    for group in names(model, parameter_groups(model, 0.1)).values():
        assert group == sorted(group, key=order.index)


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: type(norm).__name__)
def test_norms_do_not_decay(norm: nn.Module) -> None:
    assert list(decays(parameter_groups(nn.Sequential(norm), 0.1))) == ["exempt"]


class Gain(nn.Module):
    """A scale a channel, and a table of biases with two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(3, 3))
        self.debias = nn.Parameter(torch.zeros(3, 3))


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        (nn.PReLU(4), []),
        (Gain(), ["debias"]),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), ["in_proj_weight", "out_proj.weight"]),
        (nn.LSTM(3, 2), ["weight_ih_l0", "weight_hh_l0"]),
        (nn.Embedding(5, 3), ["weight"]),
        (nn.Embedding(5, 3, sparse=True), []),
        (nn.ConvTranspose2d(2, 3, 3), ["weight"]),
        (parametrizations.spectral_norm(nn.Linear(3, 3)), ["parametrizations.weight.original"]),
        (parametrizations.orthogonal(nn.Linear(3, 3)), ["parametrizations.weight.original"]),
    ],
)
def test_what_decays_in_other_modules(model: nn.Module, weights: list[str]) -> None:
    assert names(model, parameter_groups(model, 0.1)).get("weights", []) == weights


def test_a_parametrized_bias_and_norm_do_not_decay() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm((3, 3)))
    torch.nn.utils.parametrize.register_parametrization(model[0], "bias", Twice())
    torch.nn.utils.parametrize.register_parametrization(model[1], "weight", Twice())
    assert names(model, parameter_groups(model, 0.1))["weights"] == ["0.weight"]


def test_frozen_parameters_are_left_out_and_empty_groups_too() -> None:
    model = expanded()
    model.get_submodule("0").requires_grad_(False)
    model.get_submodule("5").requires_grad_(False)
    assert set(decays(parameter_groups(model, 0.1))) == {"weights", "exempt"}


def test_tied_parameters_are_in_one_group_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.LayerNorm((4, 4)))
    model.get_submodule("2").weight = model.get_parameter("0.weight")
    assert names(model, parameter_groups(model, 0.1))["weights"] == ["0.weight"]
    model.get_submodule("3").weight = model.get_parameter("0.weight")  # a norm's too: then it is exempt
    assert "weights" not in decays(parameter_groups(model, 0.1))
    assert sum(len(group["params"]) for group in parameter_groups(model, 0.1)) == 4


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, nn.Sequential, collapse, copy.deepcopy])
def test_wrapped_models(wrap: Any) -> None:
    groups = parameter_groups(wrap(expanded()), 0.1)
    assert {group["name"]: len(group["params"]) for group in groups} == {"weights": 2, "factors": 5, "exempt": 8}


@pytest.mark.parametrize("mode", ["factors", "effective", "none"])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_optimisers_take_them(make: Any, mode: str) -> None:
    model, x = collapse(expanded()), torch.randn(2, 3, 4, 4)
    optimizer = make(parameter_groups(model, 0.1, mode), lr=0.01)
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    before = [weight.detach().clone() for weight in weights]
    (model(x).square().sum() + 0.1 * effective_decay(model)).backward()
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, weights, strict=True))
    other = make(parameter_groups(expanded(), 0.1, mode), lr=0.01)
    other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("decay", [-1e-4, float("nan"), float("inf"), True, "1e-4", None, torch.tensor(0.1)])
def test_a_decay_that_is_none(decay: Any) -> None:
    with pytest.raises(
        FxExpandError, match="parameter_groups: weight_decay: expected a finite number of at least 0, fou"
    ):
        parameter_groups(network(), decay)


@pytest.mark.parametrize("mode", ["factor", None, 1, ["factors"]])
def test_a_mode_that_is_none(mode: Any) -> None:
    with pytest.raises(FxExpandError, match="mode: expected one of 'factors', 'effective', 'none', found"):
        parameter_groups(network(), 0.1, mode)


@pytest.mark.parametrize("model", [3, None, nn.Linear, [torch.ones(2)]])
def test_what_is_no_module(model: Any) -> None:
    with pytest.raises(FxExpandError, match=r"parameter_groups: expected a torch.nn.Module, found"):
        parameter_groups(model, 0.1)


def test_models_without_parameters_to_train() -> None:
    for model, count in ((nn.ReLU(), 0), (network().requires_grad_(False), 9)):
        with pytest.raises(FxExpandError, match=f"found none among the {count} of this"):
            parameter_groups(model, 0.1)
    with pytest.raises(FxExpandError, match="found a lazy one"):
        parameter_groups(nn.LazyLinear(3), 0.1)


def test_layers_of_an_expansion_that_stand_outside() -> None:
    model = fx.Transformer(fx.symbolic_trace(expanded())).transform()
    assert "factors" not in decays(parameter_groups(model, 0.1))
    for mode in ("effective", "none"):
        with pytest.raises(ExpansionError, match=r"parameter_groups: 0.expand: expected the layers of an expansion"):
            parameter_groups(model, 0.1, mode)
