"""A fused model exports to ONNX as the compact network does: the same nodes, names of weights, and function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from fxexpand import CL, FC, RepVGG, collapse, contract, expand, fuse
from fxexpand.demo.smallnet import SmallNet
from fxexpand.testing import as_trained


class Residual(nn.Module):
    """Two layers with batch norm, and the input beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 3, 3, padding=1, bias=False),
            nn.BatchNorm2d(3),
        )
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head((self.body(x) + x).relu().mean((2, 3)))
        return y


def exported(model: nn.Module, x: Tensor, path: Path) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """The types of the nodes, and the shapes of the weights by name; the file is written to ``path``."""
    batch = torch.export.Dim("batch", min=1)
    program: Any = torch.onnx.export(model.eval(), (x,), dynamo=True, verbose=False, dynamic_shapes=({0: batch},))
    program.save(str(path))
    graph = program.model.graph
    weights = {name: tuple(value.shape) for name, value in graph.initializers.items() if "." in name}
    return [node.op_type for node in graph], weights


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("compact", "rules"),
    [
        pytest.param(SmallNet(kernel_size=7), [CL(4), FC(2)], id="chains"),
        pytest.param(Residual(), [RepVGG(batch_norm=True)], id="branches"),
    ],
)
def test_nodes_names_and_numbers_of_the_compact_network(compact: nn.Module, rules: list[Any], tmp_path: Path) -> None:
    compact = as_trained(compact).eval()
    x = torch.randn(2, 3, 32, 32)
    big = as_trained(collapse(expand(compact, rules))).eval()
    expected = exported(fuse(compact), x, tmp_path / "compact.onnx")
    path = tmp_path / "fused.onnx"
    assert exported(fuse(contract(big)), x, path) == expected
    assert exported(fuse(big), x, path) == expected
    assert "BatchNormalization" not in expected[0]
    session = onnxruntime.InferenceSession(path)
    for batch in (1, 3):
        images = torch.randn(batch, 3, 32, 32)
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        wanted = big(images).detach()
        assert float((torch.from_numpy(found) - wanted).norm() / wanted.norm()) < 1e-5
