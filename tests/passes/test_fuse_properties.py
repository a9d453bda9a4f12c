"""What holds for ``fuse`` whatever the graph: drawn from linear nodes, joins and a few nonlinearities."""

from __future__ import annotations

from typing import Any, Literal

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, find, given, settings
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxexpand
from linear_graphs import Case, cases

When = Literal["cheaper", "always"]
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
_LAYER_CALLS = {
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("linear", "matmul", "mm", "addmm"),
}


class _Recorded(fx.Interpreter):
    """Runs a graph, and notes the largest magnitude of any value: what rounding is relative to."""

    largest = 0.0

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for tensor in _tensors(value):
            self.largest = max(self.largest, _largest(tensor))
        return value


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def assert_same_function(case: Case, fused: nn.Module, *inputs: Tensor) -> None:
    """That both return the same, and leave the same in their inputs, which some graphs change in place.

    The error is 1e-9 of each value, or what rounding leaves of a difference: 1e-12 of the largest value in the graph.
    """
    ours, theirs = [x.clone() for x in inputs], [x.clone() for x in inputs]
    run = _Recorded(case.graph)
    with torch.no_grad():
        expected = [*_tensors(run.run(*theirs)), *theirs]
        found = [*_tensors(fused(*ours)), *ours]
    assert len(found) == len(expected)
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert x.shape == y.shape, f"value {i}: expected shape {tuple(y.shape)}, found {tuple(x.shape)}"
        assert x.dtype == y.dtype
        allowed = 1e-9 * _largest(y) + 1e-12 * run.largest
        error = _largest(x - y)
        assert error <= allowed, f"value {i}: error {error:.1e} in values up to {_largest(y):.1e}"


def inputs_of_other_sizes(case: Case, more: tuple[int, int, int]) -> tuple[Tensor, ...] | None:
    """Longer inputs with as many axes, if the model runs on them."""
    shape = case.inputs[0].shape
    spatial = case.batched + 1
    longer = (*shape[:spatial], *(length + extra for length, extra in zip(shape[spatial:], more, strict=False)))
    inputs = tuple(torch.randn(longer, dtype=torch.float64) for _ in case.inputs)
    return inputs if _runs(case, inputs) else None


def _runs(case: Case, inputs: tuple[Tensor, ...]) -> bool:
    try:
        with torch.no_grad():
            fx.Interpreter(case.graph).run(*(x.clone() for x in inputs))  # a GraphModule prints what it raises
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
    return fxexpand.fuse(case.model, *(case.inputs if informed else ()), when=when)


both = pytest.mark.parametrize("when", ["cheaper", "always"])
extras = st.tuples(*[st.integers(0, 3)] * 3)


@both
@given(case=cases(), more=extras)
def test_with_example_inputs_it_keeps_the_function(when: When, case: Case, more: tuple[int, int, int]) -> None:
    fused = fuse(case, when, informed=True)
    assert_same_function(case, fused, *case.inputs)
    longer = inputs_of_other_sizes(case, more)
    if longer is not None:
        assert_same_function(case, fused, *longer)


@both
@given(case=cases(), more=extras)
def test_without_example_inputs_it_keeps_the_function(when: When, case: Case, more: tuple[int, int, int]) -> None:
    """And so for inputs of any number of axes that the model runs on; batch norm reads another axis of fewer axes."""
    fused = fuse(case, when, informed=False)
    assert_same_function(case, fused, *case.inputs)
    fewer = None if _norms(case.model) else tuple(x[0] for x in case.inputs)
    further = tuple(x[None] for x in case.inputs)
    for inputs in (inputs_of_other_sizes(case, more), fewer, further):
        if inputs is not None and _runs(case, inputs):
            assert_same_function(case, fused, *inputs)


@both
@given(case=cases(), informed=st.booleans())
def test_fusing_again_changes_nothing(when: When, case: Case, informed: bool) -> None:
    fused = fuse(case, when, informed=informed)
    again = fxexpand.fuse(fused, *(case.inputs if informed else ()), when=when)
    assert structure(again) == structure(fused)
    assert sorted(again.state_dict()) == sorted(fused.state_dict())  # copying a GraphModule may change the order


@given(case=cases())
def test_it_costs_no_more_than_before(case: Case) -> None:
    fused = fuse(case, "cheaper", informed=True)
    assert macs(fused, case) <= macs(case.model, case)


@both
@given(case=cases(), informed=st.booleans())
def test_it_leaves_no_more_layers_than_before(when: When, case: Case, informed: bool) -> None:
    assert layer_calls(fuse(case, when, informed=informed)) <= layer_calls(case.model)


@both
@given(case=cases(), informed=st.booleans())
def test_the_model_stays_as_it_was_and_shares_nothing(when: When, case: Case, informed: bool) -> None:
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    code, nodes = case.graph.code, list(case.graph.graph.nodes)
    modules = [(path, type(module), module.training) for path, module in case.model.named_modules()]
    fused = fuse(case, when, informed=informed)

    after = case.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert (case.graph.code, list(case.graph.graph.nodes)) == (code, nodes)
    assert [(path, type(module), module.training) for path, module in case.model.named_modules()] == modules
    assert not (_memory(case.model) & _memory(fused))
    assert not any(module.training for module in fused.modules())


def _memory(model: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}


@given(case=cases(), informed=st.booleans())
def test_explain_gives_nodes_and_reasons(case: Case, informed: bool) -> None:
    explanation = fxexpand.explain(case.model, *(case.inputs if informed else ()))
    assert all(entry.nodes for entry in explanation.merged)
    assert all(entry.nodes and entry.reason for entry in explanation.refused)
    merged = [node for entry in explanation.merged for node in entry.nodes]
    assert len(merged) <= len(list(case.graph.graph.nodes)), "a node is merged twice"
    assert str(explanation)


def test_the_drawn_graphs_have_much_to_fuse() -> None:
    """Else the properties above would hold for a pass that does nothing."""
    searching = settings(max_examples=2000, database=None, phases=[Phase.generate])  # any will do, however large

    def shrinks(case: Case) -> bool:
        fused = fuse(case, "cheaper", informed=True)
        branched = any(len(node.users) > 1 for node in case.graph.graph.nodes)
        return branched and layer_calls(fused) <= layer_calls(case.model) - 2

    assert layer_calls(find(cases(), shrinks, settings=searching).model) >= 3

    def folds(case: Case) -> bool:
        return _norms(case.model) > _norms(fuse(case, "cheaper", informed=True))

    folded = find(cases(), folds, settings=searching)
    assert _norms(folded.model) >= 1


def _norms(model: nn.Module) -> int:
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    called = [gm.get_submodule(str(n.target)) for gm in _graphs(model) for n in gm.graph.nodes if n.op == "call_module"]
    calls = sum(node.target is F.batch_norm for gm in _graphs(model) for node in gm.graph.nodes)
    return calls + sum(isinstance(module, norms) for module in called)
