"""Editing a graph changes the nodes that an edit names, keeps every other, and gives the same result every time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxexpand
from behaviour import DOUBLE, X, linear
from fxexpand import CL, FC, trace
from fxexpand.graph.rewrite import Edit, FunctionStep, ModuleStep, rewrite, source_of


class Net(nn.Module):
    """A layer, a functional call, and steps that are there for their effects only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linear(), linear()
        self.new = nn.Sequential(linear(), linear())
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4, **DOUBLE)), nn.Parameter(torch.randn(4, **DOUBLE))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("unused", torch.zeros(()))
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        y = F.linear(self.second(self.first(x)), self.weight, self.bias)
        torch._assert(y.shape[0] > 0, "an empty batch")
        return y


def traced() -> fx.GraphModule:
    result = trace(Net())
    assert isinstance(result, fx.GraphModule)
    return result


def node(gm: fx.GraphModule, name: str) -> fx.Node:
    found: fx.Node = next(n for n in gm.graph.nodes if n.name == name)
    return found


def names(gm: fx.GraphModule) -> list[str]:
    return [n.name for n in gm.graph.nodes]


def test_a_node_becomes_its_steps_and_everything_else_stays() -> None:
    gm: Any = traced()
    before = names(gm)
    rewrite([Edit(gm, (node(gm, "first"),), (ModuleStep("new.0"), ModuleStep("new.1")))])
    gm.graph.lint()
    position = before.index("first")
    assert names(gm) == [*before[:position], "new_0", "new_1", *before[position + 1 :]]
    y = F.linear(gm.second(gm.new[1](gm.new[0](X))), gm.weight, gm.bias)
    assert torch.equal(gm(X), y)
    assert gm.calls == 1


def test_layers_one_after_another_become_one_step() -> None:
    gm: Any = traced()
    rewrite([Edit(gm, (node(gm, "first"), node(gm, "second")), (ModuleStep("new"),))])
    assert "first" not in names(gm)
    assert "second" not in names(gm)
    assert node(gm, "new").args == (node(gm, "x"),)
    assert torch.equal(gm(X), F.linear(gm.new(X), gm.weight, gm.bias))


def test_reads_of_attributes_that_nothing_uses_any_more_go_and_effects_stay() -> None:
    gm: Any = traced()
    reads = [n.target for n in gm.graph.nodes if n.op == "get_attr"]
    assert reads == ["calls", "weight", "bias"]
    rewrite([Edit(gm, (node(gm, "linear"),), (ModuleStep("new"),))])
    assert [n.target for n in gm.graph.nodes if n.op == "get_attr"] == ["calls"]
    unused = [n.name for n in gm.graph.nodes if not n.users and n.op != "output"]
    assert unused == ["add_", "_assert"]
    gm(X)
    assert gm.calls == 1
    with pytest.raises(AssertionError, match="an empty batch"):
        gm(X[:0])


def test_a_read_that_something_else_uses_stays() -> None:
    gm: Any = traced()
    output = node(gm, "output")
    with gm.graph.inserting_before(output):
        output.args = ((output.args[0], gm.graph.call_function(torch.sum, (node(gm, "weight"),))),)
    rewrite([Edit(gm, (node(gm, "linear"),), (ModuleStep("new"),))])
    assert [n.target for n in gm.graph.nodes if n.op == "get_attr"] == ["calls", "weight"]
    assert torch.equal(gm(X)[1], gm.weight.sum())


def test_a_module_becomes_a_function_of_attributes() -> None:
    gm: Any = traced()
    step = FunctionStep(F.linear, ("weight", None), ())
    rewrite([Edit(gm, (node(gm, "first"),), (step,))])
    y = F.linear(gm.second(F.linear(X, gm.weight)), gm.weight, gm.bias)
    assert torch.equal(gm(X), y)


def test_settings_of_a_function_are_passed_by_name() -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv1d(2, 2, 3, padding=2, stride=2, **DOUBLE)
            self.weight = nn.Parameter(torch.randn(2, 2, 3, **DOUBLE))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y

    gm: Any = trace(Conv())
    step = FunctionStep(F.conv1d, ("weight", "layer.bias"), (("padding", 2), ("stride", (2,))))
    rewrite([Edit(gm, (node(gm, "layer"),), (step,))])
    x = torch.randn(1, 2, 7, **DOUBLE)
    assert torch.equal(gm(x), F.conv1d(x, gm.weight, gm.layer.bias, stride=2, padding=2))
    assert node(gm, "conv1d").kwargs == {"padding": 2, "stride": (2,)}


def test_edits_next_to_each_other_read_what_the_one_before_has_made() -> None:
    gm: Any = traced()
    edits = [
        Edit(gm, (node(gm, "first"),), (ModuleStep("new.0"),)),
        Edit(gm, (node(gm, "second"),), (ModuleStep("new.1"),)),
    ]
    rewrite(edits)
    assert torch.equal(gm(X), F.linear(gm.new(X), gm.weight, gm.bias))


def test_what_is_known_of_a_value_goes_to_the_node_that_gives_it_now() -> None:
    gm: Any = traced()
    old = node(gm, "first")
    old.meta |= {"val": "the value", "tensor_meta": "its shape", "source": "line 3", "custom": {"a": 1}}
    before = dict(old.meta)
    rewrite([Edit(gm, (old,), (ModuleStep("new.0"), ModuleStep("new.1")))])
    assert node(gm, "new_1").meta == before
    assert node(gm, "new_0").meta == {k: v for k, v in before.items() if k not in ("val", "tensor_meta")}
    assert node(gm, "x").meta.get("val") is None


def test_an_input_that_is_given_by_name_is_found() -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.new = linear(), linear()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(input=x)
            return y

    gm: Any = trace(ByName())
    assert source_of(node(gm, "layer")) is node(gm, "x")
    rewrite([Edit(gm, (node(gm, "layer"),), (ModuleStep("new"),))])
    assert torch.equal(gm(X), gm.new(X))


def test_a_layer_that_is_applied_to_no_node_is_an_error_that_names_it() -> None:
    gm = traced()
    node(gm, "first").args = (3,)
    with pytest.raises(TypeError, match=r"first.*expected a layer applied to a node, found 3"):
        rewrite([Edit(gm, (node(gm, "first"),), (ModuleStep("new"),))])


def test_no_edits_change_nothing() -> None:
    gm = traced()
    code = gm.code
    rewrite([])
    assert gm.code == code


def test_two_runs_give_the_same_names_and_the_same_code() -> None:
    model = nn.Sequential(Net(), nn.Tanh(), Net())
    runs = [fxexpand.expand(copy.deepcopy(model), [CL(2), FC(2)], init="standard") for _ in range(2)]
    assert isinstance(runs[0], fx.GraphModule)
    assert isinstance(runs[1], fx.GraphModule)
    assert names(runs[0]) == names(runs[1])
    assert runs[0].code == runs[1].code
    assert "_0_first_linear_0" in names(runs[0])


def test_going_there_and_back_gives_the_graph_of_before() -> None:
    gm: Any = trace(nn.Sequential(linear(), nn.Tanh(), linear()))
    back: Any = fxexpand.contract(fxexpand.expand(gm, FC(2)))
    assert [(n.op, n.target, n.name) for n in back.graph.nodes] == [(n.op, n.target, n.name) for n in gm.graph.nodes]
