"""explain says of an exported program what fuse does with it, by the names of its calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxexpand
from exporting import export


class Network(nn.Module):
    """Two convolutions with batch norm that are one layer, and two linear layers with something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
        self.hidden, self.head = nn.Linear(4 * 36, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        y = self.hidden(self.stem(x).relu().flatten(1))
        return self.head(y), y


@pytest.mark.parametrize("core", [False, True], ids=["training-ir", "core"])
def test_what_is_merged_and_why_the_rest_is_not(core: bool) -> None:
    program = export(Network().eval(), torch.randn(2, 3, 8, 8), core=core)
    found = fxexpand.explain(program)
    (merged,) = found.merged
    names = [node.name for node in program.graph.nodes]
    assert set(merged.nodes) <= set(names)
    assert [name.partition("_1")[0].lstrip("_") for name in merged.nodes] == (
        ["convolution", "native_batch_norm_legit_no_training", "convolution"]
        if core
        else ["conv2d", "batch_norm", "conv2d"]
    )
    fused = fxexpand.fuse(program)
    assert f"{merged.path}.weight" in fused.state_dict
    assert merged.macs is not None
    assert merged.macs[1] < merged.macs[0]
    kinds = ["addmm", "addmm_1"] if core else ["linear", "linear_1"]
    assert [entry.nodes for entry in found.refused] == [(kind,) for kind in kinds]
    assert "its output is used by 2 nodes" in found.refused[0].reason
    assert "1 merged" in str(found)
    again = fxexpand.explain(fused)
    assert not again.merged
    assert len(again.refused) == 3


def test_training_mode_is_a_reason() -> None:
    program = export(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), torch.randn(2, 3, 8, 8))
    reasons = {entry.nodes[0]: entry.reason for entry in fxexpand.explain(program).refused}
    assert "it normalises each batch by its own statistics" in reasons["batch_norm"]
