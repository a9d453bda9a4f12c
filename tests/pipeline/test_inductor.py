"""The pass in Inductor's hook: what it does to a graph, what it leaves alone, and what the caches know it by."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx

import fxexpand
from fxexpand import CL, FC, CollapsePass, ContractPass, ExpandPass, FusePass, FxExpandError, Rule, layer
from fxexpand.graph.collapsed import Collapsed
from fxexpand.pipeline.collapse_graph import collapse_graph
from fxexpand.pipeline.inductor import InductorPass

X = torch.randn(2, 4, 8, 8)


@pytest.fixture
def inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inductor with empty caches, of which only the one of graphs is on.

    The tests compile products of matrices only: these it leaves to torch, and needs no C++ compiler.
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


def expanded() -> fx.GraphModule:
    chain = [nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 1)]
    found = fxexpand.trace(fxexpand.expand(nn.Sequential(*chain), Rule(CL(2), where=layer("0"))))
    assert isinstance(found, fx.GraphModule)
    return found


def without_relu(gm: fx.GraphModule) -> fx.GraphModule | None:
    """What the seam takes: the graph computed otherwise with what it has, or None."""
    if not gm.graph.find_nodes(op="call_function", target=F.relu):
        return None
    found = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    for node in found.graph.find_nodes(op="call_function", target=F.relu):
        node.replace_all_uses_with(node.args[0])
        found.graph.erase_node(node)
    return found


def in_place(given: Any, model: nn.Module) -> tuple[Any, fx.GraphModule]:
    """``model`` compiled by Dynamo with the pass on the graph that autograd has not seen, and that graph module."""
    seen: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Any:
        nodes = gm.graph.find_nodes(op="placeholder")
        InductorPass(given)(gm.graph)
        assert gm.graph.find_nodes(op="placeholder") == nodes
        seen.append(gm)
        return gm.forward

    torch._dynamo.reset()
    output = torch.compile(model, backend=backend)(X)
    (gm,) = seen
    return output, gm


class Chain(nn.Module):
    """Layers, and what is linear without any."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(F.avg_pool2d(F.avg_pool2d(x * 2, 2, 1) * 3, 2, 1))))


def test_no_parameter_of_a_compiled_graph_is_frozen() -> None:
    model = Chain()
    output, gm = in_place(CollapsePass(), model)
    torch.testing.assert_close(output, model(X))
    assert not [*gm.parameters(), *gm.buffers()]
    assert len(gm.graph.find_nodes(op="call_function", target=torch.conv2d)) == 2


def test_a_function_that_is_handed_in_rewrites_the_graph() -> None:
    model = Chain()
    output, gm = in_place(without_relu, model)
    assert not gm.graph.find_nodes(op="call_function", target=F.relu)
    assert (output < 0).any()
    torch.testing.assert_close(F.relu(output), model(X))


def test_attributes_are_collapsed_in_place() -> None:
    model = expanded()
    same, graph, names = copy.deepcopy(model), model.graph, list(model.state_dict())
    InductorPass(CollapsePass())(graph)
    assert model.graph is graph
    assert list(model.state_dict()) == names
    called = [model.get_submodule(str(node.target)) for node in graph.find_nodes(op="call_module")]
    assert [type(module).__name__ for module in called] == ["CollapsedChain", "ReLU", "LiveRegion"]
    for other in (model, same):
        with torch.no_grad():
            other.get_parameter("0.kernel.weight").mul_(2)
        other(X).square().mean().backward()
    torch.testing.assert_close(model(X), same(X))
    for name, parameter in same.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)
    code = model.code
    InductorPass(CollapsePass())(graph)
    assert model.code == code


def test_inductor_compiles_what_was_collapsed(inductor: None) -> None:
    model = fxexpand.trace(fxexpand.expand(nn.Sequential(nn.Linear(8, 8, bias=False)), FC(2, depth=3)))
    assert isinstance(model, fx.GraphModule)
    same = copy.deepcopy(model)
    with torch.no_grad(), config.patch(pre_grad_custom_pass=InductorPass(CollapsePass())):
        compiled: Any = compile_fx(model, [X])
        assert isinstance(model.get_submodule("0"), Collapsed)
        for _ in range(2):
            torch.testing.assert_close(compiled(X), same(X))
            for other in (model, same):
                other.get_parameter("0.linear_0.weight").mul_(2)  # the compiled code has to see it


def test_the_cache_of_graphs_knows_the_pass(inductor: None) -> None:
    def hits_and_misses(given: Any) -> tuple[int, int]:
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(torch.mm, options={"pre_grad_custom_pass": InductorPass(given)})
        compiled(X[0, 0], X[0, 0])
        found = counters["inductor"]
        return found["fxgraph_cache_hit"], found["fxgraph_cache_miss"]

    assert hits_and_misses(CollapsePass()) == (0, 1)
    assert hits_and_misses(CollapsePass()) == (1, 0)
    assert hits_and_misses(CollapsePass(lifts={})) == (0, 1)


def test_its_key_is_that_of_what_it_runs() -> None:
    found = [
        InductorPass(CollapsePass()).uuid(),
        InductorPass(CollapsePass(lifts={})).uuid(),
        InductorPass(fxexpand.trace).uuid(),  # type: ignore[arg-type]  # any function of the library's
        CollapsePass().uuid(),
    ]
    assert None not in found
    assert len(set(found)) == len(found)
    assert InductorPass(CollapsePass()).uuid() == found[0]
    assert InductorPass(without_relu).uuid() is None
    assert InductorPass(CollapsePass(lifts={nn.ReLU: lambda m: None})).uuid() is None  # type: ignore[dict-item,return-value]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (FusePass(), "found FusePass, which replaces parameters"),
        (ContractPass(), "found ContractPass"),
        (ExpandPass(CL(2)), "found ExpandPass"),
        (CollapsePass(X), "without example inputs"),
        ("collapse", "found 'collapse'"),
    ],
)
def test_a_pass_that_a_compiled_graph_cannot_take_is_refused(given: Any, message: str) -> None:
    with pytest.raises(FxExpandError, match=message):
        InductorPass(given)


def test_a_rewrite_that_breaks_its_word_is_refused() -> None:
    model = expanded()
    code = model.code
    other_inputs = fx.symbolic_trace(nn.Bilinear(2, 2, 2))
    cases: list[tuple[Any, str]] = [
        (lambda gm: 1, "a torch.fx.GraphModule or None, found 1"),
        (fxexpand.contract, "same parameters, found others: 0.bias"),
        (lambda gm: other_inputs, "same inputs, found others: input, input1, input2"),
    ]
    for rewrite, message in cases:
        with pytest.raises(FxExpandError, match=message):
            InductorPass(rewrite)(model.graph)
    with pytest.raises(FxExpandError, match="none owns"):
        InductorPass(CollapsePass())(fx.Graph())
    assert model.code == code


def test_a_graph_of_aten_operators_is_refused() -> None:
    gm = torch.export.export(nn.Conv2d(4, 4, 3), (X,)).graph_module
    with pytest.raises(FxExpandError, match=r"ATen operators \(aten.conv2d.default\)"):
        InductorPass(CollapsePass())(gm.graph)


@pytest.mark.usefixtures("inductor")
def test_regions_of_captured_graphs_are_composed_in_the_hook() -> None:
    hook = InductorPass(collapse_graph)
    assert hook.uuid() == InductorPass(collapse_graph).uuid() is not None
    seen: list[int] = []

    def counted(graph: fx.Graph) -> None:
        hook(graph)
        seen.append(sum(node.target is torch.nn.functional.linear for node in graph.nodes))

    model, x = nn.Sequential(nn.Linear(32, 128), nn.Linear(128, 32)), torch.randn(512, 32)
    with config.patch(pre_grad_custom_pass=counted):
        fast = torch.compile(model)
        assert torch.allclose(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert seen == [1]
