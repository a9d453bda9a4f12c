"""Every classification model of torchvision, fused: the same function, no more work, no batch norm behind a layer.

Under the profile ``thorough`` all of them, one after another, in up to 16 GiB of memory; else one of each family.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import settings
from torch import fx, nn

import fxexpand
from fxexpand.testing import as_trained

pytestmark = pytest.mark.usefixtures("all_cores")
REPRESENTATIVE = (
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
)
ALL: list[str] = torchvision.models.list_models(module=torchvision.models)
NAMES = ALL if settings.get_current_profile_name() == "thorough" else REPRESENTATIVE
# The smallest images that a model takes, where 32 × 32 are too small or 2 × 2 patches smaller.
SIDES = {"alexnet": 63, "inception_v3": 75, "maxvit_t": 224, "vit_b_32": 64, "vit_l_32": 64, "vit_h_14": 28}
LAYERS = (nn.Conv2d, nn.Linear)


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The model in float64 and eval mode, with statistics as training might have left them, and an image for it."""
    side = SIDES.get(name, 32)
    options: dict[str, Any] = {"image_size": side} if name.startswith("vit") else {}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # which would draw each weight with scipy, for minutes
    model: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    as_trained(model.double().eval())
    return model, torch.randn(2, 3, side, side, dtype=torch.float64)


def norms_behind_layers(model: nn.Module) -> list[str]:
    """The batch norms that follow a convolution or linear layer that nothing else reads."""
    found = []
    for gm in (module for module in model.modules() if isinstance(module, fx.GraphModule)):
        for node in gm.graph.nodes:
            if isinstance(called(gm, node), nn.BatchNorm2d):
                (source,) = node.all_input_nodes
                if isinstance(called(gm, source), LAYERS) and len(source.users) == 1:
                    found.append(str(node.target))
    return found


def called(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return gm.get_submodule(str(node.target)) if node.op == "call_module" else None


@pytest.mark.parametrize("name", NAMES)
def test_classification(name: str) -> None:
    model, image = make(name)
    before = fxexpand.summary(model, image).macs
    fused = fxexpand.fuse(model, image)
    after = fxexpand.summary(fused, image).macs
    with torch.no_grad():
        y, found = model(image), fused(image)
    assert bool(y.isfinite().all())
    assert bool(y.any())
    assert float((found - y).norm() / y.norm()) <= 1e-10
    assert before is not None
    assert after is not None
    assert after <= before
    assert norms_behind_layers(fused) == []


def test_resnet18_as_it_comes() -> None:
    model = torchvision.models.resnet18().eval()
    fused = fxexpand.fuse(model)
    kinds = Counter(type(module) for module in fused.modules())
    assert (kinds[nn.Conv2d], kinds[nn.Linear], kinds[nn.BatchNorm2d]) == (20, 1, 0)
    assert isinstance(fused, fx.GraphModule)
    ran = Counter(type(called(fused, node)) for node in fused.graph.nodes if node.op == "call_module")
    assert (ran[nn.Conv2d], ran[nn.Linear], ran[nn.BatchNorm2d]) == (20, 1, 0)
    assert sum(ran.values()) == 20 + 1 + 17 + 1 + 1  # ReLUs, the max pool and the average pool
