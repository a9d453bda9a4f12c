"""The passes in torch.fx's PassManager: what they give, when they are done, and what their errors say."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager, pass_result_wrapper, this_before_that_pass_constraint
from torch.fx.passes.shape_prop import ShapeProp
from torch.fx.passes.utils.common import compare_graphs

import fxexpand
from fxexpand import (
    CL,
    FC,
    ACNet,
    CollapsePass,
    ContractionError,
    ContractPass,
    ExpandPass,
    ExpansionError,
    FusePass,
    FxExpandError,
    RepVGG,
    Rule,
    RuleError,
    layer,
)
from fxexpand.graph.collapsed import Collapsed
from fxexpand.strategies import Strategy
from fxexpand.testing import Case, networks
from fxexpand.testing.untouched import Untouched

X = torch.randn(2, 4, 9, 9, dtype=torch.float64)


class Net(nn.Module):
    """Branches, a chain without nonlinearity, a functional call, and a part whose control flow depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.point, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.weight = nn.Parameter(torch.randn(6, 4, 3, 3))
        self.last, self.part = nn.Conv2d(6, 4, 3), Part()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.wide(x) + self.point(x) + x))
        y: Tensor = self.part(self.last(F.conv2d(x, self.weight)))
        return y


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x)) if x.sum() > 0 else self.down(self.up(-x))
        return y


def net(*, training: bool = False) -> fx.GraphModule:
    found = fxexpand.trace(Net().double().train(training))
    assert isinstance(found, fx.GraphModule)
    return found


PIPELINES: dict[str, list[Any]] = {
    "expand": [ExpandPass([CL(2), FC(2)])],
    "expand where": [ExpandPass(Rule(CL(2), where=layer()))],
    "expand again": [ExpandPass(CL(2).then(ACNet()))],
    "two rules": [ExpandPass(Rule(CL(2), where=layer("w*"))), ExpandPass([Rule(CL(3), where=layer("last")), FC(2)])],
    "collapse": [CollapsePass()],
    "collapse for": [ExpandPass(CL(2)), CollapsePass(X)],
    "train": [ExpandPass(CL(2)), CollapsePass()],
    "fuse": [FusePass()],
    "fuse all": [FusePass(X, when="always"), CollapsePass(), ContractPass()],
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("passes", PIPELINES.values(), ids=PIPELINES)
@pytest.mark.filterwarnings("ignore:fuse. batch norm in training mode")
def test_a_second_run_finds_nothing_to_do(passes: list[Any], *, training: bool) -> None:
    model = net(training=training)
    before = Untouched.of(model)
    found = PassManager(passes, steps=2, run_checks_after_each_pass=True)(model)
    before.check(model, str(passes))
    assert found.modified
    assert found.graph_module is not model
    assert not compare_graphs(model.graph, found.graph_module.graph)
    assert fxexpand.verify(model, found.graph_module, X, rtol=1e-10) < 1e-10
    again = PassManager(passes, steps=5)(found.graph_module)
    assert not again.modified
    assert again.graph_module is found.graph_module


@given(networks())
@settings(max_examples=15)
def test_fuse_has_modified_what_explain_says_it_merges(case: Case) -> None:
    model = fxexpand.trace(case.module.eval())
    found = PassManager([FusePass()])(model)
    assert found.modified == bool(fxexpand.explain(model).merged)
    assert (found.graph_module is not model) == found.modified
    assert not PassManager([FusePass()])(found.graph_module).modified


def test_training_and_back_is_one_pipeline() -> None:
    model = net(training=True)
    fast = PassManager([ExpandPass(CL(2)), CollapsePass()])(model).graph_module
    assert sum(isinstance(module, Collapsed) for module in fast.modules()) == 4
    fast(X).square().mean().backward()
    assert all(p.grad is not None for p in fast.parameters())
    found = PassManager([ContractPass(), FusePass()])(fast.eval())
    small = PassManager([ContractPass()])(fast).graph_module
    model.load_state_dict(small.state_dict(), strict=True)
    assert found.modified
    assert len(found.graph_module.graph.nodes) < len(model.graph.nodes)
    assert fxexpand.verify(model.eval(), found.graph_module, X) < 1e-10


def test_constraints_put_the_passes_in_order() -> None:
    fuse, contract, expand = FusePass(), ContractPass(), ExpandPass(CL(2))
    order = [this_before_that_pass_constraint(expand, contract), this_before_that_pass_constraint(contract, fuse)]
    manager = PassManager([fuse, contract, expand], constraints=order)
    assert manager(net()).modified
    assert manager.passes == [expand, contract, fuse]
    with pytest.raises(
        RuntimeError, match=r"Expected ContractPass\(\) before ExpandPass\(CL\(rate=2, keep_input=False\)\)"
    ):
        PassManager([contract, expand], constraints=order).validate_constraints()


def test_other_passes_stand_between() -> None:
    def shapes(gm: fx.GraphModule) -> PassResult:
        ShapeProp(gm).propagate(X)
        return PassResult(gm, modified=False)

    found = PassManager([FusePass(), pass_result_wrapper(shapes)])(net())
    assert all("tensor_meta" in n.meta for n in found.graph_module.graph.nodes if n.op == "call_module")


def test_nothing_to_do_is_no_error() -> None:
    model = fxexpand.trace(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()))
    for kind in (CollapsePass(), ContractPass(), FusePass()):
        found = PassManager([kind])(model)
        assert not found.modified
        assert found.graph_module is model


def test_a_model_that_its_manifest_describes_is_left_alone() -> None:
    model = net()
    big = fxexpand.expand(model, [CL(2), FC(2)])
    given = json.loads(json.dumps(fxexpand.manifest(big)))
    manager = PassManager([ExpandPass(given)], steps=3)
    found = manager(model)
    assert list(found.graph_module.state_dict()) == list(big.state_dict())
    assert not manager(big).modified


def raised(passes: list[Any], model: nn.Module) -> BaseException:
    """What the user sees under torch's own message."""
    with pytest.raises(Exception, match=f"running the '{type(passes[-1]).__name__}' pass") as caught:
        PassManager(passes)(model)
    assert caught.value.__cause__ is not None
    return caught.value.__cause__


def test_an_error_says_what_the_function_says() -> None:
    model = net()
    vain = Rule(CL(2), where=layer("nowhere"))
    cases: list[list[Rule | Strategy]] = [[vain], [CL(2), vain]]
    for rules in cases:
        with pytest.raises(RuleError) as expected:
            fxexpand.expand(model, rules)
        error = raised([ExpandPass(rules)], model)
        assert (type(error), str(error)) == (RuleError, str(expected.value))
    big = fxexpand.expand(model, CL(2))
    assert isinstance(raised([ExpandPass([CL(2), Rule(FC(2), where=layer("nowhere"))])], big), RuleError)
    assert isinstance(raised([FusePass(X, X, X)], model), FxExpandError)
    assert isinstance(raised([ContractPass()], fxexpand.counterpart(big, nn.ReLU)), ContractionError)
    normed = fxexpand.expand(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()), RepVGG(batch_norm=True))
    assert "batch norm" in str(raised([CollapsePass()], fxexpand.trace(normed.train())))


def test_an_expansion_that_was_taken_apart_is_not_expanded_again() -> None:
    big = fx.Transformer(PassManager([ExpandPass(CL(2))])(net()).graph_module).transform()
    for kind in (ExpandPass(Rule(CL(2), where=layer())), ContractPass()):
        assert "found outside of one" in str(raised([kind], big))


def test_what_is_no_graph_of_layers_is_refused() -> None:
    assert "Give fxexpand.trace(model)" in str(raised([FusePass()], Net()))
    program = torch.export.export(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)), (X.float(),))
    for gm in (program.module(), program.graph_module):
        for kind in (ExpandPass(CL(2)), CollapsePass(), ContractPass(), FusePass()):
            assert "aten.conv2d.default" in str(raised([kind], gm))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: ExpandPass([]), RuleError),
        (lambda: ExpandPass({"format": 1}), RuleError),
        (lambda: ExpandPass(CL(2), init="zero"), ExpansionError),
        (lambda: FusePass(when="never"), FxExpandError),
        (lambda: FusePass(lifts=[nn.ReLU]), FxExpandError),  # type: ignore[arg-type]
        (lambda: CollapsePass(lifts={nn.ReLU: 1}), FxExpandError),  # type: ignore[dict-item]
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(make: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        make()
