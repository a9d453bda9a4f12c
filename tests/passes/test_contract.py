"""contract is the inverse of expand, also after all that may happen to a model in between."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, fx, nn

import fxexpand
from expansions import Expansion, expansions
from fxexpand import CK, CL, FC, ContractionError, Rule, layer
from fxexpand.demo.data import digits
from fxexpand.demo.smallnet import SmallNet
from fxexpand.strategies import Strategy
from fxexpand.testing import Case, Picky, UserConv, networks

RULES = [CK(4), CL(2), FC(2)]


def hyperparameters(module: nn.Module) -> dict[str, Any]:
    """All plain attributes of a layer: what it was made with."""
    return {k: v for k, v in vars(module).items() if not isinstance(v, (dict, set)) and k != "training"}


def train(model: nn.Module, x: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@given(expansions())
def test_the_layer_that_comes_back_is_the_one_that_went_in(case: Expansion) -> None:
    small = fxexpand.contract(fxexpand.expand(case.layer, case.strategy))
    assert type(small) is type(case.layer)
    assert hyperparameters(small) == hyperparameters(case.layer)
    assert list(small.state_dict()) == list(case.layer.state_dict())
    for name, value in case.layer.state_dict().items():
        assert torch.allclose(small.state_dict()[name], value, rtol=0, atol=1e-12 * float(value.abs().max() + 1)), name


@given(networks())
def test_random_networks_come_back_with_their_names_and_classes(case: Case) -> None:
    model, (x,) = case.module.train(), case.inputs
    big = fxexpand.expand(model, RULES)
    train(big, x)
    small = fxexpand.contract(big)
    assert fxexpand.verify(big, small, x) < 1e-10
    assert list(small.state_dict()) == list(model.state_dict())
    assert [n for n, _ in small.named_modules()] == [n for n, _ in model.named_modules()]
    model.load_state_dict(small.state_dict(), strict=True)
    assert fxexpand.verify(big, model, x) < 1e-10


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, nn.Module, Tensor]:
    """(original, expanded and trained, input), in float64 and eval mode."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 7, padding=3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2, stride=2),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 5),
    ).double()
    x = torch.randn(4, 3, 10, 10, dtype=torch.float64)
    big = fxexpand.expand(model, RULES)
    train(big, x)
    return model.eval(), big.eval(), x


def by_deepcopy(big: nn.Module) -> nn.Module:
    return copy.deepcopy(big)


def by_pickle(big: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(big))  # type: ignore[no-any-return]


def by_file(big: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(big, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


def by_both(big: nn.Module) -> nn.Module:
    return copy.deepcopy(by_pickle(copy.deepcopy(big)))


@pytest.mark.parametrize("journey", [by_deepcopy, by_pickle, by_file, by_both])
def test_it_works_after_a_copy(journey: Any, trained: Any) -> None:
    model, big, x = trained
    small = fxexpand.contract(journey(big))
    assert fxexpand.verify(big, small, x) < 1e-12
    copy.deepcopy(model).load_state_dict(small.state_dict(), strict=True)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_it_works_after_a_move_to_another_dtype(dtype: torch.dtype, rtol: float, trained: Any) -> None:
    _, big, x = trained
    moved = copy.deepcopy(big).to(dtype)
    small = fxexpand.contract(moved)
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert fxexpand.verify(big, small, x.to(dtype), rtol=rtol) > 0


def test_it_works_on_a_model_rebuilt_by_the_same_rules_and_loaded(trained: Any) -> None:
    model, big, x = trained
    rebuilt = fxexpand.expand(model, RULES)
    rebuilt.load_state_dict(big.state_dict(), strict=True)
    assert fxexpand.verify(big, fxexpand.contract(rebuilt), x) < 1e-12


def test_the_given_model_stays_expanded_and_contracting_twice_is_an_error(trained: Any) -> None:
    _, big, _ = trained
    keys, code = list(big.state_dict()), big.code
    small = fxexpand.contract(big)
    assert (list(big.state_dict()), big.code) == (keys, code)
    with pytest.raises(ContractionError, match="found no expanded layer"):
        fxexpand.contract(small)


def test_the_graph_is_that_of_the_traced_original(trained: Any) -> None:
    model, big, _ = trained
    small, traced = fxexpand.contract(big), fxexpand.trace(model)
    assert isinstance(small, fx.GraphModule)
    assert isinstance(traced, fx.GraphModule)
    assert small.code == traced.code


def test_flags_are_those_the_layers_have_now() -> None:
    big = fxexpand.expand(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), CL(2))
    big.eval()
    for name, parameter in big.named_parameters():
        parameter.requires_grad_(not name.startswith("0."))
    small = fxexpand.contract(big)
    assert {n: p.requires_grad for n, p in small.named_parameters()} == {
        "0.weight": False, "0.bias": False, "1.weight": True, "1.bias": True,
    }  # fmt: skip
    assert not any(module.training for module in small.modules())


def test_memory_format_stays() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3)).to(memory_format=torch.channels_last)
    small = fxexpand.contract(fxexpand.expand(model, CL(2)))
    assert small.get_parameter("0.weight").is_contiguous(memory_format=torch.channels_last)


def test_what_a_subclass_holds_beside_weight_and_bias_comes_back() -> None:
    model = nn.Sequential(UserConv(3, 4, 3))
    big = fxexpand.expand(model, CL(2))
    big.get_buffer("0.mask").fill_(7)
    small = fxexpand.contract(big).get_submodule("0")
    assert type(small) is UserConv
    assert small.note == "mine"
    assert bool((small.get_buffer("mask") == 7).all())


def test_models_whose_root_cannot_be_traced_come_back() -> None:
    model = Picky(nn.Sequential(Picky(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Conv2d(4, 4, 3))).double()
    big = fxexpand.expand(model, CL(2))
    small = fxexpand.contract(big)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert fxexpand.verify(big, small, x) < 1e-12
    model.load_state_dict(small.state_dict(), strict=True)


@pytest.mark.parametrize("strategy", [CK(4), CL(4)], ids=str)
def test_a_smallnet_trained_on_digits_in_float32_contracts_to_rounding(strategy: Strategy) -> None:
    images, labels = digits()
    big = fxexpand.expand(SmallNet(), [strategy, Rule(FC(4, depth=3), where=layer(name="classifier.hidden"))])
    optimizer = torch.optim.SGD(big.parameters(), lr=0.01, momentum=0.9)
    for batch in range(0, 15 * 64, 64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(big(images[batch : batch + 64]), labels[batch : batch + 64]).backward()
        optimizer.step()
    small = SmallNet()
    small.load_state_dict(fxexpand.contract(big).state_dict(), strict=True)
    unseen = images[-256:]
    with torch.no_grad():
        exact = copy.deepcopy(big).double().eval()(unseen.double())
        weights_alone = copy.deepcopy(small).double().eval()(unseen.double())
        in_float32 = small.eval()(unseen)
    # What casting the composed weights costs, and with it what float32 arithmetic costs any network of this size.
    assert float((weights_alone - exact).norm() / exact.norm()) < 5e-8
    assert float((in_float32 - exact).norm() / exact.norm()) < 5e-7


def surgery(change: Any) -> nn.Module:
    """An expanded Conv2d whose graph ``change`` has edited."""
    big = fxexpand.expand(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), CL(2))
    assert isinstance(big, fx.GraphModule)
    nodes = {str(node.target): node for node in big.graph.nodes}
    change(big, nodes)
    big.recompile()
    return big


def activation_between(big: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    with big.graph.inserting_after(nodes["0.expand"]):
        relu = big.graph.call_function(torch.relu, (nodes["0.expand"],))
    nodes["0.kernel"].args = (relu,)


def inner_value_read(big: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    output = next(node for node in big.graph.nodes if node.op == "output")
    output.args = ((nodes["1"], nodes["0.kernel"]),)


def layer_left_out(big: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    nodes["0.reduce"].replace_all_uses_with(nodes["0.kernel"])
    big.graph.erase_node(nodes["0.reduce"])


def other_stride(big: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    vars(big.get_submodule("0.kernel"))["stride"] = (2, 2)


def inner_padding(big: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    vars(big.get_submodule("0.kernel"))["padding"] = (1, 1)


def activation_for_layer(big: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    big.set_submodule("0.expand", nn.ReLU())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (activation_between, "relu.*stands between"),
        (inner_value_read, "used by 2 nodes"),
        (layer_left_out, "not all equally often"),
        (other_stride, "stride"),
        (inner_padding, "bias"),
        (activation_for_layer, "ReLU is no convolution"),
    ],
)
def test_an_expansion_that_is_no_longer_one_layer_is_refused_with_the_reason(change: Any, reason: str) -> None:
    big = surgery(change)
    code = big.code
    with pytest.raises(ContractionError, match=rf"^0: .*{reason}"):
        fxexpand.contract(big)
    assert big.code == code


def test_contracting_needs_a_module() -> None:
    with pytest.raises(ContractionError, match=r"expected a torch\.nn\.Module, found dict"):
        fxexpand.contract({})  # type: ignore[arg-type]
