"""Constants knows what is computed of parameters and buffers alone, and its value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fusing import Layers, graph_of
from fxexpand.regions.constants import Constants
from fxexpand.regions.effects import Effects


def read(run: Callable[[Any, Tensor], Any]) -> tuple[Layers, Constants, dict[str, fx.Node]]:
    model = Layers(run)
    gm = graph_of(model)
    constants = Constants(gm, Effects(gm).changed())
    return model, constants, {node.name: node for node in gm.graph.nodes if node in constants}


def test_values_of_expressions() -> None:
    model, constants, found = read(lambda m, x: x * (m.scale.view(1, -1, 1, 1) * torch.sigmoid(m.gain)))
    assert set(found) == {"scale", "gain", "view", "sigmoid", "mul"}
    expected = model.get_parameter("scale").detach().view(1, -1, 1, 1) * torch.sigmoid(model.get_buffer("gain"))
    assert torch.equal(constants.value(found["mul"]), expected)
    assert not constants.value(found["mul"]).requires_grad
    assert {id(tensor) for tensor in constants.parameters(found["mul"])} == {id(model.scale), id(model.gain)}


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: x * torch.bernoulli(m.scale),
        lambda m, x: x * torch.nn.functional.dropout(m.scale, 0.5, training=True),
    ],
)
def test_what_is_drawn_is_no_constant(run: Callable[[Any, Tensor], Any]) -> None:
    _, _, found = read(run)
    assert set(found) <= {"scale"}


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: (m.gain.add_(1), x * m.gain)[1],
        lambda m, x: (m.gain.view(-1).add_(1), x * m.gain)[1],
        lambda m, x: (x * m.gain, m.gain.add_(1))[0],
    ],
)
def test_what_the_graph_changes_is_no_constant(run: Callable[[Any, Tensor], Any]) -> None:
    _, constants, found = read(run)
    assert not found
    assert not constants.changes(torch.zeros(1))


def test_a_tensor_that_shares_the_memory_of_a_changed_one() -> None:
    model = Layers(lambda m, x: (m.gain.add_(1), x * m.scale)[1])
    model.get_parameter("scale").data = model.get_buffer("gain")
    gm = graph_of(model)
    constants = Constants(gm, Effects(gm).changed())
    assert constants.changes(model.get_parameter("scale"))
    assert not any(node in constants for node in gm.graph.nodes)
