"""Graphs that can surely be written as code, and those of which that is not known."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxexpand
from fxexpand.graph.plain import surely_has_code


def _graph(target: Any = torch.flatten, *more: Any, op: str = "call_function", **named: Any) -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x", type_expr=Tensor)
    graph.output(graph.create_node(op, target, (x, *more), named))
    return graph


@pytest.mark.parametrize(
    "graph",
    [
        _graph(torch.flatten, 1),
        _graph(operator.iadd, 1),
        _graph(F.relu, inplace=True),
        _graph("view", (1, -1), op="call_method"),
        _graph("layer1.0.conv", op="call_module"),
        _graph(torch.flatten, None, [1, (2,)]),
    ],
)
def test_plain_graphs_are_written_and_read(graph: fx.Graph) -> None:
    assert surely_has_code(graph)
    compile(graph.python_code("self").src, "graph", "exec")


_NO_KEYWORD: dict[str, Any] = {"in place": True}


def _other(_: object) -> None: ...


@pytest.mark.parametrize(
    "graph",
    [
        _graph(_other),
        _graph(lambda x: x),
        _graph("class", op="call_method"),
        _graph("layer.class", op="call_module"),
        _graph('layer."', op="call_module"),
        _graph(torch.flatten, 0.5),
        _graph(torch.flatten, "text"),
        _graph(torch.flatten, slice(1)),
        _graph(F.relu, **_NO_KEYWORD),
    ],
)
def test_of_other_graphs_nothing_is_known(graph: fx.Graph) -> None:
    assert not surely_has_code(graph)


class _Keyword(nn.Module):
    """Its graph cannot be written as code: no Python reads ``self.class``."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("class", nn.Conv2d(2, 2, 1))
        self.inner = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(getattr(self, "class")(x))
        return y


@pytest.mark.parametrize("run", [fxexpand.fuse, fxexpand.trace])
def test_what_cannot_be_written_keeps_its_forward(run: Callable[[nn.Module], nn.Module]) -> None:
    model, x = _Keyword().eval(), torch.randn(1, 2, 3, 3)
    out = run(model)
    assert not isinstance(out, fx.GraphModule)
    torch.testing.assert_close(out(x), model(x))


def test_a_graph_in_which_nothing_merges_is_compiled() -> None:
    out = fxexpand.fuse(nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU()))
    assert isinstance(out, fx.GraphModule)
    assert "forward" in vars(type(out))
    assert out.code == out.graph.python_code("self").src
