"""The models of torchvision, with batch norm as training might have left it, and their smallest inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import nn

from fxexpand.testing import as_trained

_ZOO: Any = torchvision.models
TASKS: dict[str, list[str]] = {
    "classification": _ZOO.list_models(module=_ZOO),
    "segmentation": _ZOO.list_models(module=_ZOO.segmentation),
    "detection": _ZOO.list_models(module=_ZOO.detection),
    "video": _ZOO.list_models(module=_ZOO.video),
}
# The smallest images that a model takes, where 32 × 32 are too small or 2 × 2 patches smaller.
SIDES = {"alexnet": 63, "inception_v3": 75, "maxvit_t": 224, "vit_b_32": 64, "vit_l_32": 64, "vit_h_14": 28}
# (frames, side) of the shortest and smallest clip, where 8 frames of 32 × 32 are not enough.
CLIPS = {"s3d": (16, 224), "mvit_v1_b": (16, 224), "mvit_v2_s": (16, 224)}
_DETECTION_SIDES = {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}
Inputs = tuple[object, ...]


class WithoutChoice(nn.Module):
    """All layers of a detection model, without its choice of boxes: which ones it keeps hangs on the last bit.

    Gives the feature maps, what the dense heads make of them, and what the heads of regions make of two fixed boxes.
    """

    def __init__(self, model: nn.Module, side: int) -> None:
        super().__init__()
        self.model: Any = model
        self.side = side
        self.register_buffer("boxes", torch.tensor([[0.1, 0.1, 0.7, 0.6], [0.0, 0.0, 1.0, 1.0]]) * side)

    def forward(self, x: torch.Tensor) -> list[Any]:
        maps = self.model.backbone(x)
        levels = list(maps.values()) if isinstance(maps, dict) else [maps]
        if not hasattr(self.model, "rpn"):
            return [levels, self.model.head(levels)]
        heads = self.model.roi_heads
        regions = [self.boxes] * len(x), [(self.side, self.side)] * len(x)
        found = [levels, self.model.rpn.head(levels)]
        found.append(heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, *regions))))
        if heads.has_mask():
            found.append(heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(maps, *regions))))
        if heads.has_keypoint():
            found.append(heads.keypoint_predictor(heads.keypoint_head(heads.keypoint_roi_pool(maps, *regions))))
        return found


def task_of(name: str) -> str:
    """The task of the model called ``name``. Raises ``ValueError`` for a name that torchvision does not have."""
    for task, names in TASKS.items():
        if name in names:
            return task
    raise ValueError(f"expected the name of a model of torchvision for {', '.join(TASKS)}, found {name!r}")


def build(name: str, batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Inputs]:
    """The model in eval mode, and the arguments that it takes, both in ``dtype``."""
    make: dict[str, Callable[[str, int], tuple[nn.Module, Inputs]]] = {
        "classification": _classifier,
        "segmentation": _segmenter,
        "detection": _detector,
        "video": _video,
    }
    model, inputs = make[task_of(name)](name, batch)
    return as_trained(model.to(dtype).eval()), cast(inputs, dtype)


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Every tensor of ``inputs`` in ``dtype``."""
    found: Inputs = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to(dtype), inputs)
    return found


def _classifier(name: str, batch: int) -> tuple[nn.Module, Inputs]:
    side = SIDES.get(name, 32)
    options: dict[str, Any] = {"image_size": side} if name.startswith("vit") else {}
    if name in {"googlenet", "inception_v3"}:
        options["init_weights"] = False  # which would draw each weight with scipy, for minutes
    return _ZOO.get_model(name, weights=None, **options), (torch.randn(batch, 3, side, side),)


def _segmenter(name: str, batch: int) -> tuple[nn.Module, Inputs]:
    model = _ZOO.get_model(name, weights=None, weights_backbone=None, num_classes=4)
    return model, (torch.randn(batch, 3, 32, 32),)


def _detector(name: str, batch: int) -> tuple[nn.Module, Inputs]:
    side = _DETECTION_SIDES.get(name, 64)
    options: dict[str, Any] = {} if name in _DETECTION_SIDES else {"min_size": side, "max_size": side}
    model = _ZOO.get_model(name, weights=None, weights_backbone=None, num_classes=3, **options)
    return WithoutChoice(model, side), (torch.rand(batch, 3, side, side),)


def _video(name: str, batch: int) -> tuple[nn.Module, Inputs]:
    frames, side = CLIPS.get(name, (8, 32))
    return _ZOO.get_model(name, weights=None), (torch.randn(batch, 3, frames, side, side),)
