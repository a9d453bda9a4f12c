"""What holds for ``fuse`` whatever the graph: drawn from linear nodes, joins and a few nonlinearities."""

from __future__ import annotations

import operator
from typing import Literal

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, find, given, settings
from torch import Tensor, fx, nn

import fxexpand
from fxexpand.testing import Case, assert_equivalent, linear_graphs

When = Literal["cheaper", "always"]
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
_FEATURE_CALLS = {"linear", "matmul", "mm", "addmm"}
_LAYER_CALLS = _FEATURE_CALLS | {
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
}


def graph_in(case: Case) -> fx.GraphModule:
    """The graph of a case: its module, or the only module in that."""
    (gm,) = (module for module in case.module.modules() if isinstance(module, fx.GraphModule))
    return gm


def inputs_of_other_sizes(case: Case, more: tuple[int, int, int]) -> tuple[Tensor, ...] | None:
    """Longer inputs with as many axes, if the model runs on them."""
    shape = case.inputs[0].shape
    longer = (*shape[:2], *(length + extra for length, extra in zip(shape[2:], more, strict=False)))
    inputs = tuple(torch.randn(longer, dtype=torch.float64) for _ in case.inputs)
    return inputs if _runs(case, inputs) else None


def _runs(case: Case, inputs: tuple[Tensor, ...]) -> bool:
    return _takes(graph_in(case), inputs)


def _takes(gm: fx.GraphModule, inputs: tuple[Tensor, ...]) -> bool:
    try:
        with torch.no_grad():
            fx.Interpreter(gm).run(*(x.clone() for x in inputs))  # a GraphModule prints what it raises
    except (RuntimeError, ValueError, IndexError):
        return False
    return True


def layer_calls(model: nn.Module) -> int:
    """How many nodes of the graphs in ``model`` are convolutions or linear layers."""
    return sum(_is_layer_call(gm, node) for gm in _graphs(model) for node in gm.graph.nodes)


def _is_layer_call(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(gm.get_submodule(str(node.target)), _LAYERS)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op.startswith("call_") and name in _LAYER_CALLS


def structure(model: nn.Module) -> list[list[tuple[str, object]]]:
    return [[(node.op, node.target) for node in gm.graph.nodes] for gm in _graphs(model)]


def _graphs(model: nn.Module) -> list[fx.GraphModule]:
    return [module for module in model.modules() if isinstance(module, fx.GraphModule)]


def macs(model: nn.Module, case: Case) -> int:
    found = fxexpand.summary(model, *case.inputs).macs
    assert found is not None
    return found


def fuse(case: Case, when: When, *, informed: bool) -> nn.Module:
    return fxexpand.fuse(case.module, *(case.inputs if informed else ()), when=when)


both = pytest.mark.parametrize("when", ["cheaper", "always"])
extras = st.tuples(*[st.integers(0, 3)] * 3)


@both
@given(case=linear_graphs(), more=extras)
def test_with_example_inputs_it_keeps_the_function(when: When, case: Case, more: tuple[int, int, int]) -> None:
    """Also for longer signals. Where a linear layer reads some features of its input, other than the example's number
    of them may be an error, but no other numbers.
    """
    fused = fuse(case, when, informed=True)
    assert_equivalent(case.module, fused, *case.inputs)
    longer = inputs_of_other_sizes(case, more)
    if longer is not None and not (_picks_features(case) and not all(_takes(gm, longer) for gm in _graphs(fused))):
        assert_equivalent(case.module, fused, *longer)


def _calls_conv1d(case: Case) -> bool:
    gm = graph_in(case)
    modules = [gm.get_submodule(str(node.target)) for node in gm.graph.find_nodes(op="call_module")]
    return any(isinstance(module, nn.Conv1d) for module in modules) or any(
        getattr(node.target, "__name__", "") == "conv1d" for node in gm.graph.nodes
    )


def _picks_features(case: Case) -> bool:
    """Whether a linear layer may read some of its input's features only, so that their number is the example's."""
    gm = graph_in(case)
    picks = any(node.target in (operator.getitem, torch.narrow) for node in gm.graph.nodes)
    return picks and _reads_features(gm)


def _reads_features(gm: fx.GraphModule) -> bool:
    modules = [gm.get_submodule(str(node.target)) for node in gm.graph.find_nodes(op="call_module")]
    return any(isinstance(module, nn.Linear) for module in modules) or any(
        getattr(node.target, "__name__", "") in _FEATURE_CALLS for node in gm.graph.nodes
    )


@both
@given(case=linear_graphs(), more=extras)
def test_without_example_inputs_it_keeps_the_function(when: When, case: Case, more: tuple[int, int, int]) -> None:
    """And so for inputs of any number of axes that the model runs on; batch norm reads another axis of fewer axes.

    Beside a ``Conv1d`` it is taken to see batches, which no input of two axes holds.
    """
    fused = fuse(case, when, informed=False)
    fewer = None if _norms(case.module) else tuple(x[0] for x in case.inputs)
    further = tuple(x[None] for x in case.inputs)
    unbatched = case.inputs[0].dim() == 2 and _norms(case.module) and _calls_conv1d(case)
    if not unbatched:
        assert_equivalent(case.module, fused, *case.inputs)
    for inputs in (further,) if unbatched else (inputs_of_other_sizes(case, more), fewer, further):
        if inputs is not None and _runs(case, inputs):
            assert_equivalent(case.module, fused, *inputs)


@both
@given(case=linear_graphs(), informed=st.booleans())
def test_fusing_again_changes_nothing(when: When, case: Case, informed: bool) -> None:
    fused = fuse(case, when, informed=informed)
    again = fxexpand.fuse(fused, *(case.inputs if informed else ()), when=when)
    assert structure(again) == structure(fused)
    assert sorted(again.state_dict()) == sorted(fused.state_dict())  # copying a GraphModule may change the order


@given(case=linear_graphs())
def test_it_costs_no_more_than_before(case: Case) -> None:
    fused = fuse(case, "cheaper", informed=True)
    assert macs(fused, case) <= macs(case.module, case)


@both
@given(case=linear_graphs(), informed=st.booleans())
def test_it_leaves_no_more_layers_than_before(when: When, case: Case, informed: bool) -> None:
    assert layer_calls(fuse(case, when, informed=informed)) <= layer_calls(case.module)


@both
@given(case=linear_graphs(), informed=st.booleans())
def test_the_model_stays_as_it_was_and_shares_nothing(when: When, case: Case, informed: bool) -> None:
    before = {name: tensor.clone() for name, tensor in case.module.state_dict().items()}
    code, nodes = graph_in(case).code, list(graph_in(case).graph.nodes)
    modules = [(path, type(module), module.training) for path, module in case.module.named_modules()]
    fused = fuse(case, when, informed=informed)

    after = case.module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert (graph_in(case).code, list(graph_in(case).graph.nodes)) == (code, nodes)
    assert [(path, type(module), module.training) for path, module in case.module.named_modules()] == modules
    assert not (_memory(case.module) & _memory(fused))
    assert not any(module.training for module in fused.modules())


def _memory(model: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}


@given(case=linear_graphs(), informed=st.booleans())
def test_explain_gives_nodes_and_reasons(case: Case, informed: bool) -> None:
    explanation = fxexpand.explain(case.module, *(case.inputs if informed else ()))
    assert all(entry.nodes for entry in explanation.merged)
    assert all(entry.nodes and entry.reason for entry in explanation.refused)
    merged = [node for entry in explanation.merged for node in entry.nodes]
    assert len(merged) <= len(list(graph_in(case).graph.nodes)), "a node is merged twice"
    assert str(explanation)


def test_the_drawn_graphs_have_much_to_fuse() -> None:
    """Else the properties above would hold for a pass that does nothing."""
    searching = settings(max_examples=10_000, database=None, phases=[Phase.generate])  # any will do, however large

    def shrinks(case: Case) -> bool:  # of some five hundred that are drawn, one
        fused = fuse(case, "cheaper", informed=True)
        branched = any(len(node.users) > 1 for node in graph_in(case).graph.nodes)
        return branched and layer_calls(fused) <= layer_calls(case.module) - 2

    assert layer_calls(find(linear_graphs(), shrinks, settings=searching).module) >= 3

    def folds(case: Case) -> bool:
        return _norms(case.module) > _norms(fuse(case, "cheaper", informed=True))

    folded = find(linear_graphs(), folds, settings=searching)
    assert _norms(folded.module) >= 1


def _norms(model: nn.Module) -> int:
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    called = [gm.get_submodule(str(n.target)) for gm in _graphs(model) for n in gm.graph.nodes if n.op == "call_module"]
    calls = sum(node.target is F.batch_norm for gm in _graphs(model) for node in gm.graph.nodes)
    return calls + sum(isinstance(module, norms) for module in called)
