"""Effects tells where values change in place, and which values nobody else sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, fx, nn

from fusing import Layers, graph_of
from fxexpand.regions.effects import Effects


def effects_of(run: Callable[[Any, Tensor], Any]) -> tuple[Effects, dict[str, fx.Node]]:
    gm = graph_of(Layers(run))
    return Effects(gm), {node.name: node for node in gm.graph.nodes}


@pytest.mark.parametrize(
    ("run", "changed"),
    [
        (lambda m, x: m.conv(x).relu(), set()),
        (lambda m, x: m.conv(x).relu_(), {"conv", "relu_"}),
        (lambda m, x: m.conv(x).view(-1).relu_(), {"conv", "view", "relu_"}),
        (lambda m, x: x.mul_(m.scale), {"x", "mul_"}),
        (lambda m, x: m.gain.add_(1) * x, {"gain", "add_"}),
    ],
)
def test_what_is_changed_in_place(run: Callable[[Any, Tensor], Any], changed: set[str]) -> None:
    effects, _ = effects_of(run)
    assert {node.name for node in effects.changed() if node.op != "output"} == changed


def test_changes_between_two_nodes() -> None:
    def run(m: Any, x: Tensor) -> Any:
        a = m.conv(x)
        x.mul_(2)
        return a + m.other(x)

    effects, nodes = effects_of(run)
    x, conv, other, add = (nodes[name] for name in ("x", "conv", "other", "add"))
    assert effects.changes_between(x, conv, other) is nodes["mul_"]
    assert effects.changes_between(x, other, add) is None
    assert effects.changes_between(conv, conv, add) is None
    assert effects.outer_change_between(conv, other) is nodes["mul_"]
    assert effects.outer_change_between(other, add) is None


def test_inputs_may_share_memory_and_what_is_made_on_the_way_does_not() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor, view: Tensor) -> Tensor:
            a = self.conv(x)
            view[0].mul_(2)
            b = a.relu()
            b.add_(1)
            total: Tensor = b + a + x
            return total

    gm = fx.symbolic_trace(Two())
    effects, nodes = Effects(gm), {node.name: node for node in gm.graph.nodes}
    assert effects.changes_between(nodes["x"], nodes["conv"], nodes["add_1"]) is nodes["mul_"]
    assert effects.changes_between(nodes["x"], nodes["relu"], nodes["add_1"]) is None
    assert effects.outer_change_between(nodes["conv"], nodes["add_1"]) is nodes["mul_"]
    assert effects.outer_change_between(nodes["relu"], nodes["add_1"]) is None


@pytest.mark.parametrize(
    ("run", "node", "owned"),
    [
        (lambda m, x: m.conv(x).add_(1), "conv", True),
        (lambda m, x: m.conv(x).add_(1).mul_(2), "add_", True),
        (lambda m, x: m.conv(x).view(-1).add_(1), "view", True),
        (lambda m, x: x.add_(1), "x", False),
        (lambda m, x: x.view(-1).add_(1), "view", False),
        (lambda m, x: (lambda y: (y.add_(1), y))(m.conv(x)), "conv", False),
        (lambda m, x: m.scale.add_(1), "scale", False),
    ],
)
def test_who_may_change_a_value(run: Callable[[Any, Tensor], Any], node: str, owned: bool) -> None:
    effects, nodes = effects_of(run)
    assert effects.owns(nodes[node]) == owned
