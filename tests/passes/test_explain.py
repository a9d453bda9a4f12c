"""explain says what fuse merges, what it has merged, and why the rest is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxexpand
from fusing import Layers, randomised
from fxexpand import CL, explain
from fxexpand.regions.explanation import Explanation, Merged, Refused


def reasons(found: Explanation) -> dict[str, str]:
    return {name: entry.reason for entry in found.refused for name in entry.nodes}


def test_an_entry_for_each_merge_and_each_node_left_alone() -> None:
    model = Layers(lambda m, x: m.point(m.bn(m.conv(x)).relu()).relu())
    found = explain(model)
    assert [(entry.path, entry.nodes) for entry in found.merged] == [("conv", ("conv", "bn"))]
    assert list(reasons(found)) == ["point"]
    assert "between relu and relu_1" in reasons(found)["point"]


@pytest.mark.parametrize(
    ("run", "node", "words"),
    [
        (lambda m, x: m.point(m.conv(x).relu()) + x, "add", ["branches is not linear", "relu"]),
        (lambda m, x: (m.bn(m.conv(x)), m.conv(x).sum()), "conv", ["nothing linear"]),
        (lambda m, x: (m.other(x), m.bn(m.other(x).tanh())), "bn", ["nothing linear", "tanh"]),
    ],
)
def test_why_a_node_is_left_alone(run: Callable[[Any, Tensor], Any], node: str, words: list[str]) -> None:
    found = reasons(explain(Layers(run)))
    assert all(word in found[node] for word in words), found


def test_a_value_that_is_used_elsewhere_keeps_its_neighbours_apart() -> None:
    def run(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.conv(x)
        return m.bn(y), y

    found = reasons(explain(Layers(run)))
    assert "output" in found["bn"]
    assert "bn" in found["conv"]
    assert "used by 2 nodes" in found["conv"]


def test_what_batch_norm_in_training_mode_holds_up() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    found = explain(model)
    assert str(found.refused[1]) == "1 (BatchNorm2d): training mode; call model.eval() first"
    assert "1 (BatchNorm2d), beside it, is left alone: training mode" in reasons(found)["0"]


def test_what_would_cost_more() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 64, 1))
    message = '0 -> 1: one kernel would cost 7.9 times the MACs; when="always" merges it'  # 8·9·64 / (8·9 + 8·64)
    assert reasons(explain(model)) == {"0": message, "1": message}
    (merge,) = explain(model, torch.randn(1, 8, 6, 6), when="always").merged
    assert merge.macs == ((8 * 9 + 8 * 64) * 16, 8 * 9 * 64 * 16)


def test_what_has_been_merged_already() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    found = explain(fxexpand.fuse(model))
    assert found.merged == (Merged("0", ("0", "1")),)
    assert found.merged[0].done
    assert list(reasons(found)) == ["3"]


def test_an_expansion_is_named_by_its_layers() -> None:
    big = fxexpand.expand(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()), CL(2))
    (entry,) = explain(big).merged
    assert (entry.path, entry.nodes) == ("0", ("0.expand", "0.kernel", "0.reduce"))


class Picky(nn.Module):
    """Cannot be traced, and holds a block that can."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return self.conv(y) if y.sum() > 0 else y


def test_layers_that_code_without_a_graph_calls() -> None:
    found = explain(Picky().eval())
    assert [entry.nodes for entry in found.merged] == [("block.0", "block.1")]
    assert "no graph can stand for the code of Picky" in reasons(found)["conv"]


@pytest.mark.parametrize("inputs", [(), (torch.randn(2, 4, 6, 6),)])
def test_the_model_stays_as_it_was(inputs: tuple[Tensor, ...]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    model[1].eval()
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    explain(model, *inputs)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert list(model.state_dict()) == list(before)


def test_the_table() -> None:
    found = Explanation(
        (Merged("a", ("a", "b"), (200, 100)), Merged("long.name", ("c", "d"), (5, 5)), Merged("e", ("e", "f"))),
        (Refused(("g",), "training mode", "BatchNorm2d"), Refused(("add",), "because")),
    )
    assert str(found).splitlines() == [
        "3 merged",
        "  a         <- a + b (0.50 × the MACs)",
        "  long.name <- c + d",
        "  e         <- e + f",
        "2 left alone",
        "  g (BatchNorm2d): training mode",
        "  add: because",
    ]
