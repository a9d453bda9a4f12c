"""Models that people have: expanded, trained a step and contracted, in float64 and float32.

Under the profile ``thorough`` all of them in both; else the small ones in one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import settings
from torch import Tensor, nn

import fxexpand
from fxexpand import CL, FC, Rule
from fxexpand.graph.site import Site

pytestmark = pytest.mark.usefixtures("all_cores")
models: Any = torchvision.models
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
THOROUGH = settings.get_current_profile_name() == "thorough"

Make = Callable[[], nn.Module]
# name -> (how to make it, side of the smallest image it takes)
CLASSIFIERS: dict[str, tuple[Make, int]] = {
    "mobilenet_v2": (models.mobilenet_v2, 32),
    "mobilenet_v3_small": (models.mobilenet_v3_small, 32),
    "shufflenet_v2_x0_5": (models.shufflenet_v2_x0_5, 32),
    "resnet18": (models.resnet18, 32),
    "alexnet": (models.alexnet, 63),
    "squeezenet1_1": (models.squeezenet1_1, 32),
    "efficientnet_b0": (models.efficientnet_b0, 32),
    "densenet121": (models.densenet121, 32),
    "vgg11": (models.vgg11, 32),
    "regnet_y_400mf": (models.regnet_y_400mf, 32),
    "convnext_tiny": (models.convnext_tiny, 32),
    "vit_b_16": (lambda: models.vit_b_16(image_size=32), 32),
    "swin_t": (models.swin_t, 32),
    "deeplabv3_mobilenet_v3_large": (
        lambda: models.segmentation.deeplabv3_mobilenet_v3_large(weights_backbone=None, num_classes=4),
        32,
    ),
}


def detector() -> nn.Module:
    """Small images; no random choice of proposals, so that two runs compute the same losses."""
    detection = models.detection
    model: nn.Module = detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights_backbone=None, num_classes=3, min_size=64, max_size=64, rpn_batch_size_per_image=10**6,
        box_batch_size_per_image=10**6,
    )  # fmt: skip
    return model


def awake(model: nn.Module) -> nn.Module:
    """``model`` without what rightly has no gradient: blocks dropped by chance, weights that start at zero."""
    for module in model.modules():
        if isinstance(module, torchvision.ops.StochasticDepth):
            module.p = 0.0
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    return model


def narrow_linears(site: Site) -> bool:
    return site.in_channels <= 1280


def rules(model: nn.Module) -> list[Any]:
    """CL(2) where it reaches, and FC(2) for linear layers of at most 1,280 inputs where there is one."""
    linear = Rule(FC(2), where=narrow_linears)
    sites = [m for m in model.modules() if isinstance(m, nn.Linear) and m.in_features <= 1280]
    return [CL(2), linear] if sites else [CL(2)]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach() - expected.detach()).norm() / expected.detach().norm())


def gradients_are_sound(big: nn.Module) -> None:
    for name, parameter in big.named_parameters():
        if is_new(big, name):
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name
            assert bool(parameter.grad.any()), name


def is_new(big: nn.Module, name: str) -> bool:
    parent = big.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
    return hasattr(parent, "origin")


SMALL = (
    *("mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "resnet18", "squeezenet1_1", "efficientnet_b0"),
    "regnet_y_400mf",
)


@pytest.mark.parametrize("dtype", TOLERANCE if THOROUGH else [torch.float64], ids=str)
@pytest.mark.parametrize("name", CLASSIFIERS if THOROUGH else SMALL)
def test_classification_and_segmentation(name: str, dtype: torch.dtype) -> None:
    make, side = CLASSIFIERS[name]
    model = awake(make()).to(dtype)
    x = torch.randn(2, 3, side, side, dtype=dtype)
    big = fxexpand.expand(model, rules(model))
    assert fxexpand.verify(model, big, x, rtol=TOLERANCE[dtype]) <= TOLERANCE[dtype]

    y = big.train()(x)
    sum(out.square().mean() for out in (y.values() if isinstance(y, dict) else [y])).backward()
    gradients_are_sound(big)
    torch.optim.SGD(big.parameters(), lr=1e-4).step()

    fresh = make().to(dtype)
    fresh.load_state_dict(fxexpand.contract(big).state_dict(), strict=True)
    assert fxexpand.verify(big, fresh, x, rtol=TOLERANCE[dtype]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE if THOROUGH else [torch.float32], ids=str)
def test_detection(dtype: torch.dtype) -> None:
    model = detector().to(dtype)
    images = [torch.rand(3, 64, 64, dtype=dtype) for _ in range(2)]
    boxes = torch.tensor([[5.0, 5.0, 40.0, 40.0], [20.0, 10.0, 60.0, 50.0]], dtype=dtype)
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in range(2)]

    def losses(net: nn.Module) -> dict[str, Tensor]:
        found: dict[str, Tensor] = net.train()(images, copy.deepcopy(targets))
        return found

    def compare(before: nn.Module, after: nn.Module) -> None:
        expected = losses(before)
        assert set(expected) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
        for key, loss in losses(after).items():
            assert relative(loss, expected[key]) <= TOLERANCE[dtype], key

    big = fxexpand.expand(model, rules(model))
    compare(model, big)
    sum(losses(big).values(), torch.zeros(())).backward()
    gradients_are_sound(big)
    torch.optim.SGD(big.parameters(), lr=1e-4).step()
    fresh = detector().to(dtype)
    fresh.load_state_dict(fxexpand.contract(big).state_dict(), strict=True)
    compare(big, fresh)
