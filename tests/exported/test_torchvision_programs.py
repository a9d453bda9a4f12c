"""A network of torchvision, exported and fused; ``python -m benchmarks.exported`` takes more of them, and packages."""

from __future__ import annotations

import torch
import torchvision

from exporting import export, fused, kinds
from fxexpand.testing import as_trained


def test_resnet_has_no_batch_norm_left_and_computes_the_same() -> None:
    model = as_trained(torchvision.models.resnet18(weights=None).double().eval())
    x = torch.randn(2, 3, 64, 64).double()
    exported = export(model, x, dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert kinds(exported) == (20, 20, 1)
    assert kinds(fused(exported, (torch.randn(3, 3, 64, 64).double(),))) == (20, 0, 1)
