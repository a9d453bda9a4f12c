"""What a linear layer is, apart from its weights: one description for modules and functional calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fxexpand.algebra.kernel import Ints, Sides

# The linear layers that can be expanded, and their number of spatial axes.
DIMS: dict[type[nn.Module], int] = {nn.Linear: 0, nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Geometry:
    """The hyperparameters of a convolution or linear layer.

    ``padding`` has a pair (before, after) an axis, in samples, with "same" and "valid" worked out; the features of a
    linear layer count as channels, and it has no axes.
    """

    in_channels: int
    out_channels: int
    has_bias: bool
    kernel_size: Ints = ()
    stride: Ints = ()
    padding: Sides = ()
    dilation: Ints = ()
    groups: int = 1
    padding_mode: str = "zeros"

    @property
    def dims(self) -> int:
        """The number of spatial axes; 0 for a linear layer."""
        return len(self.kernel_size)

    @property
    def depthwise(self) -> bool:
        """Every group has one input channel, and there is more than one."""
        return 1 < self.groups == self.in_channels

    @property
    def padded(self) -> bool:
        return any(amount != 0 for sides in self.padding for amount in sides)

    @property
    def symmetric(self) -> bool:
        return all(before == after for before, after in self.padding)


def geometry_of(layer: nn.Module) -> Geometry:
    """The geometry of a ``Linear`` or ``ConvNd``, or of a layer with the same attributes."""
    attributes: Any = layer
    if hasattr(layer, "in_features"):
        return Geometry(attributes.in_features, attributes.out_features, _has_bias(layer))
    return Geometry(
        in_channels=attributes.in_channels,
        out_channels=attributes.out_channels,
        has_bias=_has_bias(layer),
        kernel_size=tuple(attributes.kernel_size),
        stride=tuple(attributes.stride),
        padding=padding_sides(attributes.padding, attributes.kernel_size, attributes.dilation),
        dilation=tuple(attributes.dilation),
        groups=attributes.groups,
        padding_mode=attributes.padding_mode,
    )


def _has_bias(layer: nn.Module) -> bool:
    bias = getattr(layer, "bias", None)
    return (bias() if callable(bias) else bias) is not None  # quantized layers have a method


def padding_sides(padding: str | int | Ints, kernel_size: Ints, dilation: Ints) -> Sides:
    """(before, after) for each axis, from what ``ConvNd`` takes: a number, one an axis, "same" or "valid".

    "same" puts the odd sample after the signal, as torch does.
    """
    if padding == "valid":
        return ((0, 0),) * len(kernel_size)
    if padding == "same":
        totals = [step * (k - 1) for step, k in zip(dilation, kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    amounts = spread(padding, len(kernel_size))
    return tuple((amount, amount) for amount in amounts)


def spread(value: Any, dims: int) -> Ints:
    """One integer an axis, from one for all or one for each."""
    if isinstance(value, int):
        return (value,) * dims
    values = tuple(int(v) for v in value)
    return values * dims if len(values) == 1 else values
