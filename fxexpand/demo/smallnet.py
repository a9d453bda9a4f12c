"""SmallNet, the compact network of the paper's CIFAR experiments (ExpandNets, section 4.1 and its supplement)."""

from collections import OrderedDict
from itertools import pairwise

from torch import Tensor, nn

IMAGE_SIZE = 32
CHANNELS = (3, 8, 16, 32)
HIDDEN_UNITS = 64
# Padding by kernel size: the 7×7 network keeps the image size, the 3×3 one does not pad.
PADDING = {3: 0, 7: 3}


class SmallNet(nn.Module):
    """Three blocks of [conv k×k -> BatchNorm -> ReLU -> max-pool 2], then two Linear layers.

    Maps images (N, 3, 32, 32) to logits (N, classes). With k = 7 it has 66,186 parameters for 10 classes and 72,036
    for 100. Raises `ValueError` for a kernel size other than 3 and 7, or fewer than one class.
    """

    def __init__(self, classes: int = 10, kernel_size: int = 7) -> None:
        super().__init__()
        if kernel_size not in PADDING:
            raise ValueError(f"SmallNet: expected kernel_size 3 or 7, found {kernel_size!r}. Use one of those two.")
        if classes < 1:
            raise ValueError(f"SmallNet: expected at least 1 class, found {classes!r}. Use classes=10 for digits.")
        padding = PADDING[kernel_size]
        features: OrderedDict[str, nn.Module] = OrderedDict()
        size = IMAGE_SIZE
        for block, (inputs, outputs) in enumerate(pairwise(CHANNELS), start=1):
            features[f"conv{block}"] = nn.Conv2d(inputs, outputs, kernel_size, padding=padding)
            features[f"bn{block}"] = nn.BatchNorm2d(outputs)
            features[f"relu{block}"] = nn.ReLU()
            features[f"pool{block}"] = nn.MaxPool2d(2)
            size = (size + 2 * padding - kernel_size + 1) // 2
        self.features = nn.Sequential(features)
        self.classifier = nn.Sequential(
            OrderedDict(
                hidden=nn.Linear(CHANNELS[-1] * size * size, HIDDEN_UNITS),
                relu=nn.ReLU(),
                output=nn.Linear(HIDDEN_UNITS, classes),
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of `images` (N, 3, 32, 32)."""
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits
