"""The planner takes the cheapest plan of all."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from torch import fx, nn

import fxexpand
from fusing import randomised
from fxexpand.regions.plan import WINDOW, Planner
from fxexpand.regions.reading import Reading
from fxexpand.regions.shapes import Shapes


def planner(model: nn.Module, *, always: bool = False) -> Planner:
    return Planner(Reading(fx.symbolic_trace(model), Shapes(), {}), always=always)


def linear_chain(*widths: int) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(m, n) for m, n in pairwise(widths)]).eval()


@pytest.mark.parametrize(
    "widths",
    [(8, 100, 8), (100, 8, 100), (100, 8, 8, 100), (8, 100, 8, 100, 8), (50, 2, 60, 3, 70), (9, 9, 9, 9), (1, 7, 1, 7)],
)
def test_no_way_to_cut_a_chain_is_cheaper(widths: tuple[int, ...]) -> None:
    inner = range(1, len(widths) - 1)
    ways = [cut for count in range(len(widths) - 1) for cut in combinations(inner, count)]
    costs = [sum(widths[a] * widths[b] for a, b in pairwise((0, *cut, len(widths) - 1))) for cut in ways]
    assert planner(linear_chain(*widths)).plan().cost.macs == min(costs)


def test_of_equally_cheap_plans_it_takes_the_one_with_fewer_layers() -> None:
    plan = planner(linear_chain(4, 2, 4)).plan()  # 4·2 + 2·4 = 4·4
    assert (plan.cost.macs, plan.cost.nodes) == (16, 1)


def test_always_merges_whatever_is_exact() -> None:
    model = linear_chain(100, 8, 100)
    assert planner(model).plan().merges == []
    assert planner(model, always=True).plan().cost.nodes == 1


def test_a_chain_longer_than_what_is_looked_at_at_once() -> None:
    model = linear_chain(*[6] * (3 * WINDOW)).double()
    fused = fxexpand.fuse(model)
    assert isinstance(fused, fx.GraphModule)
    assert [node.op for node in fused.graph.nodes] == ["placeholder", "call_module", "output"]
    x = torch.randn(5, 6, dtype=torch.float64)
    assert (fused(x) - model(x)).norm() <= 1e-12 * model(x).norm()


class Branches(nn.Module):
    """Branches that cost less apart: a depthwise one and a dense one of another size."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 7, padding=3, groups=8), nn.BatchNorm2d(8))
        self.point = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.deep(x) + self.point(x)
        return out


def test_branches_that_are_cheaper_apart_are_merged_within() -> None:
    plan = planner(randomised(Branches())).plan()
    assert [[node.name for node in merge.stretch.nodes] for merge in plan.merges] == [
        ["point_0", "point_1"],
        ["deep_0", "deep_1"],
    ]
    (reason,) = plan.refused.values()
    assert "one kernel would cost 6.9 times the MACs" in reason  # 49·64 / (49·8 + 64)


def test_shapes_of_examples_decide() -> None:
    """A pool after a pointwise layer: as dear on even sizes, cheaper on odd ones, where the pool drops samples."""
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.AvgPool2d(2)).eval()
    for size, ratio in ((4, 1.0), (5, 16 / 25)):
        (merge,) = fxexpand.explain(model, torch.randn(1, 4, size, size)).merged
        assert merge.macs is not None
        assert merge.macs[1] / merge.macs[0] == ratio
