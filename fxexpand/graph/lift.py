"""A layer -> the Kernel it applies and the padding it adds, or a Refusal that says why there is none."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from fxexpand.algebra.kernel import Kernel, Sides, pad_amounts, pad_sides
from fxexpand.algebra.refusal import Refusal
from fxexpand.graph.geometry import DIMS, geometry_of
from fxexpand.graph.layers import is_layer

_LINEAR = tuple(DIMS)
_PADS: dict[str, tuple[type[nn.Module], ...]] = {
    "zeros": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}


def lift_bare(layer: nn.Module | None) -> Kernel | Refusal:
    """The kernel of a ``Linear`` or ``ConvNd`` without its padding: its own weight and bias, in their own dtype.

    Refuses any other module.
    """
    lifted = lift_padded(layer, padded=False)
    return lifted if isinstance(lifted, Refusal) else lifted[0]


def lift_padded(layer: nn.Module | None, *, padded: bool = True) -> tuple[Kernel, str, Sides] | Refusal:
    """The same kernel, ``padded`` where that is with zeros; the mode of the padding, and the sides of another mode."""
    if layer is None or not (is_layer(layer) and isinstance(layer, _LINEAR)):
        return Refusal(f"{type(layer).__name__} is no convolution or linear layer")
    own = geometry_of(layer)
    mode = own.padding_mode if own.padded else "zeros"
    weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
    sides = own.padding if padded and mode == "zeros" else ()
    return Kernel(weight, bias, own.stride, sides, own.dilation, own.groups), mode, own.padding


def pad_module(mode: str, padding: Sides) -> nn.Module:
    """torch's padding module for a mode of ``ConvNd`` and (before, after) pairs, one an axis."""
    pad: nn.Module = _PADS[mode][len(padding) - 1](tuple(pad_amounts(padding)))
    return pad


def padding_of(layer: nn.Module | None) -> tuple[str, Sides] | None:
    """(mode, sides) that a convolution or padding module adds to its input; None where it adds nothing."""
    for mode, classes in _PADS.items():
        if type(layer) in classes:
            return mode, pad_sides(cast("tuple[int, ...]", vars(layer)["padding"]))
    if isinstance(layer, _LINEAR):
        geometry = geometry_of(layer)
        return (geometry.padding_mode, geometry.padding) if geometry.padded else None
    return None
